"""Training in the processes that ``torchrun`` starts: one run folder, to which the first writes; each has its share of the images and of the pool.

RUN/process-1-0003.safetensors is what process 1 needs to go on after epoch 3. It is on disk before RUN/training.safetensors says that epoch 3 is
done, and goes when epoch 4 is: wherever the processes are killed, one epoch's files are whole.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from tie_ext.cli.images import Images
from tie_ext.training.trainer import TIETrainer
from tie_ext.utils.distributed import rank, world
from tie_ext.utils.files import load_state

Some = TypeVar("Some", bound=Images)


@contextmanager
def together(device: str) -> Iterator[str]:
    """Inside, the processes that ``torchrun`` started train as one; gives the device of this one. Where it did not start any, nothing changes.

    Arguments:
        device: As the user says it; ``cuda`` is one GPU a process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def share_of(images: Some, seed: int) -> Some:
    """This process's images: as many as any other's, the same in every epoch, drawn by the seed; some are in two shares where they do not divide."""
    if world() == 1:
        return images
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.take(torch.cat([rows, rows[: -len(rows) % world()]])[rank() :: world()])


def save(folder: Path, trainer: TIETrainer) -> None:
    """Write what all processes need to go on after this epoch."""
    mine = _of(folder, rank(), len(trainer.log))
    if not first():
        trainer.save(mine)
    _wait()
    if first():
        trainer.save(folder / "training.safetensors")
    _wait()
    if not first():
        for old in set(folder.glob(f"process-{rank()}-*.safetensors")) - {mine}:
            old.unlink()


def load(folder: Path, trainer: TIETrainer) -> None:
    """Put this process's trainer where :func:`save` left it.

    Raises:
        ValueError: If the run was begun by another number of processes, or a file is damaged or of another run.
    """
    epoch = len(load_state(folder / "training.safetensors", "training", ("log",))["log"])
    done = epoch >= trainer.config.epochs
    began = 1 + len(list(folder.glob(f"process-*-{epoch:04d}.safetensors")))
    if began != world() and not done:
        how = (
            "without torchrun"
            if began == 1
            else f"as torchrun --nproc-per-node {began} -m tie_ext.cli.main train --resume {folder}"
        )
        raise ValueError(
            f"Expected {began} processes to go on with {folder}, as it was begun by so many, but got {world()}; go on {how}"
        )
    # A finished run is only scored, which the first process does.
    trainer.load(
        folder / "training.safetensors" if first() or done else _of(folder, rank(), epoch)
    )


def clear(folder: Path) -> None:
    """Take away what only going on needs, of the other processes too where this is the first, which asks before they begin."""
    for old in folder.glob(
        "process-*-*.safetensors" if first() else f"process-{rank()}-*.safetensors"
    ):
        old.unlink(missing_ok=True)


def _of(folder: Path, process: int, epoch: int) -> Path:
    return folder / f"process-{process}-{epoch:04d}.safetensors"


def _wait() -> None:
    if world() > 1:
        dist.barrier()
