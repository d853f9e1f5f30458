"""What a user gets: a wheel and an sdist are built, and the wheel works in an environment that had
nothing.

pip install build && python tests/release.py
"""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HELD = (
    "py.typed",
    "openood_configs/networks/tie_net.yml",
    "openood_configs/postprocessors/tie_combined.yml",
    "cli/main.py",
)
"""Files that are easily forgotten, by their place in the package."""
PROBE = """
import tie_ext.openood
found = sorted(path.name for path in tie_ext.openood.configs().rglob("*.yml"))
assert "tie_net.yml" in found and "train_tie.yml" in found, found
assert "venv" in tie_ext.__file__, tie_ext.__file__
print(f"{len(found)} configs in {tie_ext.openood.configs()}")
"""


def build(out: Path) -> tuple[Path, Path]:
    """The wheel and the sdist of this tree, in a folder; the wheel is made from the sdist, as
    ``python -m build`` does it.
    """
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def missing(wheel: Path, sdist: Path) -> list[str]:
    """What should be in both, and is not."""
    with zipfile.ZipFile(wheel) as packed:
        inside = set(packed.namelist())
    with tarfile.open(sdist) as packed:
        source = {name.partition("/")[2] for name in packed.getnames()}
    lost = [f"{name} in {wheel.name}" for name in HELD if f"tie_ext/{name}" not in inside]
    places = [name if name.startswith("openood_configs") else f"tie_ext/{name}" for name in HELD]
    return lost + [
        f"{name} in {sdist.name}"
        for name in (*places, "LICENSE", "README.md")
        if name not in source
    ]


def main() -> None:
    """Build, install and try; raises where something is amiss."""
    with tempfile.TemporaryDirectory() as folder:
        wheel, sdist = build(Path(folder) / "dist")
        if lost := missing(wheel, sdist):
            raise RuntimeError(
                f"Expected every file in the wheel and the sdist, but got none of {', '.join(lost)}"
            )
        venv.create(Path(folder) / "venv", with_pip=True)
        scripts = Path(folder) / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
        for command in (
            [scripts / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cli]"],
            [scripts / "tie-ext", "--version"],
            [scripts / "python", "-c", PROBE],
            [scripts / "tie-ext", "demo", "--out", "demo"],
            [scripts / "tie-ext", "report", "demo"],
        ):
            subprocess.run(list(map(str, command)), check=True, cwd=folder)
    print(f"{wheel.name} and {sdist.name} are whole, and the demo ran")


if __name__ == "__main__":
    main()
