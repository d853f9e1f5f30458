"""The command line: ``tie-ext demo | train | attach | score | calibrate | report | explain |
reproduce``.
"""

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from importlib import import_module

from tie_ext.cli.flags import UsageError, make_parser

COMMANDS = {
    "demo": "tie_ext.cli.demo",
    "train": "tie_ext.cli.train",
    "attach": "tie_ext.cli.attach",
    "score": "tie_ext.cli.score",
    "calibrate": "tie_ext.cli.calibrate",
    "report": "tie_ext.cli.report",
    "explain": "tie_ext.cli.explain",
    "reproduce": "tie_ext.cli.reproduce.run",
}
"""The module of each command, imported when it is asked for; its ``run`` does the work."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; see ``tie-ext --help``.

    Returns:
        0 when done, 1 where the input is wrong, 2 where the flags are, 3 where ``score --monitor``
        has found drift, 130 when interrupted.
    """
    flags = make_parser().parse_args(arguments)
    _show_log()
    try:
        status = import_module(COMMANDS[flags.name]).run(flags) or 0
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        return _report(f"{error}; pip install 'tie_ext[cli]' installs what the commands need", 1)
    except UsageError as error:
        return _report(str(error), 2)
    except BrokenPipeError:  # of `| head`; else Python tries again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename is None:
            text = error.strerror  # of our own errors, without the number that Python prepends
        return _report(text, 1)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _report(f"stopped{_resume_hint(flags)}", 130)
    return status


def _show_log() -> None:
    """Show what the package logs on the standard error, each message once."""
    log, seen = logging.getLogger("tie_ext"), set[str]()

    def new(record: logging.LogRecord) -> bool:
        known = len(seen)
        seen.add(record.getMessage())
        return len(seen) > known

    log.handlers = [logging.StreamHandler()]
    log.handlers[0].addFilter(new)
    log.setLevel(logging.INFO)


def _report(error: str, status: int) -> int:
    print(f"tie-ext: {error}", file=sys.stderr)
    return status


def _resume_hint(flags: Namespace) -> str:
    if flags.name == "reproduce":
        return "; finished cells and epochs are kept, continue with the same command"
    if flags.name == "train":
        folder = vars(flags).get("out") or vars(flags).get("resume")
        return f"; finished epochs are kept, continue with: tie-ext train --resume {folder}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
