"""Whether the tests notice a broken line: counts of ``mutmut run``, and every mutant that lives.

    pip install mutmut && mutmut run
    python tests/bench/mutants.py mutants

mutmut's settings are in pyproject.toml. A mutant is a copy of a function with one thing changed;
it is killed if a test fails. ``mutmut show NAME`` has the change of one that lives.
"""

import json
import sys
from pathlib import Path

from tie_ext.cli.tables import table
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance

RECORD = Path(__file__).parents[2] / "docs" / "results" / "mutants.json"
KILLED = {1, 3, 36, -24, 24, 152, 255}
"""Exit codes of mutmut that say a test failed, or ran out of time."""


def read(folder: Path) -> dict:
    """Counts by file, and the names of the mutants that live."""
    found: dict[str, dict] = {}
    for meta in sorted(folder.rglob("*.meta")):
        codes = json.loads(meta.read_text())["exit_code_by_key"]
        tried = {name: code for name, code in codes.items() if code is not None}
        lives = sorted(name for name, code in tried.items() if code not in KILLED)
        counts = {"mutants": len(codes), "tried": len(tried), "killed": len(tried) - len(lives)}
        found[str(meta.with_suffix("").relative_to(folder))] = {**counts, "live": lives}
    return found


def shown() -> str:
    """The record as a table."""
    found = json.loads(RECORD.read_text())["files"]
    every = {key: sum(of[key] for of in found.values()) for key in ("mutants", "tried", "killed")}
    rows = [
        {"file": name, "mutants": of["mutants"], "tried": of["tried"]}
        | {"killed": f"{100 * of['killed'] / max(1, of['tried']):.1f} %"}
        for name, of in (found | {"all": every}).items()
    ]
    return table(rows)


def main() -> None:
    """Write the record of a folder of mutmut's."""
    versions = provenance(packages=("mutmut", "pytest", "torch"))
    write_json(RECORD, {"files": read(Path(sys.argv[1])), **versions})


if __name__ == "__main__":
    main()
