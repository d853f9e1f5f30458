"""A run under fire: killed at any moment, fed damaged files, on a disk that is full. Writes docs/results/fire.json.

    python tests/bench/fire.py

Every attempt is a process of its own, forked from this one, which has loaded all code and computed nothing.
"""

import argparse
import errno
import filecmp
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import damage
import matplotlib.backends.backend_agg  # noqa: F401 - before the fork, as all that the children need
import numpy as np
import torch
from PIL import Image

from tie_ext.cli import report  # noqa: F401
from tie_ext.cli.folder import read_settings
from tie_ext.cli.main import main as cli
from tie_ext.cli.snapshots import load_snapshots
from tie_ext.cli.tables import table
from tie_ext.models.backbones import BACKBONES
from tie_ext.models.network import TIENet
from tie_ext.pytorch_ood import TIEDetector
from tie_ext.training.trainer import TIETrainer
from tie_ext.utils import files
from tie_ext.utils.checks import MAX_VALUES
from tie_ext.utils.files import load_state, write_json
from tie_ext.utils.provenance import peak_memory, provenance

OUT = Path(__file__).parents[2] / "docs" / "results" / "fire.json"
FAST = [
    "--epochs",
    "3",
    "--candidates",
    "55",
    "--pool-size",
    "40",
    "--inversion-steps",
    "2",
    "--inversion-width",
    "4",
]
RESULTS = ("network.safetensors", "scores.safetensors")
AIMS = ("any moment", "a half-written file is there", "inside a write")
LIMIT, ALLOWANCE = 10, 64
"""Seconds of a processor, and MB beside what the sound file takes and twice the file, that a loader may use."""


def draw(folder: Path) -> Path:
    """Two classes of grey images, dark and bright, in train and test."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 6)):
        for label, low in (("dark", 0), ("bright", 128)):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(low, low + 128, (28, 28), dtype=np.uint8)).save(
                    folder / split / label / f"{i}.png"
                )
    return folder


def train(images: Path, out: Path) -> list[str]:
    """Start a run, or go on with it where it has begun."""
    if (out / "run.json").exists():
        return ["train", "--resume", str(out), "--device", "cpu"]
    return [
        "train",
        "--data",
        f"folder:{images}",
        "--size",
        "28",
        "--out",
        str(out),
        "--backbone",
        "conv3",
        "--device",
        "cpu",
        *FAST,
    ]


# Processes.


def start(work: Callable[[], Any], said: Path) -> int:
    """Run in a forked process, what it prints in a file; its exit status is what ``work`` gives, 99 after an exception."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        status = work() or 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int, limit: float = 120.0) -> int | None:
    """Exit status, negative for a signal; None, and killed, where it takes too long."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def run(
    arguments: list[str],
    said: Path,
    before: Callable[[], Any] = lambda: None,
    limit: float = 120.0,
) -> int | None:
    """One command to its end; its exit status."""
    return ended(start(lambda: (before(), cli(arguments))[1], said), limit)


def warm(place: Path, images: Path) -> None:
    """Import here what a run, its report and its scores import on their way, so that the children need not."""
    names, out = place / "modules", place / "warm"

    def work() -> int:
        status = cli(train(images, out)) or cli(["report", str(out)])
        status = status or cli(
            [
                "score",
                str(out),
                str(next((images / "test" / "dark").iterdir())),
                "--false-alarm",
                "0.25",
            ]
        )
        names.write_text("\n".join(sys.modules))
        return status

    if ended(start(work, place / "said"), 600) != 0:
        raise RuntimeError((place / "said").read_text())
    for name in names.read_text().split():
        with suppress(Exception):
            importlib.import_module(name)
    shutil.rmtree(out)


def parts(folder: Path) -> list[Path]:
    """Half-written files below a folder."""
    return list(folder.rglob(".*.part"))


def at_write(number: int, stage: str, act: Callable[[], Any]) -> None:
    """Let ``act`` happen in this process's write of that number (from 1): ``half`` written, ``whole`` or ``moved`` into place."""
    count = 0

    def fsync(fd: int) -> None:
        nonlocal count
        count += 1
        if count == number and stage == "half":
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            act()
        os.fsync(fd)

    def replace(source: Any, target: Any) -> None:
        if count == number and stage == "whole":
            act()
        os.replace(source, target)
        if count == number and stage == "moved":
            act()

    shim = SimpleNamespace(
        **{name: getattr(os, name) for name in dir(os) if not name.startswith("__")}
    )
    shim.fsync, shim.replace = fsync, replace
    files.os = shim  # type: ignore[attr-defined]


# 1. Killed.


def kill(place: Path, trials: int, rng: np.random.Generator) -> dict:
    """Kill runs, go on with them, and compare what comes of it with a run that was left alone."""
    images, whole = draw(place / "images"), place / "whole"
    warm(place, images)
    begun = time.monotonic()
    if run(train(images, whole), place / "said") != 0:
        raise RuntimeError((place / "said").read_text())
    duration = time.monotonic() - begun
    by_aim: dict[str, Counter] = defaultdict(Counter)
    for i in range(trials):
        aim, out = AIMS[0 if i % 2 == 0 else 1 + i % 4 // 2], place / f"killed{i}"
        found = by_aim[aim]
        for _ in range(int(rng.integers(1, 4))):
            found.update(_killed(images, out, aim, duration, place / "said", rng))
        found["runs"] += 1
        found["went on to the end"] += run(train(images, out), place / "said") == 0
        found["bit-identical"] += all(
            (out / name).is_file() and filecmp.cmp(whole / name, out / name, shallow=False)
            for name in RESULTS
        )
        found["half-written files left"] += len(parts(out))
        shutil.rmtree(out)
    return {
        "seconds of a whole run": round(duration, 2),
        "by aim": {aim: dict(found) for aim, found in by_aim.items()},
    }


def _killed(
    images: Path, out: Path, aim: str, duration: float, said: Path, rng: np.random.Generator
) -> dict[str, int]:
    """Start or go on with a run, kill it, and count what it had and what it left."""
    before, (hear, tell) = _epochs(out), os.pipe()
    number, stage, seen = (
        int(rng.integers(1, 14 if aim == AIMS[2] else 9)),
        str(rng.choice(["half", "whole", "moved"])),
        set(),
    )
    steps: tuple[Callable[[], Any], ...] = (lambda: _telling(tell),)
    if aim == AIMS[2]:
        steps += (lambda: at_write(number, stage, lambda: os.kill(os.getpid(), signal.SIGKILL)),)
    pid = start(lambda: ([step() for step in steps], cli(train(images, out)))[1], said)
    os.close(tell)
    end = time.monotonic() + (rng.uniform(0, duration) if aim == AIMS[0] else 120)
    while (
        time.monotonic() < end
        and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        if aim == AIMS[1]:
            seen |= set(parts(out)) if out.exists() else set()
            if len(seen) >= number:
                break
        else:
            time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    killed = ended(pid) == -signal.SIGKILL
    with open(hear) as f:
        told = Counter(f.read())
    kept = _epochs(out)
    return {
        "kills": int(killed),
        "before the first file": int(killed and not (out / "run.json").exists()),
        "kills that left a half-written file": int(bool(parts(out))),
        "epochs lost while they were saved": before + told["e"] - kept,
        "saved epochs lost": max(0, before + told["s"] - kept),
        "other epochs lost": max(0, before + told["e"] - kept - 1),
    }


def _epochs(out: Path) -> int:
    path = out / "training.safetensors"
    return len(load_state(path, "training")["log"]) if path.exists() else 0


def _telling(fd: int) -> None:
    """Let a trainer tell of every epoch that is finished (e) and saved (s)."""
    epoch, save = TIETrainer.epoch, TIETrainer.save
    TIETrainer.epoch = lambda self, batches: (epoch(self, batches), os.write(fd, b"e"))[0]  # type: ignore[method-assign]
    TIETrainer.save = lambda self, path: (save(self, path), os.write(fd, b"s"))[0]  # type: ignore[method-assign,func-returns-value]


# 2. Damaged files.

PLACES = {
    "network": "network.safetensors",
    "training": "training.safetensors",
    "snapshot": "epochs/0002.safetensors",
    "scores": "scores.safetensors",
    "detector": "detector/detector.json",  # beside a run it would be what the command line decides by
    "run": "run.json",
}
SHARES = {
    "network": 0.24,
    "training": 0.26,
    "snapshot": 0.12,
    "scores": 0.12,
    "detector": 0.12,
    "run": 0.14,
}
"""How many of the damaged files are of each kind."""


def sound(place: Path) -> Path:
    """A whole run whose training stands after its second epoch of three, so that going on trains; with a detector."""
    images, out, stopped = draw(place / "images"), place / "sound", place / "stopped"
    warm(place, images)
    run(train(images, out), place / "said")
    run(
        train(images, stopped),
        place / "said",
        lambda: at_write(8, "half", lambda: os.kill(os.getpid(), signal.SIGKILL)),
    )  # in its third epoch
    assert _epochs(stopped) == 2
    shutil.copy(stopped / "training.safetensors", out)

    def save() -> None:
        detector = TIEDetector(TIENet.load(out / "network.safetensors"), false_alarm=0.25)
        detector.threshold = torch.tensor(0.5)
        detector.save(out / "detector")

    if ended(start(save, place / "said")) != 0:
        raise RuntimeError((place / "said").read_text())
    return out


def loaders(kind: str, out: Path, image: Path) -> dict[str, Callable[[], Any]]:
    """What could meet a damaged file of a kind in a run folder; each also uses what it was given."""

    def decide() -> None:
        net = TIENet.load(out / "network.safetensors")
        if net.image_shape:
            net.decide(net.from_unit(torch.full((1, *net.image_shape), 0.5)))

    def detect() -> None:
        detector = TIEDetector.load(out / "detector")
        shape = detector.model.net.image_shape  # type: ignore[union-attr]
        if shape:
            detector.predict(torch.full((1, *shape), 0.5))

    def resume() -> None:
        torch.manual_seed(0)
        settings = read_settings(out)
        net = TIENet(BACKBONES["conv3"](3, 2), 2, (3, 28, 28), head=settings.recipe.head)
        trainer = settings.recipe.trainer(net)
        trainer.load(out / "training.safetensors")
        trainer.epoch(
            [(torch.rand(32, 3, 28, 28), torch.arange(32) % 2)]
        )  # as many images as the run had

    path = out / PLACES[kind]
    state = {"load_state": lambda: load_state(path, kind) and None}
    score = {"tie-ext score": lambda: cli(["score", str(out), str(image)])}
    line = {
        "tie-ext score --false-alarm": lambda: cli(
            ["score", str(out), str(image), "--false-alarm", "0.25"]
        )
    }
    shown = {"tie-ext report": lambda: cli(["report", str(out)])}
    going_on = {"tie-ext train --resume": lambda: cli(train(out, out))}
    return {
        "network": {**state, "TIENet.load": decide, "TIEDetector.load": detect, **score, **shown},
        "training": {**state, "TIETrainer.load": resume, **shown, **going_on},
        "snapshot": {**state, "load_snapshots": lambda: load_snapshots(out) and None, **shown},
        "scores": {**state, **line, **shown},
        "detector": {"TIEDetector.load": detect},
        "run": {
            "read_settings": lambda: read_settings(out).record() and None,
            **shown,
            **going_on,
        },
    }[kind]


def damaged(place: Path, count: int, rng: np.random.Generator) -> dict:
    """Feed damaged files to every loader that could meet them, each in a process of its own."""
    good = sound(place)
    whole = {kind: (good / name).read_bytes() for kind, name in PLACES.items()}
    found: dict[str, Counter] = defaultdict(Counter)
    wrong, usual = [], {}
    for kind, share in SHARES.items():
        for name in loaders(kind, good, place):
            of = _fed(place, good, kind, name, whole[kind])
            if of["outcome"] != "loaded":
                raise RuntimeError(f"Expected {name} to take a sound file, but got {of['said']}")
            usual[kind, name] = of["memory"]
        others = {other: content for other, content in whole.items() if other != kind}
        for case, what in damage.cases(kind, whole[kind], others, round(share * count), rng):
            found[kind]["files"] += 1
            for name in loaders(kind, good, place):
                of = _fed(place, good, kind, name, what)
                size = len(what) / 2**20 if isinstance(what, bytes) else 0.0
                if (
                    of["outcome"] in ("refused", "loaded")
                    and of["memory"] > usual[kind, name] + 2 * size + ALLOWANCE
                ):
                    of["outcome"] = "memory"
                found[kind][of["outcome"]] += 1
                if of["outcome"] not in ("refused", "loaded"):
                    wrong.append({"file": PLACES[kind], "case": case, "loader": name, **of})
                if os.environ.get("FIRE_VERBOSE"):
                    print(
                        f"{kind:9} {case:55.55} {name:28} {of['outcome']:8} {of['memory']:5.0f} {of['said'][:150]}",
                        flush=True,
                    )
    outcomes = ("refused", "loaded", "crash", "hang", "memory")
    counts = {
        kind: {"files": of["files"], **{outcome: of[outcome] for outcome in outcomes}}
        for kind, of in found.items()
    }
    return {"seconds allowed": LIMIT, "MB allowed": ALLOWANCE, "by file": counts, "wrong": wrong}


def _fed(place: Path, good: Path, kind: str, name: str, what: bytes | str) -> dict:
    """What a loader makes of a damaged file."""
    out, said, used = place / "fed", place / "said", place / "used"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(good, out, copy_function=os.link)
    damage.put(out / PLACES[kind], what)
    used.unlink(missing_ok=True)

    def work() -> int:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(
            resource.RLIMIT_AS, (held + 4 * 2**30,) * 2
        )  # so that the machine outlives what is looked for
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        before = peak_memory() or 0
        try:
            return (
                loaders(kind, out, next((place / "images" / "test" / "dark").iterdir()))[name]()
                or 0
            )
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"tie-ext: {error}", file=sys.stderr)
            return 1
        finally:
            used.write_text(f"{(peak_memory() or 0) - before}")

    status = ended(start(work, said), 60)  # a machine that is shared may take that long
    lines = [line for line in said.read_text(errors="replace").splitlines() if line]
    refused = (
        status == 1
        and len(lines) >= 1
        and lines[-1].startswith("tie-ext: Expected ")
        and "Traceback" not in lines
    )
    outcome = (
        "hang"
        if status in (None, -signal.SIGXCPU, -signal.SIGKILL)
        else "loaded"
        if status == 0
        else "refused"
        if refused
        else "crash"
    )
    if parts(out):
        outcome = "crash"
    return {
        "outcome": outcome,
        "memory": float(used.read_text()) if used.exists() else 0.0,
        "said": f"{status}: {' '.join(lines)[-300:]}",
    }


# 3. A full disk.


def full(place: Path, every: int = 1) -> dict:
    """Let each write of a run, a report, a detector and a list of scores find the disk full, one at a time (or one in ``every``)."""
    images, whole, out = draw(place / "images"), place / "whole", place / "full"
    warm(place, images)
    run(train(images, whole), place / "said")
    shutil.copytree(whole, place / "shown")
    image = str(next((images / "test" / "dark").iterdir()))
    rows = {
        "train": Counter[str](),
        "report": Counter[str](),
        "detector": Counter[str](),
        "score": Counter[str](),
        "a small disk": Counter[str](),
    }

    def enospc(folder: Path) -> None:
        shutil.rmtree(place / "before", ignore_errors=True)
        for name, content in _contents(folder):
            (place / "before" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "before" / name).write_bytes(content)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save() -> int:
        TIEDetector(TIENet.load(whole / "network.safetensors")).save(place / "shown")
        return 0

    for name, arguments in (
        ("train", train(images, out)),
        ("report", ["report", str(place / "shown")]),
        ("detector", None),
    ):
        for number in range(1, 100, every):
            shutil.rmtree(out, ignore_errors=True)
            folder = out if name == "train" else place / "shown"
            work = save if arguments is None else lambda a=arguments: cli(a)

            def failing(n=number, f=folder, w=work):
                at_write(n, "half", lambda: enospc(f))
                return _said(w)

            status = ended(start(failing, place / "said"))
            if status == 0:
                break
            old, new, said = (
                dict(_contents(place / "before")),
                dict(_contents(folder)),
                (place / "said").read_text(),
            )
            rows[name].update(
                {
                    "writes": 1,
                    "said so": int(
                        status == 1
                        and "tie-ext: Expected to write " in said
                        and os.strerror(errno.ENOSPC) in said
                    ),
                    "earlier files intact": int(new == old),
                    "files left half-written": len(parts(folder)),
                }
            )
            if name == "train":
                rows[name]["went on to the same end"] += run(
                    train(images, out), place / "said"
                ) == 0 and _same(whole, out)
    status = ended(
        start(lambda: _to(Path("/dev/full"), ["score", str(whole), image]), place / "said")
    )
    said = (place / "said").read_text()
    rows["score"].update(
        {
            "writes": 1,
            "said so": int(status == 1 and said.startswith("tie-ext: Expected to write")),
        }
    )
    small = _small_disk(place, images, whole)
    if small:
        rows["a small disk"].update(small)
    return {name: dict(row) for name, row in rows.items() if row}


def _said(work: Callable[[], int]) -> int:
    """What the command line would say of an error."""
    try:
        return work()
    except OSError as error:
        print(f"tie-ext: {error.strerror}", file=sys.stderr)
        return 1


def _to(path: Path, arguments: list[str]) -> int:
    """A command whose output goes to a file."""
    os.dup2(os.open(path, os.O_WRONLY), 1)
    return cli(arguments)


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.rglob("*"):
        if path.is_file() and path.name != ".lock" and path.suffix != ".part":
            yield str(path.relative_to(folder)), path.read_bytes()


def _same(one: Path, other: Path) -> bool:
    return all(
        (other / name).is_file() and filecmp.cmp(one / name, other / name, shallow=False)
        for name in RESULTS
    )


def _small_disk(place: Path, images: Path, whole: Path) -> dict[str, int]:
    """Runs on disks in memory that are too small, and are then made larger; nothing where this user may not make disks."""
    disk, found = place / "disk", Counter[str]()
    disk.mkdir()
    for size in (0.1, 0.5, 1, 1.5, 2, 3, 4, 5):
        option = f"size={int(size * 1024)}k"
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", option, "tie_ext", disk], capture_output=True
        ).returncode:
            return {}
        try:
            out = disk / "run"
            status, said = run(train(images, out), place / "said"), (place / "said").read_text()
            if status != 0:
                found["writes"] += 1
                found["said so"] += status == 1 and "tie-ext: Expected to write " in said
                found["files left half-written"] += len(parts(disk))
                subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
                found["went on to the same end"] += run(
                    train(images, out), place / "said"
                ) == 0 and _same(whole, out)
        finally:
            subprocess.run(["umount", disk], check=True)
    return dict(found)


# The record and its page.


def page() -> str:
    """docs/research/under_fire.md; nothing where there is no record."""
    if not OUT.exists():
        return ""
    record = json.loads(OUT.read_text())
    killed, fed, disk = record["kill"], record["damage"], record["full disk"]
    aims = [
        {
            "killed at": aim,
            "runs / kills": f"{of['runs']} / {of['kills']}",
            "same end, bit for bit": str(of["bit-identical"]),
            "saved epochs lost": str(of["saved epochs lost"]),
            "half-written files left": str(of["half-written files left"]),
        }
        for aim, of in killed["by aim"].items()
    ]
    kinds = [
        {
            "file": PLACES[kind].replace("0002", "*").removeprefix("detector/"),
            "damaged files": str(of["files"]),
            "refused": str(of["refused"]),
            "loaded": str(of["loaded"]),
            "crash / hang / memory": f"{of['crash']} / {of['hang']} / {of['memory']}",
        }
        for kind, of in fed["by file"].items()
    ]
    disks = [
        {
            "what was written": name,
            "failed writes": str(of["writes"]),
            "said so / earlier files intact": f"{of['said so']} / {of.get('earlier files intact', '-')}",
            "half-written files left": str(of.get("files left half-written", "-")),
            "went on to the same end": str(of.get("went on to the same end", "-")),
        }
        for name, of in disk.items()
    ]
    return PAGE.format(
        kill=table(aims), damage=table(kinds), disk=table(disks), command=record["command"], files=sum(of["files"] for of in fed["by file"].values()),
        halves=sum(of["kills that left a half-written file"] for of in killed["by aim"].values()),
        seconds=fed["seconds allowed"], memory=fed["MB allowed"],
        values=MAX_VALUES, processor=record["processor"],
        commit=record["commit"][:7],
    )  # fmt: skip


PAGE = """# Under fire

What happens to a run that is killed, to a file that is damaged, and on a disk that is full. Generated by `python tests/bench/tables.py` from
`docs/results/fire.json`; measured by

    {command}

on {processor}, at commit {commit}. A small version is a unit test.

## Killed

A small run of three epochs is killed by SIGKILL up to three times, unless it ends first, and gone on with by `tie-ext train --resume`. The
moments: any; as soon as a half-written file is there; inside a write. At the end its network and its scores are compared with those of a run
that was left alone.
{halves} of the kills left a half-written file; going on clears it away.

{kill}

The epoch in progress is lost, and trained again. A run that is killed before its first file is started anew.

## Damaged files

{files} files, drawn by a seed from sound ones: truncated; bits flipped; wrong types, numbers and sizes in their fields; tensors of other types and
shapes; files of other kinds and programs; folders, pipes and loops in the file's place. Each goes to all that could meet it: the loaders, and
`tie-ext score`, `report` and `train --resume`; counted below are these meetings. Each must be refused by an error that says what was expected and
what came, or load and then work, in {seconds} seconds of a processor and {memory} MB beyond what the sound file takes and twice the file's size.

{damage}

What loads: a value that is another one within its range, such as a weight with a flipped bit; a change in a part that its reader does not read,
as a report reads only the log of a training state; and what `load_state` is given, which knows the form of a file and not its fields.

## A full disk

Every write of a run, a report, a detector and a list of scores finds the disk full, one at a time. The error says so, the file that was there
before stays, and the run can be gone on with. A small disk: one in memory that fills up as the run goes on.

{disk}

## Limits

A file's own checksum is not kept: a flipped bit in a weight is not noticed. A training state without the counts of its classes, or with an
optimiser's tensors of another type, is taken. A trainer that has refused a file may be half loaded: make it anew. A disk that loses what it
has confirmed, as in a power cut, was not tried. A network may claim images of up to {values} values; scoring then takes what such images take.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=50, help="runs to kill")
    parser.add_argument("--files", type=int, default=300, help="files to damage")
    parser.add_argument(
        "--every", type=int, default=1, help="let one write in so many find the disk full"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        choices=("kill", "damage", "full disk"),
        help="one part; the record keeps the others",
    )
    parser.add_argument("--out", type=Path, default=OUT)
    a = parser.parse_args()
    works: dict[str, Callable[[Path], dict]] = {
        "kill": lambda place: kill(place, a.trials, np.random.default_rng(a.seed)),
        "damage": lambda place: damaged(place, a.files, np.random.default_rng(a.seed)),
        "full disk": lambda place: full(place, a.every),
    }
    for name, work in works.items():
        if a.only in (None, name):
            with tempfile.TemporaryDirectory() as place:
                found = work(Path(place))
            record = json.loads(a.out.read_text()) if a.out.exists() else {}
            write_json(
                a.out,
                {
                    **record,
                    name: found,
                    **provenance(),
                    "command": f"python tests/bench/fire.py --trials {a.trials} --files {a.files}",
                },
            )
            print(name, json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
