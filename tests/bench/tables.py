"""Write the tables in docs/ from the records in docs/results/; no number in them is typed.

python tests/bench/tables.py
"""

import re
from pathlib import Path

import benchmark_page
import choice_page
import cifar10_page
import drift
import mutants
import public_page
import rejects
from cost_page import cost
from page import fill

from tie_ext.cli.reproduce.tables import tables as reproduced

BENCH = Path(__file__).parent
DOCS = BENCH.parents[1] / "docs"
OUTSIDE = (
    "../README.md",
    "../patches/pytorch-ood/0001-TIE-detector.md",
    "../patches/pytorch-ood/0002-Combined-detector.md",
)
"""Pages elsewhere that have tables."""
RUNS = ("reproduce", "loop")
"""Folders of cells whose every table is shown."""
OTHERS = {
    "public front": public_page.front,
    "public regret": public_page.regret,
    "public bars": public_page.bars,
    "public auroc": lambda: public_page.by_column(0),
    "public fpr95": lambda: public_page.by_column(1),
    "public rejected": lambda: public_page.by_column(2),
    "public every": public_page.every,
    "public runs": public_page.accuracies,
    "public reasons": public_page.reasons,
    "cifar10 commands": cifar10_page.commands,
    "cifar10 level 1": cifar10_page.level_1,
    "cifar10 level 2": cifar10_page.level_2,
    **{f"cifar10 {n}": lambda n=n: cifar10_page.facts()[n] for n in cifar10_page.FACTS},
    "choice count": choice_page.count,
    "choice candidates": choice_page.candidates,
    "choice left out": choice_page.left_out,
    "choice fresh": choice_page.fresh,
    **{
        f"public {name}": lambda name=name: public_page.facts()[name] for name in public_page.FACTS
    },
    "mutants": mutants.shown,
    "benchmark library": benchmark_page.pull_request,
    **{f"drift {name}": place for name, place in drift.PLACES.items()},
    **{f"rejects {name}": place for name, place in rejects.PLACES.items()},
}
"""What may stand in a page beside numbers of cells and of history."""


INSERTED = re.compile(r"(<!-- tests/bench/tables.py fills in (.*) here -->\n)[^<]*")
"""A comment that names a place, and what stands up to the next comment."""


def inserted(name: str) -> str:
    """A page outside docs/ with each table behind the comment that names it."""
    text = (DOCS / name).read_text()
    return INSERTED.sub(lambda m: f"{m[1]}{fill(f'{{{{{m[2]}}}}}', OTHERS)}\n", text)


def documents() -> dict[str, str]:
    """Text of every document by its place in docs/; those without records are left out."""
    pages = sorted((BENCH / "pages").glob("*.md"))
    texts = {f"research/{page.name}": fill(page.read_text(), OTHERS) for page in pages}
    found = {
        "results.md": texts.pop("research/results.md"),
        "how-to/drift.md": texts.pop("research/drift.md"),
        **texts,
        "research/benchmark.md": benchmark_page.page(),
        "research/cost.md": cost(),
        **{name: inserted(name) for name in OUTSIDE},
        **{f"results/{run}/tables.md": reproduced(DOCS / "results" / run) for run in RUNS},
    }
    return {name: text for name, text in found.items() if text}


def main() -> None:
    for name, text in documents().items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
