"""What a record says of how it was made: command, commit, versions, processor, memory."""

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
    """Most memory this process has held so far, MB (resident set); None where Python cannot tell,
    as on Windows.
    """
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
        packages: Whose versions are told, where they are installed.
        places: Files and folders that lie elsewhere for everyone, by the name that the command has
            instead.
    """
    versions = {"python": platform.python_version()}
    for package in ("tie_ext", *packages):
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
    name = (
        "tie-ext" if program.resolve() == where / "cli" / "main.py" else program.name
    )  # the former: `python -m tie_ext.cli.main`
    command = shlex.join([name, *(_named(word, places) for word in sys.argv[1:])])
    return {
        "command": command,
        "commit": commit,
        "versions": versions,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
    }


def _named(word: str, places: Mapping[str, str | Path]) -> str:
    """A word of a command, with the name of a place instead of its path; so too behind ``--flag=``
    and before what lies in it.
    """
    flag, equals, value = word.rpartition("=")
    for name, place in places.items():
        path = os.fspath(place).rstrip("/")
        if value == path or value.startswith(f"{path}/"):
            return flag + equals + name + value.removeprefix(path)
    return word


def processor(device: str | torch.device = "cpu") -> str:
    """Name of what computes on ``device``; times are compared on one only, and sums differ from
    one to another in their last bits.
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path(
        "/proc/cpuinfo"
    )  # platform.processor() is empty on Linux, or names the architecture alone
    names = (
        [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        if cpuinfo.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()
