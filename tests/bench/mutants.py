"""Whether the tests notice a broken line: what `mutmut run` found, as a record, and docs/research/mutants.md, which tables.py makes of it.

    pip install mutmut && mutmut run
    python tests/bench/mutants.py mutants

mutmut's settings stand in pyproject.toml. A mutant is a copy of a function with one thing changed; it is killed where a test fails, and lives on
where none does.
"""

import ast
import difflib
import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path

from tie_ext.cli.tables import table
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance

RECORD = Path(__file__).parents[2] / "docs" / "results" / "mutants.json"
KILLED = {1, 3, 36, -24, 24, 152, 255}
"""Exit codes of mutmut that say a test failed, or ran out of time."""
REASONS = {
    **dict.fromkeys(
        (
            'check_number("offered"',
            "check_number(None, offered",
            "isinstance(layers, dict)",
            "garbage.mean",
            "of a garbage head",
            "GarbageHead(layers",
            "head is None else copy.copy",
            "low.numel()",
            "small",
            "cls(backbone, n, None",
            "kind not in FLOATS",
            "isinstance(classes, list)",
            "weights of {n} classes",
            "found.shape",
            "p.shape[+1]",
            "max(2, self.config.epochs - 1)",
            "0.1 / int(self.counts.sum())",
        ),
        "a test that came after this record tells it",
    ),
    "set_to_none": "speed, not a result",
    "detach": "memory, not a result",
    "tau: float | Tensor=2.0": "nothing: no uncertainty is above 1",
    "-1 / Fraction": "the number of images in the words of an error",
    "F.normalize(features, )": "nothing: 1 is its default",
    "clearly=None": "nothing: None is as false as False",
    "training = None": "nothing: None is as false as False",
    "_surveyed = None": "nothing: None is as false as False",
    "- first)": "nothing: the start is as random in either direction",
    "-break +return": "nothing: the loop is the last of its function",
    ".sum(+1)": "tests give rows of probabilities alone",
    "+return (1 - (p": "rounding: without it the value is in [0, 1]",
    "or True": "a layer that gives no tensor",
    "torch.optim.Adam(net.parameters(), )": "nothing: each epoch sets the learning rate",
    "broadcast(None)": "what one process alone does not do: nothing is sent",
    "+return BACKBONES[str(name)](channels, )": "nothing: its own default is as many classes as the tests'",
    "raise ": "the words of an error beyond those that a test asks for",
    "Expected": "the words of an error beyond those that a test asks for",
    "error": "the words of an error beyond those that a test asks for",
    "singles": "the words of an error: how many batches of one image there are",
    "_own(None": "the words of an error: the file's name",
    "desc=": "what a progress bar is called",
    "_bar(": "what a progress bar is called",
    "disable=": "what a progress bar is called",
    "device": "where a tensor lives: tests run on the CPU alone",
    ".to(None)": "where a tensor lives: tests run on the CPU alone",
    'float("INF")': "nothing: Python reads both",
    "11**9": "no memory holds either",
    "channels = next": "a file without convolutions is refused a line later, in other words",
    "torch.allclose": "backbones that give NaN",
    "ramp = ": "another image that a backbone is tried on",
    "part(x, **": "what OpenOOD's networks are asked for; mutmut does not run the tests of hosts",
    "_load_from_state_dict": "nothing: torch passes all of it by position",
    "left <= 1": "which of the ID images an outlier is made beside",
    ">= 0.1 * int": "a share of exactly a tenth",
    "dtype": "a type that comes out the same",
    "assert ": "a note to the type checker",
}
"""Why a mutant may live on, by what stands in the line that was changed; the first that fits."""


def read(folder: Path) -> dict:
    """Counts by file, and every mutant that lives on with its change."""
    found: dict[str, dict] = {}
    for meta in sorted(folder.rglob("*.meta")):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        tried = {name: code for name, code in codes.items() if code is not None}
        lives = [name for name, code in tried.items() if code not in KILLED]
        source = meta.with_suffix("")
        found[str(source.relative_to(folder))] = {
            "mutants": len(codes),
            "tried": len(tried),
            "killed": len(tried) - len(lives),
            "live": {name: change(source, name) for name in sorted(lives)},
        }
    return found


@cache
def functions(source: Path) -> dict[str, list[str]]:
    """The lines of each function of a file, and its arguments."""
    text = source.read_text()
    lines, nodes = (
        text.splitlines(),
        [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)],
    )
    return {
        node.name: [*lines[node.lineno : node.end_lineno], ast.unparse(node.args)]
        for node in nodes
    }


def change(source: Path, name: str) -> list[str]:
    """The lines that a mutant changes, as a diff."""
    function, _, number = name.rsplit(".", 1)[1].partition("__mutmut_")
    before, after = (
        functions(source).get(f"{function}__mutmut_{which}", []) for which in ("orig", number)
    )
    lines = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    return [line[0] + line[1:].strip() for line in lines if not line.startswith("@@")]


def reason(lines: list[str]) -> str:
    """Why no test tells a mutant from the code."""
    changed = " ".join(lines)
    return next(
        (why for word, why in REASONS.items() if word in changed), "no test tells it apart"
    )


def page() -> str:
    """docs/research/mutants.md."""
    record = json.loads(RECORD.read_text())
    rows = []
    for name, of in record["files"].items():
        rows.append(
            {
                "file": name,
                "mutants": of["mutants"],
                "tried": of["tried"],
                "killed": f"{100 * of['killed'] / max(1, of['tried']):.1f} %",
            }
        )
    tried, killed = (
        sum(of[key] for of in record["files"].values()) for key in ("tried", "killed")
    )
    every = sum(of["mutants"] for of in record["files"].values())
    rows.append(
        {
            "file": "all",
            "mutants": every,
            "tried": tried,
            "killed": f"{100 * killed / tried:.1f} %",
        }
    )
    lives = [reason(lines) for of in record["files"].values() for lines in of["live"].values()]
    why = [
        {"mutants that live on": count, "why": name}
        for name, count in Counter(lives).most_common()
    ]
    head = "# Do the tests notice a broken line?\n\nMade by `python tests/bench/tables.py` of `docs/results/mutants.json`, the record of\n\n"
    head += "    pip install mutmut && mutmut run\n    python tests/bench/mutants.py mutants\n\n"
    head += f"at commit {record['commit']}. A mutant is a function with one thing changed. It is killed where a test fails.\n\n"
    return f"{head}{table(rows)}\n\nThe record has the lines of each that lives on; `mutants.py` tells why by what stands in them.\n\n{table(why)}\n"


def main() -> None:
    """Write the record of a folder of mutmut's."""
    folder = Path(sys.argv[1])
    write_json(
        RECORD, {"files": read(folder), **provenance(packages=("mutmut", "pytest", "torch"))}
    )


if __name__ == "__main__":
    main()
