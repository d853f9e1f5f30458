"""Training in several processes at once (``torch.distributed``): what has to be the same in all of them is made so here.

With one process, or none initialised, every function gives back what it got. Each process reads its own share of the data
(``DistributedSampler``) and keeps its own share of the garbage pool.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    # Its functions have the process group as a default argument. The first optimizer imports it; where that comes after
    # init_process_group, the group outlives destroy_process_group, and its threads can abort the process as Python ends.
    import torch.distributed.nn.functional

BUCKET = 2**23
"""Numbers sent in one message: 32 MB."""


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world() > 1 else 0


def share(count: int) -> int:
    """This process's part of a count, rounded up."""
    return -(-count // world())


def broadcast(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    if world() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, 0)


def average_gradients(module: nn.Module) -> None:
    """Replace the gradients of a module by their mean over all processes."""
    _average(p.grad for p in module.parameters() if p.grad is not None)


def average_statistics(module: nn.Module) -> None:
    """Replace BatchNorm's running means and variances by their means over all processes."""
    _average(
        buffer
        for name, buffer in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    )


def _average(tensors: Iterable[Tensor]) -> None:
    if world() > 1:
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            for tensor, mean in zip(
                bucket, (flat / world()).split([tensor.numel() for tensor in bucket]), strict=True
            ):
                tensor.copy_(mean.view_as(tensor))


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors by type and device, together at most :data:`BUCKET` numbers or a single tensor: one message each, instead of one a tensor."""
    filling: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        if (
            kind in filling
            and sum(other.numel() for other in filling[kind]) + tensor.numel() > BUCKET
        ):
            yield filling.pop(kind)
        filling.setdefault(kind, []).append(tensor)
    yield from filling.values()


def total(x: Tensor, device: torch.device) -> Tensor:
    """The sum of a tensor over all processes, on its own device; ``device`` is where processes can talk (NCCL: the GPU)."""
    if world() == 1:
        return x
    y = x.to(device, copy=True)
    dist.all_reduce(y)
    return y.to(x.device)


def gathered(x: Tensor, device: torch.device) -> Tensor:
    """The tensors ``(N_rank, ...)`` of all processes, one after the other."""
    if world() == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(x)], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, *x.shape[1:], dtype=x.dtype, device=device)
    padded[: len(x)] = x.to(device)
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)]).to(
        x.device
    )
