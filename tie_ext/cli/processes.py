"""Training in the processes that ``torchrun`` starts: one run folder, to which the first writes;
each has its share of the images and of the pool.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from tie_ext.cli.images import ImageSet
from tie_ext.utils.distributed import world


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


def share_of(images: ImageSet, seed: int) -> ImageSet:
    """The images of this process: as many as any other's, the same in every epoch, by the seed."""
    if world() == 1:
        return images
    return images.take(torch.tensor(list(DistributedSampler(images, seed=seed))))
