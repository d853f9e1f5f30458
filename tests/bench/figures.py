"""The paper's Figures 2 to 6 from runs of `tie-ext train`, into docs/research/figures.md, docs/figures/ and docs/results/figures/.

python tests/bench/figures.py RUN [RUN ...]
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from tie_ext.cli.report import write_report
from tie_ext.cli.tables import table

DOCS = Path(__file__).parents[2] / "docs"
SHOWN = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR@95"}
CAPTIONS = {
    "inversions": "Figure 2: inversions of each class (rows) over the epochs (columns), garbage last",
    "metrics": "Figure 3: entropy, confidence, top-1 margin and UE of the inversions, by the output they were aimed at",
    "features": "Figure 4: t-SNE of the features of ID test images and of garbage, over the epochs",
    "curves_TIE": "Figure 5: ROC and precision-recall of the score",
    "scores_TIE": "Figure 6: histograms of the score",
}


def section(run: Path) -> str:
    """Figures and numbers of one run; the pictures are copied."""
    record = json.loads((run / "run.json").read_text())
    write_report(run)
    s, data, config = (
        record["settings"],
        record["settings"]["data"],
        record["settings"]["recipe"]["config"],
    )
    about = f"{data}, {s['images'] or 'all'} training images, {s['backbone']}, {config['epochs']} epochs, seed {config['seed']}"
    numbers, command = (
        record["numbers"],
        re.sub(r"--out \S+", "--out RUN", record["command"].replace(str(s["root"]), "DATA")),
    )
    rows = [
        {
            "OOD": name,
            "garbage rate": 100 * rate,
            **{title: 100 * numbers["scores"]["score"][name][key] for key, title in SHOWN.items()},
        }
        for name, rate in numbers["garbage_rate"].items()
        if name in numbers["scores"]["score"]
    ]
    parts = [
        f"## {data}\n\n    {command}\n\n{about}; commit {record['commit'][:7]}, torch {record['versions']['torch']}. "
        f"ID accuracy {100 * numbers['accuracy']:.2f} %; of the score, in percent:\n",
        table(
            [
                {
                    key: value if isinstance(value, str) else f"{value:.2f}"
                    for key, value in row.items()
                }
                for row in rows
            ]
        ),
        "",
    ]
    kept = {name: of for name, of in record.items() if name != "log"} | {"command": command}
    (DOCS / "results" / "figures" / f"{data}.json").write_text(
        json.dumps(kept, indent=1).replace(str(s["root"]), "DATA")
    )
    for name, caption in CAPTIONS.items():
        shutil.copyfile(run / "figures" / f"{name}.png", DOCS / "figures" / f"{data}_{name}.png")
        parts.append(f"### {caption}\n\n![{caption}](../figures/{data}_{name}.png)\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    head = (
        "# The paper's Figures 2 to 6\n\n"
        "What a run of TIE looks like from inside: its inversions, how sure the network is of them, and how its scores lie. Made by `python\n"
        "tests/bench/figures.py RUN ...` after the commands below, at the commit named; `docs/results/figures/` has what the runs recorded.\n"
        "Words: [glossary](../method.md#glossary).\n"
    )
    (DOCS / "research" / "figures.md").write_text(
        "\n".join([head, *map(section, parser.parse_args().runs)])
    )


if __name__ == "__main__":
    main()
