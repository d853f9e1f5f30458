"""How ``combine``'s members and weights are chosen: on validation OOD sets and held-out classes.

    python tests/bench/choice.py --images DATA --cache CACHE --out docs/results/choice.json

CACHE is that of public_networks.py, which has to have run. Candidates are all combinations of
bodies, weights, tails and rules of trust below. Each is judged by its regret in *validation
columns*. Near: on 32 pixels a part of TinyImageNet's classes; beside flowers and trash a known class
that a network of its own was not fitted on. Far: glyphs and patches of photographs, beside flowers,
trash and grey images that part of TinyImageNet too. No image of a validation column is tested on by
the same choice of classes; other choices of flowers and trash test on it.
Of those whose worst regret is within 0.1 points of the best, those with the fewest members are
chosen, and of these the one with the best mean: among those of combine's scores, and, to see what
other scores would bring, among all.

*Leave one network out*: chosen by the validation columns of all networks but one kind, judged on
the test columns of that one. Rivals are those of public_networks.py that read features.
"""

import argparse
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import rivals
import torch
from public_networks import HELD_OUT, NETWORKS, OURS, VALIDATION, Run, passed, reader
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn.functional import normalize

from tie_ext import Combined
from tie_ext.pytorch_ood.members import Outputs, confidence_of
from tie_ext.pytorch_ood.recommended import chosen_members
from tie_ext.pytorch_ood.sample import kept_sample
from tie_ext.scores.combination import QUANTILE
from tie_ext.scores.threshold import split
from tie_ext.scores.trust import trust
from tie_ext.utils.provenance import provenance

KINDS = {
    "CIFAR-10": ("cifar10-resnet20", "cifar10-resnet56"),
    "CIFAR-100": ("cifar100-resnet14",),
    "ImageNet": ("imagenet",),
    "flowers": ("flowers", "flowers-held-out"),
    "trash": ("trash", "trash-held-out"),
    "grey": ("mnist", "fashionmnist"),
}
"""Networks that are left out together."""
FRESH = {"flowers": (6, 8, 11), "trash": (5, 9, 11)}
"""Choices of classes that no earlier seed made, first judged when the choice was made. Their images
are not new."""
OTHERS = ("GEN", "NCI", "CADRef", "SHE")
"""Single scores of others that may become members."""
BODIES = (
    ("energy", "fDBD"),
    ("energy", "fDBD", "GEN"),
    ("energy", "fDBD", "NCI"),
    ("energy", "fDBD", "CADRef"),
)
TAILS = (("garbage", "Mahalanobis++"), ("garbage", "Mahalanobis++", "SHE"))


OWN = 5
"""Members of ``combine``."""


class Candidate(NamedTuple):
    """A combination."""

    body: tuple[str, ...]
    """Scores that count in the body with weight 1."""
    knn: float
    """Weight of KNN in the body, as far as it is trusted; likewise for the next two."""
    gaussians: float
    garbage: float
    trust: str
    """How far distances are trusted: by the likely errors on ``training`` or on ``held-out`` images
    (:mod:`tie_ext.scores.trust`); by ``votes``, where that of five training images is right at
    least 0.95 times as often as the network.
    """
    tails: tuple[str, ...]
    """Scores in the tails."""
    one: bool
    """Whether it is one tail, of their sum, or one of each."""
    tail: float
    """Its weight; the sum has standard deviation 1."""

    @property
    def own(self) -> bool:
        """Whether it needs no other score than combine has."""
        return not {*self.body, *self.tails} & {*OTHERS}

    @property
    def members(self) -> int:
        """How many scores it needs."""
        distances = {"KNN": self.knn, "Mahalanobis++": self.gaussians, "garbage": self.garbage}
        return len({*self.body, *self.tails, *(name for name, of in distances.items() if of)})


CANDIDATES = [
    Candidate(*of)
    for of in itertools.product(
        BODIES,
        (1, 1.5, 2),
        (0, 0.5, 1),
        (0, 0.5, 1),
        ("training", "held-out", "votes"),
        TAILS,
        (True, False),
        (0.75, 1.0),
    )
]
CHOSEN = Candidate(("energy", "fDBD"), 1, 1, 0.5, "training", TAILS[0], True, 1.0)
"""What ``combine`` combines."""
BEFORE = Candidate(("energy", "fDBD"), 2, 0, 0, "votes", TAILS[0], False, 0.75)
"""What 0.3.0 combined."""
FIRST = Candidate(("energy", "fDBD"), 2, 2, 2, "training", TAILS[0], True, 1.0)
"""What half of the held-out classes chose."""
CANDIDATES.append(FIRST)


class Columns(NamedTuple):
    """AUROC of a run by column: ``test near``, ``test far``, ``validation near``, ``validation
    far``."""

    ours: dict[str, Tensor]
    """``(C,)`` of the candidates."""
    rivals: dict[str, dict[str, float]]
    """Of each rival."""


def judged(run: Run) -> Columns:
    """All candidates and rivals."""
    columns = columns_of(run)
    sets = {"test", *(ood for some in columns.values() for ood in some)}
    names, held, of, shares, theirs = members(run, sets)
    combined = [Fitted(candidate, names, held, shares) for candidate in CANDIDATES]
    scores = {name: torch.stack([one.score(x) for one in combined]) for name, x in of.items()}
    chosen = scores["test"][CANDIDATES.index(CHOSEN)]
    torch.testing.assert_close(chosen, theirs.predict_scores(of["test"][:, :OWN]))
    inside = scores["test"].sort(dim=1).values
    ours = {
        column: torch.stack([aurocs(inside, scores[ood]) for ood in some]).mean(dim=0)
        for column, some in columns.items()
    }
    single = {n: x for n, x in run.scores().items() if n not in OURS and sets <= x.keys()}
    return Columns(
        ours,
        {
            column: {
                name: mean(rivals.auroc(x["test"], x[ood]) for ood in some)
                for name, x in single.items()
            }
            for column, some in columns.items()
        },
    )


def aurocs(ordered: Tensor, outside: Tensor) -> Tensor:
    """AUROC ``(C,)`` of ID scores ``(C, N)`` in ascending order and OOD scores ``(C, M)``."""
    outside = outside.contiguous()
    below, upto = (torch.searchsorted(ordered, outside, right=right) for right in (False, True))
    return (below + upto).double().mean(dim=1) / (2 * ordered.shape[1])


def columns_of(run: Run) -> dict[str, Sequence[str]]:
    """OOD sets by column: ``test near``, ``test far``, ``validation near``, ``validation far``."""
    of = run.network
    if run.name in HELD_OUT:
        return {"validation near": of.near, "validation far": VALIDATION}
    found = {f"test {kind}": sets for kind in ("near", "far") if (sets := getattr(of, kind))}
    if run.backbone.size == 32:
        return found | {"validation near": VALIDATION[:1], "validation far": VALIDATION[1:]}
    # TinyImageNet's classes are some of ImageNet's.
    return found | {"validation far": VALIDATION[run.name == "imagenet" :]}


def members(
    run: Run, sets: set[str]
) -> tuple[list[str], Tensor, dict[str, Tensor], dict[str, float], Combined]:
    """Names of all scores that may be members, their scores ``(N, k)`` of the images that set the
    scale and of each set, how far distances are trusted by each rule, and what combine gives."""
    model, seen, kept = run.model(), run.seen(), run.cached("scores")
    head = run.head(model)
    net = reader(model, run.backbone, run.network.num_classes)
    net.keep_training(head.pop("train_features"), head.pop("train_labels", None))
    del head["seconds"]
    net.garbage.load_state_dict(head)
    sample = kept_sample(net)
    chosen = Combined(chosen_members(sample, None, (net.fc.weight, net.fc.bias)), 0.05)
    names = ["garbage", "KNN", "energy", "Mahalanobis++", "fDBD"][:OWN]
    others = [name for name in OTHERS if f"scores/{name}/test" in kept]

    def scores(name: str) -> tuple[Tensor, Outputs]:
        of = seen[name]
        every = net.all_logits(of.features, of.statistics)
        outputs = Outputs(every[:, :-1], of.features, every)
        columns = [kept[f"scores/{other}/{name}"][:, None] for other in others]
        return torch.cat([chosen.score_outputs(outputs), *columns], dim=1), outputs

    rows, _ = split(len(seen["calibration"].labels), 0.05)
    held, outputs = scores("calibration")
    sure, z, y = (
        x[rows] for x in (confidence_of(outputs), outputs.features, seen["calibration"].labels)
    )
    right = (outputs.logits[rows].argmax(dim=1) == y).sum()
    votes = 0
    if sample.labels is not None:
        unit = normalize(sample.features)
        vote = KNeighborsClassifier(min(5, len(unit))).fit(unit, sample.labels)
        votes = (torch.from_numpy(vote.predict(normalize(z))) == y).sum()
    shares = {
        "votes": float(votes >= 0.95 * right > 0),
        "held-out": trust(held[rows, 1], sure),
        "training": sample.trust(),
    }
    chosen.fit_scores(held[:, :OWN], None, shares[CHOSEN.trust])
    sets_of = {name: scores(name)[0] for name in sets}
    return [*names, *others], held[rows], sets_of, shares, chosen


class Fitted:
    """A candidate on the scale of some ID images; a score that a network does not have is left
    out."""

    def __init__(
        self, of: Candidate, names: Sequence[str], held: Tensor, shares: Mapping[str, float]
    ):
        share = shares[of.trust]
        body = dict.fromkeys(of.body, 1.0)
        body |= {"KNN": share * of.knn, "Mahalanobis++": share * of.gaussians}
        body["garbage"] = share * of.garbage
        self.body = torch.tensor([body.get(name, 0.0) for name in names])
        self.tail = torch.tensor([float(name in of.tails) for name in names])
        self.mean, self.deviation, self.of = held.mean(dim=0), held.std(dim=0), of
        parts = self.parts(held)
        self.spread = parts.std(dim=0) if of.one else torch.ones(parts.shape[1])
        row = math.ceil(QUANTILE * len(held)) - 1
        self.edge = parts.sort(dim=0).values[row] / self.spread

    def parts(self, scores: Tensor) -> Tensor:
        """What the tails are of ``(N, k)``, or ``(N, 1)`` their sum."""
        z = (scores - self.mean) / self.deviation
        return (z @ self.tail)[:, None] if self.of.one else z[:, self.tail > 0]

    def score(self, scores: Tensor) -> Tensor:
        """Combined scores ``(N,)`` of scores ``(N, k)``."""
        z = (scores - self.mean) / self.deviation
        excess = (self.parts(scores) / self.spread - self.edge).clamp_min(0).sum(dim=1)
        return z @ self.body / self.body.sum() + self.of.tail * excess


# Regret.


def regrets(found: Mapping[str, Sequence[Columns]]) -> dict[tuple[str, str], tuple[Tensor, str]]:
    """Regret ``(C,)`` of the candidates in points of AUROC, and the best rival, by network and
    column; each AUROC is the mean over runs."""
    table = {}
    for network, runs in found.items():
        for column in runs[0].ours:
            ours = torch.stack([run.ours[column] for run in runs]).mean(dim=0)
            names = {name for run in runs for name in run.rivals[column]}
            single = {
                name: mean(r.rivals[column][name] for r in runs if name in r.rivals[column])
                for name in names
            }
            best = max(single, key=lambda name: (single[name], name))
            table[network, column] = 100 * (ours - single[best]), best
    return table


def best(table: Mapping, networks: Sequence[str], kind: str, own: bool = True) -> int:
    """Of the candidates whose worst regret in the columns of a kind is within 0.1 points of the
    best, those with the fewest members, and of these the one with the best mean.

    Arguments:
        table: Of all regrets.
        networks: Whose columns count.
        kind: ``validation`` or ``test``.
        own: Whether candidates with scores of others are left out.
    """
    columns = [of for (n, column), (of, _) in table.items() if n in networks and kind in column]
    every = torch.stack(columns)
    worst, average = every.amin(dim=0), every.mean(dim=0)
    some = [row for row, of in enumerate(CANDIDATES) if of.own or not own]
    good = [row for row in some if worst[row] >= worst[some].max() - 0.1]
    return max(good, key=lambda row: (-CANDIDATES[row].members, average[row].item()))


def about(table: Mapping, row: int, networks: Sequence[str] | None = None) -> dict:
    """A candidate, and its regret in validation and test columns."""
    found: dict = {"candidate": CANDIDATES[row]._asdict()}
    for kind in ("validation", "test"):
        columns = {
            f"{n} {column}": round(of[row].item(), 2)
            for (n, column), (of, _) in table.items()
            if kind in column and (networks is None or n in networks)
        }
        if columns:
            values = list(columns.values())
            found[kind] = {
                "worst": min(values),
                "mean": round(mean(values), 2),
                "columns": columns,
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("images", "cache", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Columns]] = defaultdict(list)
    for name, network in (NETWORKS | HELD_OUT).items():
        of = 1000 if network.linear else network.num_classes
        passed(network.backbone, a.images, a.cache, of)
        for seed in network.seeds:
            with torch.no_grad():
                found[name].append(judged(Run(name, seed, a.images, a.cache)))
            print(f"{name}, seed {seed}", flush=True)
    table, every = regrets(found), list(found)
    out = {}
    for kind, left in KINDS.items():
        others = [name for name in every if name not in left]
        out[kind] = {
            "by validation": about(table, best(table, others, "validation"), left),
            "of all": about(table, best(table, others, "validation", False), left),
        }
    record = {
        "candidates": len(CANDIDATES),
        "by validation": about(table, best(table, every, "validation")),
        "of all": about(table, best(table, every, "validation", False)),
        "by test": about(table, best(table, every, "test")),
        "chosen": about(table, CANDIDATES.index(CHOSEN)),
        "before": about(table, CANDIDATES.index(BEFORE)),
        "first": about(table, CANDIDATES.index(FIRST)),
        "left out": out,
        "rivals": {f"{n} {column}": name for (n, column), (_, name) in table.items()},
    }
    with torch.no_grad():
        fresh = regrets(
            {
                name: [judged(Run(name, seed, a.images, a.cache)) for seed in seeds]
                for name, seeds in FRESH.items()
            }
        )
    for key, candidate in (("chosen", CHOSEN), ("before", BEFORE), ("first", FIRST)):
        record[key]["fresh"] = about(fresh, CANDIDATES.index(candidate))["test"]
    rivals_of = {f"{n} {column}": name for (n, column), (_, name) in fresh.items()}
    record["chosen"]["fresh"]["rivals"] = rivals_of
    record |= provenance(places={"DATA": a.images, "CACHE": a.cache})
    a.out.write_text(json.dumps(record) + "\n")
    for name in ("by validation", "by test", "chosen"):
        print(name, json.dumps(record[name]))


if __name__ == "__main__":
    main()
