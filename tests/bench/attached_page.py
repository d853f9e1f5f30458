"""docs/research/attached.md, of the records of attached.py and combined.py; tables.py writes it."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from page import percent
from processed import PROCESSED

from tie_ext.cli.tables import table
from tie_ext.utils.files import read_json_lines

AS_THEY_ARE = "head, images as they are"
SAMPLED = "KNN of 5000"
TEACHERS = {"head": "procedural", AS_THEY_ARE: "procedural; ID images only as they are"}
"""What a table calls what taught a head."""
WITH_PROCESSED = (
    "ID images processed another way, percent rejected: in garbage, and above a line that 5 % of the held-out images pass. A head that saw none\n"
    "is taught by the ID images as they are alone:\n"
)
BEFORE = "Measured before the head was taught processed images."
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "attached"
CALLED = {
    "tinyimagenet": "TinyImageNet",
    "gaussian": "Gaussian noise",
    "uniform": "uniform noise",
    "notmnist": "letters (notMNIST)",
}


COMBINED = RESULTS / "combined.json"
LATER = RESULTS / "combined_later.json"
"""The same combinations on networks that were trained after they had been chosen."""
NEAR = {"cifar10": ("val:tinyimagenet",), "cifar100": ("val:tinyimagenet",)}
"""Validation sets that no outlier from nothing is near."""


FRONT = {
    "attach, combined": "the trained network, ID images, minutes",
    "head": "the same",
    "ViM": "the trained network, ID images",
    "KNN": "the same",
    "Mahalanobis++": "the same",
    "GEN": "the trained network",
    "energy": "the same",
    "MSP": "the same",
}
"""Rows of the table in README, and what each needs."""
FAR_AND_NEAR = {
    "far: mean (worst)": ("mnist", "fashionmnist", "notmnist", "gaussian", "uniform"),
    "near: mean (worst)": ("cifar100", "tinyimagenet"),
}


SHOWN = ("cifar10", 45000, 100, "resnet18_32x32")
"""The networks of that table; the words above it say so."""
GREY = ("mnist", "fashionmnist")
"""What the line below that table tells of."""


def combined_runs() -> dict[str, dict]:
    """What GEN, KNN and the head were judged at together, by network; empty where there is no record yet."""
    records = [
        json.loads(path.read_text())["judged"] for path in (COMBINED, LATER) if path.exists()
    ]
    judged = [record["combine" if "combine before" in record else "chosen"] for record in records]
    assert all({"GEN", "head"} < set(of["members"]) and of["rule"] == "stouffer" for of in judged)
    return {name: found for of in judged for name, found in of["runs"].items()}


def _others(labels: Iterable[str]) -> list[str]:
    """The hosts' detectors among the scores."""
    return [
        label
        for label in labels
        if not label.startswith(("head", "combined")) and label != SAMPLED
    ]


def front() -> str:
    """The table in README, and what there is to say of other data."""
    runs, records = combined_runs(), groups()[SHOWN]
    stems = [record["network"] for record in records]
    rows = []
    for label, needs in FRONT.items():
        combined = label == "attach, combined"
        scores = (
            [runs[stem]["sets"] for stem in stems]
            if combined
            else [record["numbers"]["scores"][label] for record in records]
        )
        row = {
            "method": "attach, head alone" if label == "head" else label,
            "what it needs": needs,
        }
        row["ID accuracy"] = percent([record["accuracy"] for record in records])
        for column, names in FAR_AND_NEAR.items():
            of = [mean(score[name]["auroc"] for score in scores) for name in names]
            row[column] = f"{100 * mean(of):.1f} ({100 * min(of):.1f})"
        rows.append(row)
    shares = [
        [record["numbers"]["garbage_rate"]["head"] for record in found]
        for (name, *_), found in groups().items()
        if name in GREY
    ]
    least = min(mean(rate[of] for rate in rates) for rates in shares for of in _tests(rates[0]))
    of_id = max(mean(rate["id"] for rate in rates) for rates in shares)
    return (
        f"{table(rows)}\n\nOn MNIST and FashionMNIST ({min(map(len, shares))} seeds) the garbage class takes {math.floor(100 * least)} % or more of\n"
        f"every OOD test set without any threshold, and at most {math.ceil(1000 * of_id) / 10:.1f} % of the ID images.\n"
    )


def facts() -> dict[str, str]:
    """Numbers in the text of results.md, by the names they have there."""
    known, runs = groups(), combined_runs()
    before = json.loads(LATER.read_text())["judged"]["combine before"]["runs"]
    shown, stems = known[SHOWN], [record["network"] for record in known[SHOWN]]
    rates = [record["numbers"]["garbage_rate"]["head"] for record in shown]
    full = [
        100 * mean(record["accuracy"] for record in known[key])
        for key in known
        if key[:2] == SHOWN[:2]
    ]

    def level_1(name: str) -> str:
        return f"{100 * mean(rate[name] for rate in rates):.{1 if name == 'id' else 0}f}"

    def auroc(judged: dict[str, dict], names: Sequence[str]) -> float:
        return mean(judged[stem]["sets"][name]["auroc"] for stem in stems for name in names)

    def loss(name: str, stem: str | None = None, among: Sequence[dict] = shown) -> float:
        """How much better the best single score is, on one network or in the mean."""
        of = [record for record in among if stem in (None, record["network"])]
        best = max(
            mean(r["numbers"]["scores"][label][name]["auroc"] for r in of)
            for label in _others(of[0]["numbers"]["scores"])
        )
        return 100 * (best - mean(runs[r["network"]]["sets"][name]["auroc"] for r in of))

    far, near = FAR_AND_NEAR.values()
    noise = ("gaussian", "uniform")
    smaller, hundred = (
        known[data, 45000, epochs, "airbench"]
        for data, epochs in (("cifar10", 10), ("cifar100", 6))
    )
    behind = [loss(name, among=hundred) for name in ("cifar10", "tinyimagenet")]
    ahead = [-loss(name, among=hundred) for name in ("mnist", "fashionmnist", "notmnist")]
    return {
        **{
            f"level 1: {name}": level_1(name)
            for name in ("mnist", "fashionmnist", "notmnist", "id")
        },
        "noise: mean loss": f"{max(map(loss, noise)):.1f}",
        "noise: worst loss": f"{max(loss(name, stem) for name in noise for stem in stems):.1f}",
        "near: least gain": f"{min(-loss(name) for name in near):.1f}",
        "near: most gain": f"{max(-loss(name) for name in near):.1f}",
        **{
            f"combine: {word}": f"{100 * auroc(runs, names):.1f}"
            for word, names in (("far", far), ("near", near))
        },
        **{
            f"with ViM: {word}": f"{100 * auroc(before, names):.1f}"
            for word, names in (("far", far), ("near", near))
        },
        "airbench: accuracy": percent([record["accuracy"] for record in smaller], 1),
        "cifar10: accuracies": f"{min(full):.0f} to {max(full):.0f}",
        "cifar100: accuracy": percent([record["accuracy"] for record in hundred], 1),
        "cifar100: behind": f"{min(behind):.0f} to {max(behind):.0f}",
        "cifar100: ahead": f"{min(ahead):.0f} to {max(ahead):.0f}",
    }


def groups() -> dict[tuple, list[dict]]:
    """Records of all seeds by data, training images, epochs and backbone."""
    found: dict[tuple, list[dict]] = defaultdict(list)
    for record in read_json_lines(RESULTS / "networks.jsonl", "a network"):
        found[
            record["data"], record["images"]["train"], record["epochs"], record["backbone"]
        ].append(record)
    return found


def page() -> str:
    """The page; empty where there are no records yet."""
    if not groups():
        return ""
    head = (
        "# Attach: what a garbage head tells\n\n"
        "Made by `python tests/bench/tables.py` of the records in `docs/results/attached/`, which hold their commands. A plain network is\n"
        "trained, and stays as it is; a head that reads every layer is taught by procedural images. No OOD image was seen in training.\n"
        "In commands DATA is where the images lie, and WORK where networks and scores are kept.\n"
        "Percent; mean ± standard deviation over the seeds where there are several. In garbage: rejected at level 1, without a threshold.\n"
        "Best other: the highest AUROC of the hosts' detectors on the same network, chosen by looking at this very column.\n"
    )
    parts = [head]
    for (data, images, epochs, backbone), records in groups().items():
        seeds = ", ".join(str(record["seed"]) for record in records)
        parts.append(f"## {data}, {images} images, {epochs} epochs, {backbone}, seed {seeds}\n")
        accuracy = percent([record["accuracy"] for record in records])
        of_id = percent([record["numbers"]["garbage_rate"]["head"]["id"] for record in records])
        seconds = mean(record["seconds"]["head"] for record in records)
        places = {(record["processor"], record["threads"]) for record in records}
        place = " or ".join(
            f"{processor}, {threads} thread{'s' if threads > 1 else ''}"
            for processor, threads in sorted(places)
        )
        parts.append(
            f"ID accuracy {accuracy}, that of the plain network. ID images in garbage: {of_id}. The head took {seconds:.0f} s ({place}).\n"
        )
        if all(record.get("scoring_dtype") == "bfloat16" for record in records):
            parts.append("Backbones computed in bfloat16, for all detectors alike.\n")
        parts += [*(f"    python tests/bench/{record['command']}" for record in records), ""]
        parts += [
            table(_columns(records)),
            "",
            "What teaches the head:\n",
            table(_teachers(records)),
            "",
        ]
        processed = all("rejected_at_5" in record["numbers"] for record in records)
        parts += [WITH_PROCESSED, table(_processed(records)), ""] if processed else [BEFORE, ""]
    return "\n".join([*parts, *_combined(), *_joint(), *_search(), *_otherwise()])


def _columns(records: list[dict], wanted: list[str] | None = None) -> list[dict]:
    rows = []
    scores = [record["numbers"]["scores"] for record in records]
    for name in wanted or scores[0]["head"]:
        others = _others(scores[0])
        best = max(others, key=lambda label: mean(of[label][name]["auroc"] for of in scores))
        rows.append(
            {
                "OOD set": _called(name),
                "in garbage": percent(
                    [record["numbers"]["garbage_rate"]["head"][name] for record in records], 1
                ),
                "head: FPR@95": percent([of["head"][name]["fpr95_id"] for of in scores]),
                "head: AUROC": percent([of["head"][name]["auroc"] for of in scores]),
                "best other: AUROC": f"{percent([of[best][name]['auroc'] for of in scores])} ({best})",
            }
        )
    return rows


def _teachers(records: list[dict]) -> list[dict]:
    rows = []
    for label in records[0]["numbers"]["garbage_rate"]:
        rates = [
            record["numbers"]["garbage_rate"][label]
            for record in records
            if label in record["numbers"]["garbage_rate"]
        ]
        tests = _tests(rates[0])
        worst = min(tests, key=lambda name: mean(rate[name] for rate in rates))
        rows.append(
            {
                "outliers": TEACHERS.get(label, label.removeprefix("head, ")),
                "ID in garbage": percent([rate["id"] for rate in rates]),
                "OOD test sets in garbage, mean": percent(
                    [mean(rate[name] for name in tests) for rate in rates], 1
                ),
                "worst": f"{percent([rate[worst] for rate in rates], 1)} ({_called(worst)})",
            }
        )
    return rows


def _tests(rates: Iterable[str]) -> list[str]:
    """Names of the OOD test sets among those of all sets."""
    return [
        name
        for name in rates
        if name not in ("held", "id") and not name.startswith(("val:", PROCESSED))
    ]


def _processed(records: list[dict]) -> list[dict]:
    """A row for each way in which ID test images were processed."""
    rates = [record["numbers"]["garbage_rate"] for record in records]
    at_line = [record["numbers"]["rejected_at_5"] for record in records]
    runs = combined_runs()
    combined = [
        runs[record["network"]]
        for record in records
        if "processed" in runs.get(record["network"], {})
    ]
    rows = []
    for name in ["id", *(name for name in rates[0]["head"] if name.startswith(PROCESSED))]:
        row = {"ID test images": "as they are" if name == "id" else name.removeprefix(PROCESSED)}
        for label in ("head", AS_THEY_ARE):
            known = [rate[label][name] for rate in rates if label in rate]
            said = "head" if label == "head" else "head that saw none"
            row[f"{said}: in garbage"] = percent(known, 1) if known else "-"
            if label == "head":
                row["above its line"] = percent([rate[label][name] for rate in at_line], 1)
        judged = [
            one["false_alarms"] if name == "id" else one["processed"][name] for one in combined
        ]
        rows.append({**row, "combined: above its line": percent(judged, 1) if judged else "-"})
    return [
        {
            column: cell
            for column, cell in row.items()
            if any(other[column] != "-" for other in rows)
        }
        for row in rows
    ]


def judged_rows(path: Path = COMBINED) -> list[dict]:
    """A row for each combination that was chosen, and for single scores; none where there is no record."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    tried = {(tuple(row["members"]), row["rule"]): row for row in record["validation"]}
    rows = []
    for name, of in record["judged"].items():
        key = tuple(of["members"]), of["rule"]
        sets = [m["auroc"] for run in of["runs"].values() for m in run["sets"].values()]
        rows.append(
            {
                "what": name if name != "combine" or not tried else "combine before",
                "members": f"{' + '.join(of['members'])}"
                + (f", {of['rule']}" if len(of["members"]) > 1 else ""),
                **({"validation: worst AUROC": percent([tried[key]["worst"]])} if tried else {}),
                "test: worst, mean": f"{percent([min(sets)])}, {percent([mean(sets)])}",
                "false alarms": percent(
                    [mean(run["false_alarms"] for run in of["runs"].values())]
                ),
            }
        )
    return rows


def _combined() -> list[str]:
    if not COMBINED.exists():
        return []
    record = json.loads(COMBINED.read_text())
    text = (
        f"Every combination of up to three scores, by every rule of `tie_ext.scores.combination`, on {len(record['runs'])} networks:\n"
        f"{', '.join(record['runs'])}; {len(record['validation'])} in all. Of those whose AUROC in the worst\n"
        "validation column is within 0.2 of the best, the highest mean over the validation columns is chosen.\n"
        "*Chosen* is what `tie_ext.combine` had then, but that it kept 5000 training images for KNN, and here KNN has all. *Combine before* is what it\n"
        "had in version 0.2.0: the same rule chose it when there were fewer networks.\n"
        "The OOD test sets were looked at for this table alone. False alarms: ID test images above the threshold that\n"
        f"{percent([record['false_alarm']], 0)} % of them may exceed.\n"
    )
    text_by_set = "GEN, KNN and the head by OOD test set; best single: the highest AUROC of the hosts' detectors, chosen by looking at this very column.\n"
    return [
        "## One score of several\n",
        f"    python tests/bench/{record['command']}\n",
        text,
        table(judged_rows()),
        "",
        *_later(),
        text_by_set,
        table(_by_set(combined_runs())),
        "",
    ]


def _later() -> list[str]:
    if not LATER.exists():
        return []
    record = json.loads(LATER.read_text())
    text = (
        "The same on networks that were trained after that search. *Combine* is what `tie_ext.combine` had then, with 5000 training images for KNN.\n"
        "That it follows the search, and how many images it keeps, was decided when cifar10-45000x10-airbench-seed0 was seen: by validation sets,\n"
        f"but its OOD test sets were on the same screen. Networks: {', '.join(record['runs'])}.\n"
    )
    beside = (
        "Near sets, AUROC, beside the best of all combinations of up to three of the hosts' scores, chosen by looking at that very set on each\n"
        "network:\n"
    )
    return [
        text,
        f"    python tests/bench/{record['command']}\n",
        table(judged_rows(LATER)),
        "",
        beside,
        table(_near(record)),
        "",
    ]


def _near(record: dict) -> list[dict]:
    """A row for each near set of colour images: the combination, and the best one without the head."""
    mine, without = record["judged"]["combine"]["runs"], record["best_without_head"]
    rows = []
    for (data, images, _, backbone), records in groups().items():
        stems = [stem for stem in (record["network"] for record in records) if stem in mine]
        for name in (
            {"cifar10": ("cifar100", "tinyimagenet"), "cifar100": ("cifar10", "tinyimagenet")}.get(
                data, ()
            )
            if stems
            else ()
        ):
            rows.append(
                {
                    "in-distribution": f"{data}, {images} images, {backbone}",
                    "OOD set": _called(name),
                    "combine": percent([mine[stem]["sets"][name]["auroc"] for stem in stems]),
                    "best without the head": percent(
                        [without[stem][name]["auroc"] for stem in stems]
                    ),
                }
            )
    return rows


def _by_set(runs: dict[str, dict]) -> list[dict]:
    """The chosen combination beside the best single score, a row for each OOD test set of each ID set."""
    rows = []
    for (data, images, _, backbone), records in groups().items():
        stems = {record["network"]: record["numbers"]["scores"] for record in records}
        judged = [(runs[stem]["sets"], scores) for stem, scores in stems.items() if stem in runs]
        for name in judged[0][0] if judged else ():
            singles = _others(judged[0][1])
            best = max(
                singles,
                key=lambda label: mean(scores[label][name]["auroc"] for _, scores in judged),
            )
            rows.append(
                {
                    "in-distribution": f"{data}, {images} images, {backbone}",
                    "OOD set": _called(name),
                    "combined: FPR@95": percent([sets[name]["fpr95_id"] for sets, _ in judged]),
                    "combined: AUROC": percent([sets[name]["auroc"] for sets, _ in judged]),
                    "best single: AUROC": f"{percent([scores[best][name]['auroc'] for _, scores in judged])} ({best})",
                }
            )
    return rows


def _joint() -> list[str]:
    records = [json.loads(path.read_text()) for path in sorted((RESULTS / "joint").glob("*.json"))]
    if not records:
        return []
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        groups[record["network"].partition("-")[0]].append(record["results"])
    rows = []
    for data, results in groups.items():
        for label in results[0]:
            of = [result[label] for result in results]
            worst = min(
                of[0]["validation"],
                key=lambda name: mean(result["garbage_rate"][name] for result in of),
            )
            rows.append(
                {
                    "in-distribution": data,
                    "head": label,
                    "held-out ID: accuracy": percent([result["held_accuracy"] for result in of]),
                    "held-out ID in garbage": percent(
                        [result["garbage_rate"]["held"] for result in of]
                    ),
                    "worst validation set in garbage": f"{percent([result['garbage_rate'][worst] for result in of], 1)} ({_called(worst)})",
                }
            )
    text = (
        f"{BEFORE}\n"
        "Detached: the head learns of a network that was trained without it. Joint: the head's loss goes into the network's training, with\n"
        "half as many procedural images as ID images in each batch. Then both get a new head. The same seeds and initial weights.\n"
    )
    commands = [f"    python tests/bench/{record['command']}" for record in records]
    return ["## Joint or detached\n", *commands, "", text, table(rows), ""]


def _search() -> list[str]:
    records = [
        json.loads(path.read_text()) for path in sorted((RESULTS / "head_search").glob("*.json"))
    ]
    if not records:
        return []
    rows = []
    for label in dict.fromkeys(label for record in records for label in record["results"]):
        row = {"head": label} | {record["network"].partition("-")[0]: "-" for record in records}
        for record in records:
            if not (tried := record["results"].get(label)):
                continue
            sets = [name for name in tried[0] if name.startswith("val:")]
            of = {name: mean(result[name]["in_garbage"] for result in tried) for name in sets}
            worst = min(
                (
                    name
                    for name in sets
                    if name not in NEAR.get(record["network"].partition("-")[0], ())
                ),
                key=of.__getitem__,
            )
            held = percent([mean(result["held_in_garbage"] for result in tried)])
            again = [
                result["held_corrupted_in_garbage"]
                for result in tried
                if "held_corrupted_in_garbage" in result
            ]
            garbage = f"{held}, {percent([mean(again)], 1)}" if again else held
            row[record["network"].partition("-")[0]] = (
                f"{percent([of[worst]], 1)} ({_called(worst).partition(',')[0]}); {garbage}"
            )
        rows.append(row)
    text = (
        "Percent of the worst far validation set in garbage; of held-out ID images in garbage, as they are and, where it was measured, processed\n"
        "another way. Where nothing else is said: 70 % shapes, two outliers an ID image, all four statistics, weight 1, 1600 steps, ID images\n"
        "as they are alone. Heads on the same statistics; one network of each data set.\n"
    )
    commands = [f"    python tests/bench/{record['command']}" for record in records]
    return ["## How the head came to be\n", *commands, "", text, table(rows), ""]


def _otherwise() -> list[str]:
    """Heads on networks that were trained to tell OOD images."""
    parts = []
    for path in sorted((RESULTS / "otherwise").glob("*.json")):
        record = json.loads(path.read_text())
        rows = []
        for network, of in record["networks"].items():
            scores = of["scores"]
            single = _others(scores)
            for label in ("best single", "combined without the head", "head", "combined"):
                row = {
                    "network": network,
                    "detector": label,
                    "ID accuracy": percent([of["accuracy"]]),
                }
                for column, names in FAR_AND_NEAR.items():
                    auroc = {
                        one: [scores[one][name]["auroc"] for name in names]
                        for one in (single if label == "best single" else [label])
                    }
                    best = max(auroc, key=lambda one: mean(auroc[one]))
                    named = f", {best}" if label == "best single" else ""
                    row[column] = (
                        f"{percent([mean(auroc[best])], 1)} ({percent([min(auroc[best])], 1)}{named})"
                    )
                rows.append(row)
        members = record.get("combinations", {"combined": ["GEN", "ViM", "head"]})["combined"]
        said = (
            f"{'' if 'combinations' in record else f'{BEFORE} '}AUROC, percent, one seed. "
            "*Plain* and the others are trained by OpenOOD's own trainers and settings, but on this small network, for few "
            "epochs, on images that are not normalised; PixMix mixes with procedural images, not fractals. Combined: "
            f"{' + '.join(members)}, or the first two; on RotPred's network OpenOOD's score of it too. Best single: the score with the "
            "highest mean, chosen by looking at these very columns.\n"
        )
        title = f"## Networks that were trained to tell OOD images: {path.stem}\n"
        parts += [title, f"    python tests/bench/{record['command']}\n", said, table(rows), ""]
    return parts


def _called(name: str) -> str:
    kind, _, of = name.partition(":")
    return f"{CALLED.get(of, of)}, validation" if kind == "val" else CALLED.get(name, name)
