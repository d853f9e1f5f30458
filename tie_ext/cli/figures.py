"""The paper's figures. None of them shows or saves anything by itself."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tie_ext.cli.evaluation import FALSE_ALARM
from tie_ext.scores.threshold import calibration_size, conformal_threshold

GAP = 28
"""Pixels of an image for each pixel between it and the next."""
LEGEND_CLASSES = 21
"""More classes than these have no legend."""


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def show(ax: Axes, image: Tensor) -> None:
    """Show an image uint8 ``(C, H, W)`` without ticks."""
    ax.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
    ax.set(xticks=[], yticks=[])


def spread(rows: Tensor, count: int) -> list[int]:
    """Up to ``count`` of the rows ``(N,)``, from all over them."""
    places = torch.linspace(0, len(rows) - 1, min(count, len(rows)))
    return rows[places.long()].tolist()


def inversion_grid(inversions: Tensor, names: Sequence[str]) -> Figure:
    """What each output looks like to the network, a row per output (the paper's Figure 2).

    Arguments:
        inversions: uint8 ``(n+1, k, C, S, S)``, garbage last.
        names: Name of each row.
    """
    rows, k, C, S, _ = inversions.shape
    figure, ax = _axes(0.55 * k + 1, 0.55 * rows + 0.5)
    gap = 1 + S // GAP
    padded = F.pad(inversions, (0, gap, 0, gap), value=255)
    S += gap
    show(ax, padded.permute(2, 0, 3, 1, 4).reshape(C, rows * S, k * S))
    ax.set_yticks([S * (i + 0.5) for i in range(rows)], names)
    ax.spines[:].set_visible(False)
    return figure


def inversions_over_epochs(
    snapshots: Mapping[int, Mapping[str, Tensor]], names: Sequence[str], columns: int = 8
) -> Figure:
    """One inversion of every output at up to ``columns`` epochs (the paper's Figure 2)."""
    epochs = [e for e, snapshot in snapshots.items() if "inversions" in snapshot]
    step = -(-len(epochs) // columns)
    epochs = epochs[::-1][::step][::-1]  # as many epochs between any two, and the last one
    grid = torch.stack([snapshots[e]["inversions"][:, 0] for e in epochs], dim=1)
    figure = inversion_grid(grid, names)
    (ax,) = figure.axes
    width = ax.get_xlim()[1] / len(epochs)
    ax.set_xticks([width * (i + 0.5) for i in range(len(epochs))], list(map(str, epochs)))
    ax.set_xlabel("epoch")
    return figure


def metric_curves(log: Sequence[Mapping], names: Sequence[str]) -> Figure:
    """Entropy, confidence, margin and uncertainty of the candidates over the epochs, a curve per
    output (the paper's Figure 3).
    """
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    epochs = [entry["epoch"] for entry in log]
    metrics = ("entropy", "confidence", "margin", "uncertainty")

    for ax, metric in zip(figure.subplots(2, 2).flat, metrics, strict=True):
        # None, where there was nothing to measure, becomes NaN.
        values = np.array([entry[metric] for entry in log], float)
        for i, name in enumerate(names):
            style = "k--" if i == len(names) - 1 else "-"
            ax.plot(epochs, values[:, i], style, label=name, linewidth=1.2)
        if metric == "uncertainty":
            ax.plot(epochs, np.array([entry["tau"] for entry in log], float), "r:", label="tau")
        ax.set(xlabel="epoch", ylabel=metric)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) <= LEGEND_CLASSES:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def feature_map(
    snapshots: Mapping[int, Mapping[str, Tensor]], names: Sequence[str], panels: int = 3
) -> Figure:
    """t-SNE of penultimate features of test images and garbage at the first, middle and last epoch
    (the paper's Figure 4).
    """
    from sklearn.manifold import TSNE

    epochs = torch.tensor(list(snapshots))
    places = np.linspace(0, len(epochs) - 1, min(panels, len(epochs)))
    chosen = sorted({int(epochs[round(i)]) for i in places})
    figure = Figure(figsize=(4 * len(chosen), 3.8), layout="constrained")
    for ax, epoch in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        h, y = snapshots[epoch]["features"].numpy(), snapshots[epoch]["labels"].numpy()
        perplexity = min(30, (len(h) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(h)
        garbage = y == len(names) - 1
        colours = "tab10" if len(names) <= 11 else "hsv"
        ax.scatter(*points[~garbage].T, c=y[~garbage], cmap=colours, s=5)
        ax.scatter(*points[garbage].T, c="k", s=5, marker="x", linewidths=0.6, label="garbage")
        # Epoch 0: nothing was trained.
        ax.set(xticks=[], yticks=[], title=f"epoch {epoch}" if epoch else "")
    ax.legend(loc="lower right", fontsize=7)
    return figure


def roc_and_pr(scores: Mapping[str, Tensor]) -> Figure:
    """ROC and precision-recall of each OOD set against the ID set ``id``; OOD is positive (the
    paper's Figures 5 and 6, top).
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure = Figure(figsize=(10, 4), layout="constrained")
    roc, pr = figure.subplots(1, 2)
    count = len(scores["id"])
    for name, values in scores.items():
        if name != "id":
            truth = [0] * count + [1] * len(values)
            score = torch.cat([scores["id"], values]).numpy()
            roc.plot(*roc_curve(truth, score)[:2], label=name)
            precision, recall, _ = precision_recall_curve(truth, score)
            pr.plot(recall, precision, label=name)
    # From one ID image on: good detectors differ only left of a tenth.
    roc.set(xscale="log", xlim=(1 / count, 1), title="ROC")
    roc.set(xlabel="false positive rate", ylabel="true positive rate")
    roc.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    pr.set(xlabel="recall", ylabel="precision", title="precision-recall")
    figure.legend(*pr.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def histograms(scores: Mapping[str, Tensor]) -> Figure:
    """Scores of each set (the paper's Figures 5 and 6, bottom), larger = more OOD, and the
    threshold that 5 % of ID images exceed.
    """
    figure, ax = _axes(10, 3.5)
    everything = torch.cat(list(scores.values()))
    low, high = everything.quantile(0.001).item(), everything.quantile(0.999).item()
    edges = np.linspace(low, high + 1e-6, 60).tolist()
    for name, values in scores.items():
        how = {"histtype": "stepfilled", "alpha": 0.4} if name == "id" else {"histtype": "step"}
        ax.hist(values.numpy(), edges, density=True, label=name, **how)  # type: ignore[arg-type]
    if len(scores["id"]) >= calibration_size(FALSE_ALARM):
        threshold = conformal_threshold(scores["id"], FALSE_ALARM).item()
        label = f"threshold {threshold:.2f}: {FALSE_ALARM:.0%} of ID images are above it"
        ax.axvline(threshold, color="k", linewidth=0.8, linestyle=":", label=label)
    ax.set(xlabel="score (larger = more OOD)", ylabel="density")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=8)
    return figure


def layer_bars(
    x: Tensor, captions: Sequence[str], distances: Tensor, layers: Sequence[str]
) -> Figure:
    """Each image beside a bar for each layer.

    Arguments:
        x: Images of [0, 1] ``(M, C, S, S)``.
        captions: A line on each.
        distances: How far from ID images each layer finds them ``(M, L)``, as a multiple of what
            5 % of held-out ID images exceed; above 1 = outside.
        layers: Name of each layer.
    """
    figure = Figure(figsize=(9, 0.4 + 0.22 * (len(layers) + 5) * len(x)), layout="constrained")
    axes = figure.subplots(len(x), 2, squeeze=False, width_ratios=(1, 4))
    # One scale, so that the bars of two images can be compared.
    right = 1.05 * max(1.0, distances.max().item())
    for (left, bars), image, caption, row in zip(
        axes, x, captions, distances.tolist(), strict=True
    ):
        show(left, (image * 255).round().byte())
        colours = ["tab:red" if value > 1 else "tab:gray" for value in row]
        bars.barh(range(len(layers)), row, color=colours)
        bars.axvline(1, color="k", linewidth=0.8, linestyle=":")
        bars.set_yticks(range(len(layers)), layers, fontsize=7)
        bars.invert_yaxis()
        bars.set_xlim(0, right)
        bars.set_title(caption, fontsize=9, loc="left")
    axes[-1, 1].set_xlabel("multiple of the distance that 5 % of ID images exceed (dotted: 1)")
    return figure
