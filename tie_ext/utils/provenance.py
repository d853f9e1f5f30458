"""Provenance of a record: command, commit, versions, processor, memory."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

import torch


def peak_memory() -> float | None:
    """Peak resident memory of this process, MB; None where Python does not know, as on Windows."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)


def provenance(
    device: str | torch.device = "cpu",
    packages: Sequence[str] = (
        "torch",
        "torchvision",
        "timm",
        "numpy",
        "pytorch-ood",
        "scikit-learn",
    ),
    places: Mapping[str, str | Path] = MappingProxyType({}),
) -> dict:
    """Command, commit, versions, processor (that of ``device``) and threads of this process.

    Arguments:
        device: Where it computes.
        packages: Packages to list the versions of, where they are installed.
        places: Files and folders that are elsewhere on each machine, by the name that replaces
            them in the command.
    """
    # Ours by itself, as metadata says what an editable installation once was.
    own = sys.modules["tie_ext"].__version__
    versions = {"python": platform.python_version(), "tie_ext": own}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    where = Path(__file__).resolve().parents[1]
    git = ["git", "-C", os.fspath(where), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    program = Path(sys.argv[0])
    # `python -m tie_ext.cli.main` is the same command.
    name = "tie-ext" if program.resolve() == where / "cli" / "main.py" else program.name
    command = shlex.join([name, *(_named(word, places) for word in sys.argv[1:])])
    return {
        "command": command,
        "commit": commit,
        "versions": versions,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
    }


def _named(word: str, places: Mapping[str, str | Path]) -> str:
    """A word of a command with a place replaced by its name, also after ``--flag=`` and before the
    rest of a path.
    """
    flag, equals, value = word.rpartition("=")
    for name, place in places.items():
        path = os.fspath(place).rstrip("/")
        if value == path or value.startswith(f"{path}/"):
            return flag + equals + name + value.removeprefix(path)
    return word


def processor(device: str | torch.device = "cpu") -> str:
    """Name of the processor of ``device``. Times compare on one processor only, and the last bits
    of sums differ between them.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    # platform.processor() is empty on Linux, or the architecture only.
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
