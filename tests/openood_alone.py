"""The extra ``openood`` installs everything that the plug-in imports, except OpenOOD itself.

pip install '.[openood]' && pip install --no-build-isolation libmr && python tests/openood_alone.py
"""

import sys
from importlib import import_module
from modulefinder import ModuleFinder
from pathlib import Path

from tie_ext.openood.requirements import PACKAGES, check_requirements

ROOT = Path(__file__).parents[1]
ALONE = "but got no openood."


def imports(*sources: Path) -> tuple[set[str], set[str]]:
    """What the plug-in imports, and what this imports in turn, wherever in a file it stands.

    Arguments:
        sources: Folders whose packages are read, not run; tie_ext's is one of them.

    Returns:
        Modules whose source was read, and those of other packages, without the standard library.
    """
    finder = ModuleFinder(path=list(map(str, sources)))
    for room in sorted((ROOT / "tie_ext" / "openood").glob("*.py")):
        finder.import_hook(
            "tie_ext.openood" if room.stem == "__init__" else f"tie_ext.openood.{room.stem}"
        )
    own = sys.stdlib_module_names | {package(name) for name in finder.modules}
    return set(finder.modules), {name for name in finder.badmodules if package(name) not in own}


def package(module: str) -> str:
    """The package that a module is of."""
    return module.partition(".")[0]


def missing() -> str:
    """What `check_requirements` says."""
    try:
        check_requirements()
    except ImportError as error:
        return str(error)
    return ""


def main() -> None:
    """Raise where something is missing."""
    ours, others = imports(ROOT)
    rooms = {
        name for name in ours if not name.startswith("tie_ext.openood.")
    }  # which import OpenOOD itself
    names = {name for name in others if package(name) != "openood"} | set(PACKAGES) | rooms
    for name in sorted(names):
        import_module(name)
    if (said := missing()) and ALONE not in said:
        raise RuntimeError(said)
    print(f"{len(names)} modules, and nothing is missing but OpenOOD")


if __name__ == "__main__":
    main()
