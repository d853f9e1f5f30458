"""Write the tables in docs/ from the records in docs/results/; no number in them is typed.

python tests/bench/tables.py
"""

from pathlib import Path

import benchmark_page
import mutants
import public_page
from cost_page import cost
from page import fill

from tie_ext.cli.reproduce.tables import tables as reproduced

BENCH = Path(__file__).parent
DOCS = BENCH.parents[1] / "docs"
RUNS = ("reproduce", "loop")
"""Folders of cells whose every table is shown."""
OTHERS = {
    "public front": public_page.front,
    "public regret": public_page.regret,
    "public auroc": lambda: public_page.by_column(0),
    "public fpr95": lambda: public_page.by_column(1),
    "public rejected": lambda: public_page.by_column(2),
    "public every": public_page.every,
    "public runs": public_page.accuracies,
    "public reasons": public_page.reasons,
    **{
        f"public {name}": lambda name=name: public_page.facts()[name] for name in public_page.FACTS
    },
    "mutants": mutants.shown,
}
"""What may stand in a page beside numbers of cells and of history."""


def readme() -> str:
    """README.md, with the table of public networks between its two comments."""
    start = "<!-- tests/bench/tables.py fills in docs/results/public_networks here -->\n"
    end = "<!-- and ends here -->"
    before, rest = (DOCS.parent / "README.md").read_text().split(start)
    return f"{before}{start}{public_page.front()}\n{end}{rest.split(end)[1]}"


def documents() -> dict[str, str]:
    """Text of every document by its place in docs/."""
    pages = sorted((BENCH / "pages").glob("*.md"))
    texts = {f"research/{page.name}": fill(page.read_text(), OTHERS) for page in pages}
    return {
        "results.md": texts.pop("research/results.md"),
        **texts,
        "research/benchmark.md": benchmark_page.page(),
        "research/cost.md": cost(),
        "../README.md": readme(),
        **{f"results/{run}/tables.md": reproduced(DOCS / "results" / run) for run in RUNS},
    }


def main() -> None:
    for name, text in documents().items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
