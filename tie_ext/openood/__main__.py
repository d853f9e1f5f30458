"""One of OpenOOD's scripts with TIE registered, with or without a GPU.

``python -m tie_ext.openood main.py --config ...``
"""

import os
import re
import runpy
import sys

from tie_ext.openood.requirements import check_requirements


def main(arguments: list[str] | None = None) -> None:
    """Run one of OpenOOD's scripts.

    Arguments:
        arguments: The script and its arguments; None for those of this process.

    Raises:
        SystemExit: If there is no script, or a package is missing or of an unfit version, with the
            line that installs it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or not os.path.isfile(arguments[0]):
        raise SystemExit(
            "Expected one of OpenOOD's scripts, as in `python -m tie_ext.openood main.py --config "
            f"...`, but got {arguments[0] if arguments else 'nothing'}"
        )
    sys.argv = list(arguments)
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
    try:
        check_requirements()
    except ImportError as error:
        raise SystemExit(str(error)) from None
    from tie_ext.openood.cpu import without_cuda
    from tie_ext.openood.registry import register

    wanted = not re.search(r"--num_gpus[ =]0\b", " ".join(arguments))
    with without_cuda(wanted):
        register()
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
