"""What the tests of both hosts' patches share: the length of a patch, and the patched tree."""

import re
import shutil
import subprocess
from pathlib import Path

PATCHES = Path(__file__).parents[2] / "patches"


def added(patch: Path) -> dict[str, list[str]]:
    """The lines that a patch adds, by file."""
    lines: dict[str, list[str]] = {}
    for part in re.split(r"^diff --git ", patch.read_text(), flags=re.M)[1:]:
        name = re.match(r"a/.* b/(.*)", part)[1]
        lines[name] = [
            line[1:]
            for line in part.splitlines()
            if line.startswith("+") and not line.startswith("+++ ")
        ]
    return lines


def git(tree: Path, *arguments: str) -> str:
    """What a git command says in a tree."""
    run = subprocess.run(
        [
            "git",
            "-c",
            "user.name=a",
            "-c",
            "user.email=a@a",
            "-c",
            "core.autocrlf=false",
            *arguments,
        ],
        cwd=tree,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"git {' '.join(arguments)}: {run.stdout}{run.stderr}"
    return run.stdout


def cloned(source: Path, to: Path) -> Path:
    """A repository with a host's tree, as it stands, as its only commit."""
    shutil.copytree(
        source, to, ignore=shutil.ignore_patterns(".git", "data", "results", "__pycache__")
    )
    git(to, "init", "-q")
    git(to, "add", "-A", "-f")
    git(to, "commit", "-q", "-m", "upstream")
    return to


def apply(tree: Path, *patches: Path) -> Path:
    """The tree with patches as commits on top, as a maintainer takes them."""
    for patch in patches:
        git(tree, "am", "-q", str(patch))
    return tree


def other_than_pinned(tree: Path, patch: Path) -> list[str]:
    """The files that a patch was made against and a tree has otherwise."""
    found = re.findall(
        r"^diff --git a/(\S+) b/\S+\n(?:\w+ mode .*\n)?index (\w+)\.\.", patch.read_text(), re.M
    )
    return [
        name
        for name, blob in found
        if set(blob) != {"0"} and not git(tree, "rev-parse", f"HEAD:{name}").startswith(blob)
    ]
