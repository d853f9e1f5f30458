"""The paper's figures of a run, and one HTML page that holds them all.

Every figure is drawn on the axes given, or on new ones; none of them shows or saves anything by itself.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from tie_ext.cli.calibrate_run import COMBINED, FALSE_ALARM
from tie_ext.cli.decide_run import decider
from tie_ext.cli.folder import OWN, attached, load_network, load_scores, read_record
from tie_ext.cli.score import LEVELS
from tie_ext.cli.snapshots import load_examples, load_snapshots
from tie_ext.models.network import TIENet
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.scores.decision import Decision
from tie_ext.scores.threshold import calibration_size, conformal_threshold
from tie_ext.training.log import EpochLog
from tie_ext.utils.files import load_state, reading, write_atomically

GAP = 28
"""Pixels of an image for each pixel between it and the next."""


def _axes(ax: Axes | None, width: float = 5.0, height: float = 3.5) -> Axes:
    return (
        ax if ax is not None else Figure(figsize=(width, height), layout="constrained").subplots()
    )


def _figure(ax: Axes) -> Figure:
    figure = ax.figure
    assert isinstance(figure, Figure)
    return figure


def inversion_grid(inversions: Tensor, names: Sequence[str], ax: Axes | None = None) -> Figure:
    """What each output looks like to the network: one row an output, garbage last (the paper's Figure 2).

    Arguments:
        inversions: uint8 ``(n+1, k, C, S, S)``.
        names: Name of each row.
        ax: Where to draw.
    """
    rows, k, C, S, _ = inversions.shape
    ax = _axes(ax, 0.55 * k + 1, 0.55 * rows + 0.5)
    S += 1 + S // GAP  # white between the images
    picture = (
        F.pad(inversions, (0, S - inversions.shape[-1]) * 2, value=255)
        .permute(0, 3, 1, 4, 2)
        .reshape(rows * S, k * S, C)
        .numpy()
    )
    ax.imshow(picture.squeeze(-1) if C == 1 else picture, cmap="gray", vmin=0, vmax=255)
    ax.set_yticks([S * (i + 0.5) for i in range(rows)], names)
    ax.set_xticks([])
    ax.spines[:].set_visible(False)
    return _figure(ax)


def inversions_over_epochs(
    snapshots: Mapping[int, Mapping[str, Tensor]], names: Sequence[str], columns: int = 8
) -> Figure:
    """One inversion of every output at up to ``columns`` epochs, side by side (the paper's Figure 2)."""
    epochs = [e for e, snapshot in snapshots.items() if "inversions" in snapshot]
    chosen = epochs[:: -max(1, -(-len(epochs) // columns))][
        ::-1
    ]  # as many epochs between any two, and the last one
    ax = _axes(None, 0.55 * len(chosen) + 1.2, 0.55 * len(names) + 0.6)
    inversion_grid(
        torch.stack([snapshots[e]["inversions"][:, 0] for e in chosen], dim=1), names, ax
    )
    wide = ax.get_xlim()[1] / len(chosen)
    ax.set_xticks([wide * (i + 0.5) for i in range(len(chosen))], [str(e) for e in chosen])
    ax.set_xlabel("epoch")
    return _figure(ax)


def metric_curves(log: Sequence[Mapping], names: Sequence[str]) -> Figure:
    """Entropy, confidence, margin and uncertainty of the inversions, a line an output, over the epochs (the paper's Figure 3)."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    epochs = [entry["epoch"] for entry in log]
    for ax, metric in zip(
        figure.subplots(2, 2).flat, ("entropy", "confidence", "margin", "uncertainty"), strict=True
    ):
        for i, name in enumerate(names):
            values = [np.nan if entry[metric][i] is None else entry[metric][i] for entry in log]
            ax.plot(
                epochs, values, "k--" if i == len(names) - 1 else "-", label=name, linewidth=1.2
            )
        if metric == "uncertainty":
            ax.plot(
                epochs,
                [np.nan if entry["tau"] is None else entry["tau"] for entry in log],
                "r:",
                label="tau",
            )
        ax.set(xlabel="epoch", ylabel=metric)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) <= 21:
        figure.legend(*ax.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def feature_map(
    snapshots: Mapping[int, Mapping[str, Tensor]], names: Sequence[str], panels: int = 3
) -> Figure:
    """t-SNE of penultimate features of test images and garbage at the first, middle and last epoch (the paper's Figure 4)."""
    from sklearn.manifold import TSNE

    epochs = list(snapshots)
    chosen = sorted(
        {epochs[round(i)] for i in np.linspace(0, len(epochs) - 1, min(panels, len(epochs)))}
    )
    figure = Figure(figsize=(4 * len(chosen), 3.8), layout="constrained")
    for ax, epoch in zip(np.atleast_1d(figure.subplots(1, len(chosen))), chosen, strict=True):
        h, y = snapshots[epoch]["features"].numpy(), snapshots[epoch]["labels"].numpy()
        points = TSNE(
            perplexity=min(30, (len(h) - 1) / 3), init="pca", random_state=0
        ).fit_transform(h)
        garbage = y == len(names) - 1
        ax.scatter(
            *points[~garbage].T, c=y[~garbage], cmap="tab10" if len(names) <= 11 else "hsv", s=5
        )
        ax.scatter(*points[garbage].T, c="k", s=5, marker="x", linewidths=0.6, label="garbage")
        ax.set(
            xticks=[], yticks=[], title=f"epoch {epoch}" if epoch else ""
        )  # 0: nothing was trained in epochs
    ax.legend(loc="lower right", fontsize=7)
    return figure


def roc_and_pr(scores: Mapping[str, Tensor]) -> Figure:
    """ROC and precision-recall of each OOD set against the ID set called ``id``; OOD is positive (the paper's Figures 5 and 6, top)."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    figure = Figure(figsize=(10, 4), layout="constrained")
    roc, pr = figure.subplots(1, 2)
    for name, values in scores.items():
        if name == "id":
            continue
        truth = np.r_[np.zeros(len(scores["id"])), np.ones(len(values))]
        score = np.r_[scores["id"].numpy(), values.numpy()]
        fpr, tpr, _ = roc_curve(truth, score)
        precision, recall, _ = precision_recall_curve(truth, score)
        roc.plot(fpr, tpr, label=name)
        pr.plot(recall, precision, label=name)
    # From one ID image on, as most detectors worth a look differ left of a tenth alone.
    roc.set(
        xscale="log",
        xlim=(1 / len(scores["id"]), 1),
        xlabel="false positive rate",
        ylabel="true positive rate",
        title="ROC",
    )
    roc.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    pr.set(xlabel="recall", ylabel="precision", title="precision-recall")
    figure.legend(*pr.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def histograms(scores: Mapping[str, Tensor], ax: Axes | None = None) -> Figure:
    """Scores of each set, larger = more OOD (the paper's Figures 5 and 6, bottom), and the line that 5 % of ID images exceed."""
    ax = _axes(ax, 10, 3.5)
    every = torch.cat(list(scores.values()))
    edges = np.linspace(float(every.quantile(0.001)), float(every.quantile(0.999)) + 1e-6, 60)
    for name, values in scores.items():
        ax.hist(
            values.numpy(),
            edges.tolist(),
            density=True,
            histtype="stepfilled" if name == "id" else "step",
            alpha=0.4 if name == "id" else 1,
            label=name,
        )
    if len(scores["id"]) >= calibration_size(FALSE_ALARM):
        line = float(conformal_threshold(scores["id"], FALSE_ALARM))
        ax.axvline(
            line,
            color="k",
            linewidth=0.8,
            linestyle=":",
            label=f"line at {line:.2f}: above it {FALSE_ALARM:.0%} of ID images",
        )
    ax.set(xlabel="score (larger = more OOD)", ylabel="density")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=8)
    return _figure(ax)


def decided(
    examples: Mapping[str, Tensor],
    decisions: Mapping[str, Decision],
    names: Sequence[str],
    most: int = 5,
) -> Figure:
    """Accepted images of each set at the left, rejected ones at the right, each with its label, level and score; red where the set says it is wrong.

    Arguments:
        examples: uint8 ``(M, C, S, S)`` by set; the one called ``id`` is ID.
        decisions: Of the images, by set.
        names: Of the ID classes.
        most: Images of a set on each side.
    """
    figure = Figure(figsize=(2.4 * most, 1.45 * len(examples) + 0.4), layout="constrained")
    grid = figure.subplots(len(examples), 2 * most, squeeze=False)
    for line, (name, x) in zip(grid, examples.items(), strict=True):
        decision = decisions[name]
        for side, which in enumerate((decision.level == 0, decision.level > 0)):
            cells = line[side * most : (side + 1) * most]
            for ax in cells:
                ax.axis("off")
            found = which.nonzero().flatten()
            for ax, row in zip(
                cells,
                found[torch.linspace(0, len(found) - 1, min(most, len(found))).long()].tolist(),
                strict=False,
            ):
                ax.imshow(
                    x[row].permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255
                )
                said = f"{names[int(decision.label[row])]}\n{LEVELS[int(decision.level[row])]}, {float(decision.score[row]):.1f}"
                ax.set_title(
                    said, fontsize=6, color="tab:red" if (name == "id") == bool(side) else "k"
                )
            if not which.any():
                cells[0].text(
                    0.5,
                    0.5,
                    f"none {('accepted', 'rejected')[side]}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="gray",
                )
        line[0].text(
            -0.1,
            0.5,
            name,
            rotation=90,
            ha="right",
            va="center",
            fontsize=8,
            transform=line[0].transAxes,
        )
    return figure


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as an aligned Markdown table; numbers as given, columns in the order of the first row."""
    columns = list(rows[0])
    cells = [columns, *([str(row.get(c, "-")) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


WORDS = (
    "Percent. AUROC: how often an OOD image scores above an ID image; 50 is chance.",
    "FPR@95: ID images that are rejected where 95 % of the OOD images are.",
    "In garbage: rejected by the garbage class (level 1), without a threshold. ID rejected: by the garbage class or by uncertainty (level 2),",
    "before any threshold on the score.",
)
"""What the columns of the tables are."""


def id_rows(methods: Mapping[str, Mapping]) -> list[dict[str, object]]:
    """A row for each method, in percent: what it does to ID test images."""
    keys = {
        "ID accuracy": "accuracy",
        "ID in garbage": "id_garbage_rate",
        "ID rejected": "id_rejected",
    }
    return [
        {
            "method": label,
            **{
                name: f"{100 * numbers[key]:.2f}" if key in numbers else "-"
                for name, key in keys.items()
            },
        }
        for label, numbers in methods.items()
    ]


def ood_rows(methods: Mapping[str, Mapping]) -> list[dict[str, object]]:
    """A row for each method, score and OOD set, in percent."""
    return [
        {
            "method": label if score == "score" else f"{label}, {score}",
            "OOD": name,
            "AUROC": f"{100 * m['auroc']:.2f}",
            "FPR@95": f"{100 * m['fpr95']:.2f}",
            "in garbage": f"{100 * numbers['garbage_rate'][name]:.1f}"
            if "garbage_rate" in numbers
            else "-",
        }
        for label, numbers in methods.items()
        for score, sets in numbers["scores"].items()
        for name, m in sets.items()
    ]


def tables(methods: Mapping[str, Mapping]) -> str:
    """Both as text."""
    return f"{table(id_rows(methods))}\n\n{table(ood_rows(methods))}"


def worst_validation(numbers: Mapping) -> str:
    """A line on the validation set that is told worst, which settings are chosen by; nothing where there is none."""
    found = [
        (of["auroc"], name, label)
        for label, sets in list(numbers["scores"].items())[:1]
        for name, of in sets.items()
        if name.startswith("val:")
    ]
    if not found:
        return ""
    auroc, name, label = min(found)
    return (
        f"worst validation set: {name.removeprefix('val:')}, AUROC {100 * auroc:.1f} by {label}\n"
    )


def decides(numbers: Mapping) -> str:
    """A line on what ``tie-ext score`` decides by, where that is not the rule of the first table."""
    if COMBINED not in numbers["scores"]:
        return ""
    return (
        f"tie-ext score decides by the combined score, with a threshold that rejects at most {FALSE_ALARM:.0%} of new ID images on average "
        "(another: --false-alarm); the first table is of the network's own rule\n"
    )


def idle(log: Sequence[Mapping]) -> str:
    """A line where no epoch excluded a candidate, as the loop then adds nothing to what the pool began with; nothing where one did, or none was
    proposed, as without synthesizers."""
    taus = [entry["tau"] for entry in log if entry["tau"] is not None]
    if (
        not taus
        or any(sum(entry["excluded"]) for entry in log)
        or not any(sum(entry["proposed"]) for entry in log)
    ):
        return ""
    return (
        f"no candidate was uncertain enough to become garbage in any epoch: tau was at least {min(taus):.2f}, and uncertainty is at most 1. "
        "The network is not sure enough of its training images: train it longer, or give a smaller --lam\n"
    )


def write_report(folder: Path) -> Path:
    """Draw all figures of a run into ``RUN/figures`` and put them, the table and the settings on ``RUN/report.html``.

    Returns:
        The page, which needs no other file and no network.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If no epoch of it is finished, or a file is damaged, foreign or of another run.
        OSError: If a file cannot be written.
    """
    folder = Path(folder)
    record = read_record(folder)
    snapshots = load_snapshots(folder)
    if not snapshots:
        raise ValueError(
            f"Expected a run with at least one finished epoch at {folder}, but got none"
        )
    net = load_network(folder)
    names = [*(net.class_names or map(str, range(net.num_classes))), "garbage"]
    with reading(f"a run whose files are of one network at {folder}"):
        log = (
            []
            if attached(folder)
            else load_state(folder / "training.safetensors", "training", ("log",))["log"]
        )
        _check_outputs(
            folder, snapshots, [asdict(EpochLog.of_record(entry)) for entry in log], len(names)
        )
        results, figures = _results(record), _figures(folder, net, record, snapshots, log, names)
        body = [
            written(folder, name, caption, figure) for name, (caption, figure) in figures.items()
        ]
        page = _PAGE.format(
            title=html.escape(folder.resolve().name),
            table=results,
            figures="\n".join(body),
            settings=_settings(record),
        )
    write_atomically(folder / "report.html", page.encode())
    return folder / "report.html"


def _check_outputs(
    folder: Path,
    snapshots: Mapping[int, Mapping[str, Tensor]],
    log: Sequence[Mapping],
    outputs: int,
) -> None:
    """Refuse pictures and logs of a network with another number of outputs."""
    for epoch, snapshot in snapshots.items():
        if (
            len(snapshot.get("inversions", range(outputs))) != outputs
            or int(snapshot["labels"].max()) >= outputs
        ):
            raise ValueError(
                f"Expected pictures of {outputs} outputs in epoch {epoch} of {folder}, but got those of another network"
            )
    if not (log or attached(folder)) or any(len(entry["proposed"]) != outputs for entry in log):
        raise ValueError(
            f"Expected a log of {outputs} outputs at {folder}, but got none or that of another network"
        )


def _figures(
    folder: Path,
    net: TIENet,
    record: Mapping,
    snapshots: Mapping,
    log: Sequence[Mapping],
    names: Sequence[str],
) -> dict[str, tuple[str, Figure]]:
    """Caption and figure by name."""
    figures: dict[str, tuple[str, Figure]] = {}
    last = snapshots[max(snapshots)]
    if "inversions" in last:
        figures["inversions"] = (
            "Inversions over the epochs: what each class looks like to the network",
            inversions_over_epochs(snapshots, names),
        )
        figures["inversion_grid"] = (
            "Inversions after the last epoch",
            inversion_grid(last["inversions"], names),
        )
    for i, name in enumerate(record["settings"].get("recipe", {}).get("synthesizers", ())):
        if f"outliers_{i}" in last and name in SYNTHESIZERS:
            row = inversion_grid(last[f"outliers_{i}"][None], [""])
            figures[f"outliers_{name}"] = (
                f"Outliers that {name} proposes after the last epoch",
                row,
            )
    if attached(folder) and "outliers_0" in last:
        figures["outliers_procedural"] = (
            "Some of the outliers that the garbage class was taught with",
            inversion_grid(last["outliers_0"][None], [""]),
        )
    if log:
        caption = "Proposed outliers by the output they were aimed at: entropy, confidence, margin, uncertainty"
        if said := idle(log):
            caption += f"; {said.strip()}"
        figures["metrics"] = (caption, metric_curves(log, names))
    figures["features"] = (
        "Features of test images and garbage (t-SNE)",
        feature_map(snapshots, names),
    )
    if (folder / "scores.safetensors").is_file():
        if examples := load_examples(folder):
            decide = decider(net, folder)
            decisions = {
                name: decide(net.from_unit(x.float() / 255)) for name, x in examples.items()
            }
            figures["examples"] = (EXAMPLES, decided(examples, decisions, names))
        for label, scores in load_scores(folder / "scores.safetensors").items():
            figures[f"curves_{label}"] = (
                f"{label}: ROC and precision-recall, OOD positive",
                roc_and_pr(scores),
            )
            figures[f"scores_{label}"] = (f"{label}: scores", histograms(scores))
    return figures


def written(folder: Path, name: str, caption: str, figure: Figure) -> str:
    """Write a figure, and give it as HTML."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, bbox_inches="tight")
    write_atomically(folder / "figures" / f"{name}.png", picture.getvalue())
    source = base64.b64encode(picture.getvalue()).decode()
    caption = html.escape(caption)
    return f'<figure><img alt="{caption}" src="data:image/png;base64,{source}"><figcaption>{caption}</figcaption></figure>'


def _results(record: Mapping) -> str:
    methods = _methods(record)
    if not methods:
        return "<p>The run has not reached its last epoch; there are no test scores yet.</p>"
    decided = "".join(decides(numbers) for numbers in list(methods.values())[:1])
    return f"{_html(id_rows(methods))}<br>{_html(ood_rows(methods))}<p>{html.escape(' '.join((*WORDS, decided)))}</p>"


def _html(rows: Sequence[Mapping[str, object]]) -> str:
    head = "".join(f"<th>{html.escape(c)}</th>" for c in rows[0])
    lines = [
        "<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row.values()) + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def _methods(record: Mapping) -> Mapping[str, Mapping]:
    if "comparison" in record:
        return record["comparison"]
    label = OWN["weights" in record["settings"] and "recipe" not in record["settings"]]
    return {label: record["numbers"]} if "numbers" in record else {}


def _settings(record: Mapping) -> str:
    return html.escape(
        json.dumps(
            {k: v for k, v in record.items() if k not in ("log", "numbers", "comparison")},
            indent=1,
        )
    )


EXAMPLES = (
    "Test images as the run decides on them: accepted ones at the left, rejected ones at the right, with the nearest class, the decision "
    "(garbage: level 1; uncertain: level 2, or above the line) and the score. Red: an OOD image that is accepted, or an ID image that is rejected."
)
PAGE_STYLE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>TIE: {title}</title><style>
:root{{color-scheme:light dark}}body{{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}}
table{{border-collapse:collapse;display:block;overflow-x:auto}}td,th{{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}}
td:nth-child(-n+2),th:nth-child(-n+2){{text-align:left}}figure{{margin:1.5rem 0}}img{{max-width:100%}}
figcaption{{color:#555}}pre{{background:#f5f5f5;padding:1rem;overflow:auto}}
@media(max-width:40rem){{td,th{{padding:.2rem .35rem;font-size:13px}}}}
@media(prefers-color-scheme:dark){{body{{background:#111;color:#ddd}}td,th{{border-color:#333}}figcaption{{color:#aaa}}pre{{background:#1c1c1c}}}}
</style></head><body>"""
"""Where a page begins: in the colours that the reader's system is set to; what is too wide for a narrow window scrolls by itself."""
_PAGE = (
    PAGE_STYLE
    + """
<h1>{title}</h1>{table}{figures}<h2>Settings</h2><pre>{settings}</pre></body></html>
"""
)
