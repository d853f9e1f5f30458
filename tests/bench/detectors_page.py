"""docs/research/detectors.md, of the records of detectors.py, and the evidence in patches/pytorch-ood/; tables.py writes them."""

import json
from pathlib import Path
from statistics import mean

import benchmark_page
from attached_page import CALLED
from detectors import IMAGES, OURS, TIMED
from page import percent

from tie_ext.cli.tables import table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "detectors"
PATCHES = ROOT / "patches" / "pytorch-ood"
MARKED = f"Detectors marked \\* read the images themselves; being slow, they are tested on {TIMED} images of each set, drawn once.\n"
BEST = 10
"""Detectors of theirs in the evidence of the patch."""
HEAD = """# pytorch-ood's detectors beside ours, on one network

Made by `python tests/bench/tables.py` of the records in `docs/results/detectors/`. {data}, {images} training images, {epochs} epochs, {backbone},
seed {seeds}; the network of [attached.md](attached.md) with its garbage head, which leaves the ID logits as they are. AUROC and FPR@95 against all
ID test images, mean over the OOD test sets
({sets});
worst: the set with the lowest mean AUROC. Percent, mean ± standard deviation over the seeds; sorted by mean AUROC. Seconds: processor time
of 1000 images by the detector's own `predict`, the network's forward pass included (mean; on a core that other programs shared, so that rows can
be compared with each other only).

{commands}

Every detector has pytorch-ood's default settings, also where users choose them on validation data. Two have a setting without a default: DICE's
p is 0.9, as OpenOOD has it, and ViM's d half the features. GradNorm and GradUncertainty take the last layer's gradients, as pytorch-ood's examples
do. KLMatching and TemperatureScaling are fitted on held-out ID images, all others on the training images. Ours are in bold: TIEDetector reads
the garbage head, Combined is of TIEDetector, ViM and GEN (as `combine` was then; it has KNN now), and the other three read the plain network.
"""


def records() -> list[dict]:
    """Records of all seeds."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-seed*.json"))]


def rows(of: list[dict]) -> list[dict]:
    """A row for each detector that fits the network, best first."""
    found = []
    for name in of[0]["detectors"]:
        runs = [record["detectors"].get(name, {}) for record in of]
        if not all("sets" in run for run in runs):
            continue
        sets = runs[0]["sets"]
        auroc = [mean(run["sets"][ood]["auroc"] for ood in sets) for run in runs]
        worst = min(sets, key=lambda ood: mean(run["sets"][ood]["auroc"] for run in runs))
        row = {
            "detector": (f"**{name}**" if name in OURS else name)
            + ("\\*" if "images" in runs[0] else ""),
            "mean AUROC": percent(auroc),
            "worst AUROC": f"{percent([run['sets'][worst]['auroc'] for run in runs])} ({CALLED.get(worst, worst)})",
            "mean FPR@95": percent(
                [mean(run["sets"][ood]["fpr95_id"] for ood in sets) for run in runs]
            ),
            "seconds": f"{mean(run['seconds'] for run in runs):.2f}",
        }
        found.append((mean(auroc), row))
    return [row for _, row in sorted(found, key=lambda pair: -pair[0])]


def not_everywhere(name: str, of: list[dict]) -> str:
    """Why a detector that reads images has no row, and what it cost where it was run."""
    runs = [record["detectors"][name] for record in of if name in record["detectors"]]
    cost = [
        f"{run['seconds']:.1f} s for 1000 images" if "seconds" in run else run["reason"]
        for run in runs
    ]
    return (
        f"reads the images themselves, and has been run on {len(runs)} of {len(of)} networks"
        + "".join(f" ({one})" for one in cost)
    )


def page() -> str:
    """The page; empty where there are no records yet."""
    of = records()
    if not of:
        return ""
    sets = next(run["sets"] for run in of[0]["detectors"].values() if "sets" in run)
    said = {key: of[0][key] for key in ("data", "images", "epochs", "backbone")}
    commands = "\n".join(f"    python tests/bench/{record['command']}" for record in of)
    seeds = ", ".join(str(record["seed"]) for record in of)
    text = HEAD.format(
        **said,
        seeds=seeds,
        sets=", ".join(CALLED.get(name, name) for name in sets),
        commands=commands,
    )
    reasons = {
        name: run["reason"]
        for record in of
        for name, run in record["detectors"].items()
        if "reason" in run
    }
    reasons |= {
        name: not_everywhere(name, of)
        for name in IMAGES
        if any(name not in record["detectors"] for record in of)
    }
    missing = "\n".join(f"- {name}: {reason.strip()}" for name, reason in reasons.items())
    shown = table(rows(of))
    parts = [text + (MARKED if "\\*" in shown else ""), shown, ""]
    return "\n".join([*parts, "Not in the table:\n", missing, ""] if reasons else parts)


def pull_requests() -> dict[str, str]:
    """The texts of the pull requests by their place in docs/, each with its evidence."""
    texts = {}
    if of := records():
        every = rows(of)
        theirs = [row for row in every if not row["detector"].startswith("**")][:BEST]
        head = [
            {**row, "detector": "TIE"} for row in every if row["detector"] == "**TIEDetector**"
        ]
        columns = [{key: row[key] for key in row if key != "seconds"} for row in head + theirs]
        texts["0001-TIE-detector.md"] = table(columns)
    if combined := benchmark_page.pull_request():
        texts["0002-Combined-detector.md"] = combined
    return {
        f"../patches/pytorch-ood/{name}": _filled(PATCHES / name, evidence)
        for name, evidence in texts.items()
    }


def _filled(path: Path, evidence: str) -> str:
    """The file with its evidence between its two comments."""
    lines = path.read_text().split("\n")
    start = next(
        i for i, line in enumerate(lines) if line.startswith("<!-- tests/bench/tables.py")
    )
    end = lines.index("<!-- and ends here -->")
    return "\n".join([*lines[: start + 1], *evidence.rstrip("\n").split("\n"), *lines[end:]])
