"""Training in the processes that ``torchrun`` starts: one run folder, to which the first writes;
each has its share of the images and of the pool.

RUN/process-1-0003.safetensors is what process 1 needs to go on after epoch 3. It is on disk before
RUN/training.safetensors says that epoch 3 is done, and is deleted when epoch 4 is: wherever the
processes are killed, one epoch's files are whole.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from tie_ext.cli.images import AnyImages
from tie_ext.training.trainer import TIETrainer
from tie_ext.utils.distributed import rank, world
from tie_ext.utils.files import load_state


@contextmanager
def together(device: str) -> Iterator[str]:
    """Inside, the processes that ``torchrun`` started train as one; without it nothing changes.

    Arguments:
        device: The device that the user asks for; ``cuda`` is one GPU per process.

    Returns:
        The device of this process.
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


def share_of(images: AnyImages, seed: int) -> AnyImages:
    """The images of this process: as many as any other's, the same in every epoch, by the seed;
    some are in two shares where their number does not divide.
    """
    if world() == 1:
        return images
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.take(torch.cat([rows, rows[: -len(rows) % world()]])[rank() :: world()])


def save(folder: Path, trainer: TIETrainer) -> None:
    """Write what all processes need to go on after this epoch."""
    mine = _file(folder, rank(), len(trainer.log))
    if not first():
        trainer.save(mine)
    _wait()
    if first():
        trainer.save(folder / "training.safetensors")
    _wait()
    if not first():
        for old in {*folder.glob(f"process-{rank()}-*.safetensors")} - {mine}:
            old.unlink()


def load(folder: Path, trainer: TIETrainer) -> None:
    """Put this process's trainer where :func:`save` left it.

    Raises:
        ValueError: If another number of processes started the run, or a file is damaged or of
            another run.
    """
    state = folder / "training.safetensors"
    epoch = len(load_state(state, "training", ("log",))["log"])
    done = epoch >= trainer.config.epochs
    started = 1 + len(list(folder.glob(f"process-*-{epoch:04d}.safetensors")))
    if started != world() and not done:
        how = f"as torchrun --nproc-per-node {started} -m tie_ext.cli.main train --resume {folder}"
        raise ValueError(
            f"Expected {started} processes to continue {folder}, as many as started it, but got "
            f"{world()}; continue {how if started > 1 else 'without torchrun'}"
        )
    # A finished run is only scored, which the first process does.
    trainer.load(state if first() or done else _file(folder, rank(), epoch))


def clear(folder: Path) -> None:
    """Delete what only resuming needs; in the first process that of the others too, before they
    begin.
    """
    for old in folder.glob(f"process-{'*' if first() else rank()}-*.safetensors"):
        old.unlink(missing_ok=True)


def _file(folder: Path, process: int, epoch: int) -> Path:
    return folder / f"process-{process}-{epoch:04d}.safetensors"


def _wait() -> None:
    if world() > 1:
        dist.barrier()
