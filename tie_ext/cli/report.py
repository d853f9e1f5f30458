"""``tie-ext report``: figures, tables and settings of a run on one HTML page."""

import base64
import html
import io
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from tie_ext.cli import figures
from tie_ext.cli.batches import scaled
from tie_ext.cli.folder import OWN, is_attached, load_decision, load_scores, read_record
from tie_ext.cli.snapshots import load_examples, load_snapshots
from tie_ext.cli.tables import WORDS, decides, id_rows, idle, ood_rows
from tie_ext.outliers import SYNTHESIZERS
from tie_ext.utils.files import load_state, reading, write_atomically

Snapshots = Mapping[int, Mapping[str, Tensor]]


def run(flags: Namespace) -> None:
    """Write the page, and print its path."""
    print(write_report(flags.run))


def write_report(folder: Path) -> Path:
    """Write all figures of a run to ``RUN/figures``, and ``RUN/report.html`` with figures, table
    and settings.

    Returns:
        The page, which needs no other file and no network.

    Raises:
        FileNotFoundError: If the folder holds no run.
        ValueError: If no epoch of it is finished, or a file is damaged, foreign or of another run.
        OSError: If a file cannot be written.
    """
    record, snapshots = read_record(folder), load_snapshots(folder)
    if not snapshots:
        raise ValueError(
            f"Expected a run with at least one finished epoch at {folder}, but got none"
        )
    with reading(f"a run whose files are of one network at {folder}"):
        log = [] if is_attached(record) else _read_log(folder)
        results, parts = _results(record), dict(_figures(folder, record, snapshots, log))
    title = html.escape(folder.resolve().name)
    written = [write_figure(folder, name, *part) for name, part in parts.items()]
    settings = {k: v for k, v in record.items() if k not in ("log", "numbers", "comparison")}
    body = [f"<h1>{title}</h1>", results, *written, "<h2>Settings</h2>"]
    body.append(f"<pre>{html.escape(json.dumps(settings, indent=1))}</pre>")
    return write_page(folder / "report.html", title, body)


def _read_log(folder: Path) -> list[dict]:
    log = load_state(folder / "training.safetensors", "training", ("log",))["log"]
    if not log:
        raise ValueError(f"Expected a log of a finished epoch at {folder}, but got none")
    return log


def _figures(
    folder: Path, record: Mapping, snapshots: Snapshots, log: Sequence[Mapping]
) -> Iterator[tuple[str, tuple[str, Figure]]]:
    """Name, caption and figure."""
    net, decide = load_decision(folder)
    names = [*(net.class_names or map(str, range(net.num_classes))), "garbage"]
    last = snapshots[max(snapshots)]
    if "inversions" in last:
        caption = "Inversions over the epochs: what each class looks like to the network"
        yield "inversions", (caption, figures.inversions_over_epochs(snapshots, names))
        grid = figures.inversion_grid(last["inversions"], names)
        yield "inversion_grid", ("Inversions after the last epoch", grid)
    for name, caption, key in _outliers(record):
        if key in last:
            yield f"outliers_{name}", (caption, figures.inversion_grid(last[key][None], [""]))
    if log:
        caption = (
            "Proposed outliers by the output they were aimed at: entropy, confidence, margin, "
            f"uncertainty; {idle(log)}"
        )
        yield "metrics", (caption.strip("; \n"), figures.metric_curves(log, names))
    caption = "Features of test images and garbage (t-SNE)"
    yield "features", (caption, figures.feature_map(snapshots, names))
    if not (folder / "scores.safetensors").is_file():
        return
    if examples := load_examples(folder):
        decisions = {name: decide(scaled(x, net)) for name, x in examples.items()}
        yield "examples", (EXAMPLES, figures.decision_grid(examples, decisions, names))
    for label, scores in load_scores(folder / "scores.safetensors").items():
        caption = f"{label}: ROC and precision-recall, OOD positive"
        yield f"curves_{label}", (caption, figures.roc_and_pr(scores))
        yield f"scores_{label}", (f"{label}: scores", figures.histograms(scores))


def _outliers(record: Mapping) -> list[tuple[str, str, str]]:
    """Name, caption and key in a snapshot of the outliers of each synthesizer."""
    if is_attached(record):
        caption = "Some of the outliers that the garbage class was fitted to"
        return [("procedural", caption, "outliers_0")]
    synthesizers = record["settings"].get("recipe", {}).get("synthesizers", ())
    return [
        (name, f"Outliers that {name} proposes after the last epoch", f"outliers_{i}")
        for i, name in enumerate(synthesizers)
        if name in SYNTHESIZERS
    ]


def _results(record: Mapping) -> str:
    own = {OWN[is_attached(record)]: record["numbers"]} if "numbers" in record else {}
    methods = record.get("comparison", own)
    if not methods:
        return "<p>The run has not reached its last epoch; there are no test scores yet.</p>"
    words = html.escape(" ".join((*WORDS, decides(next(iter(methods.values()))))))
    return f"{_table(id_rows(methods))}<br>{_table(ood_rows(methods))}<p>{words}</p>"


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    cells = [[f"<th>{html.escape(c)}</th>" for c in rows[0]]]
    cells += [[f"<td>{html.escape(str(v))}</td>" for v in row.values()] for row in rows]
    lines = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f"<table>{lines}</table>"


def write_figure(folder: Path, name: str, caption: str, figure: Figure) -> str:
    """Write a figure to ``RUN/figures``, and give it as HTML."""
    png, caption = io.BytesIO(), html.escape(caption)
    figure.savefig(png, format="png", dpi=110, bbox_inches="tight")
    write_atomically(folder / "figures" / f"{name}.png", png.getvalue())
    source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return (
        f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'
    )


def write_page(path: Path, title: str, body: Sequence[str]) -> Path:
    """Write an HTML page that needs no other file; gives its path."""
    head = PAGE_STYLE.format(title=title)
    write_atomically(path, "\n".join([head, *body, "</body></html>"]).encode())
    return path


EXAMPLES = (
    "Test images and the run's decisions: accepted ones at the left, rejected ones at the right, "
    "with the nearest class, the decision (garbage: level 1; uncertain: level 2, or above the "
    "threshold) and the score. Red: an OOD image that is accepted, or an ID image that is "
    "rejected."
)
PAGE_STYLE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<title>TIE: {title}</title><style>
:root{{color-scheme:light dark}}
body{{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0
1rem;color:#222}} table{{border-collapse:collapse;display:block;overflow-x:auto}}
td,th{{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}}
td:nth-child(-n+2),th:nth-child(-n+2){{text-align:left}}
figure{{margin:1.5rem 0}}img{{max-width:100%}}figcaption{{color:#555}}
pre{{background:#f5f5f5;padding:1rem;overflow:auto}}
@media(max-width:40rem){{td,th{{padding:.2rem .35rem;font-size:13px}}}}
@media(prefers-color-scheme:dark){{body{{background:#111;color:#ddd}}td,th{{border-color:#333}}
figcaption{{color:#aaa}}pre{{background:#1c1c1c}}}}
</style></head><body>"""
"""The start of a page, in the reader's colours; wide parts scroll by themselves."""
