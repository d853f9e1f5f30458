"""docs/drift.md, with what was measured."""

from pathlib import Path

import drift
import rejects

from tie_ext.utils.files import read_json

BENCH = Path(__file__).parent


def page() -> str:
    """The text of drift.md with tables and numbers put in; nothing without records."""
    if not (drift.RECORD.exists() and rejects.RECORD.exists()):
        return ""
    record = read_json(drift.RECORD, "the record of drift")
    none = [record["changes"]["none"][str(n)] for n in drift.HELD_OUT]
    alarms = sum(of["false_alarms"] + sum(wait is not None for wait in of["waits"]) for of in none)
    streams = sum(len(of["waits"]) for of in none)
    places = {
        "power": drift.page(),
        "after": str(record["after"]),
        "naive": f"{record['naive']['40']:.0%}",
        "false": f"Without a change {alarms} of {streams} streams raise an alarm.",
        "rejects": rejects.page(),
        "called": rejects.said(),
    }
    text = (BENCH / "drift.md").read_text()
    for name, value in places.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text
