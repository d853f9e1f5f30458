"""One of OpenOOD's scripts with TIE registered, with or without a GPU.

``python -m tie_ext.openood main.py --config ...``, or ``python -m tie_ext.openood attach ...``
(:mod:`tie_ext.openood.attach`).
"""

import os
import re
import runpy
import sys

from tie_ext.openood.requirements import check_requirements


def main(arguments: list[str] | None = None) -> None:
    """Run one of OpenOOD's scripts, or ``attach``.

    Arguments:
        arguments: The script, or ``attach``, and its arguments; None for those of this process.

    Raises:
        SystemExit: If there is no script, or a package is missing or of an unfit version, with the
            line that installs it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    script = arguments[0] if arguments else "nothing"
    if script != "attach" and not os.path.isfile(script):
        raise SystemExit(
            "Expected attach or one of OpenOOD's scripts, as in `python -m tie_ext.openood "
            f"main.py --config ...`, but got {script}"
        )
    sys.argv = list(arguments)
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    try:
        check_requirements()
    except ImportError as error:
        raise SystemExit(str(error)) from None
    from tie_ext.openood.cpu import without_cuda
    from tie_ext.openood.registry import register

    wanted = not re.search(r"--num_gpus[ =]0\b", " ".join(arguments))
    with without_cuda(wanted):
        register()
        if script != "attach":
            runpy.run_path(script, run_name="__main__")
            return
        from tie_ext.openood.attach import main as attach

        attach(arguments[1:])


if __name__ == "__main__":
    main()
