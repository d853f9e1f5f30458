"""What the tests of both hosts' patches share: the length of a patch, and the patched tree."""

import os
import re
import shutil
import subprocess
import sys
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
    settings = ("user.name=a", "user.email=a@a", "core.autocrlf=false")
    options = [word for setting in settings for word in ("-c", setting)]
    return said(tree, "git", *options, *arguments)


def python(tree: Path, *arguments: str, path: tuple = ()) -> str:
    """What a Python says in a tree, whose packages are imported first."""
    places = [str(place) for place in (*path, tree, os.environ.get("PYTHONPATH", ""))]
    environment = {"PYTHONPATH": os.pathsep.join(places), "PYTHONDONTWRITEBYTECODE": "1"}
    return said(tree, sys.executable, "-W", "ignore", *arguments, **environment)


def said(tree: Path, *command: str, **environment: str) -> str:
    run = subprocess.run(
        command, cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
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
