"""Training in several processes (``torch.distributed``): what must be the same in all of them.

In one process every function returns its input. Each process reads its own share of the data
(``DistributedSampler``) and keeps its own share of the garbage pool.

Not DistributedDataParallel: as long as it lives it keeps the process group alive after
``destroy_process_group``, whose threads can then abort Python at exit. It expects a gradient for
every parameter, which a classifier trained apart from its garbage head does not give. And the
generators and VAEs of synthesizers need the same functions.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

if dist.is_available():
    # Its functions have the process group as a default argument. The first optimizer imports it;
    # after init_process_group, the group would outlive destroy_process_group as above.
    import torch.distributed.nn.functional


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
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
    running = ("running_mean", "running_var")
    _average(buffer for name, buffer in module.named_buffers() if name.endswith(running))


def _average(tensors: Iterable[Tensor]) -> None:
    """Average in place, by one message for each type and device."""
    kinds = defaultdict(list)
    for tensor in tensors if world() > 1 else ():
        kinds[tensor.dtype, tensor.device].append(tensor)
    for group in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in group]
        for tensor, mean in zip(group, flat.div_(world()).split(sizes), strict=True):
            tensor.copy_(mean.view_as(tensor))


def total(x: Tensor, device: torch.device) -> Tensor:
    """The sum of a tensor over all processes, on its own device; ``device`` is where processes
    communicate (NCCL: the GPU).
    """
    if world() == 1:
        return x
    y = x.to(device, copy=True)
    dist.all_reduce(y)
    return y.to(x.device)


def gathered(x: Tensor, device: torch.device) -> Tensor:
    """The tensors ``(N_rank, ...)`` of all processes in one; ``device`` as in :func:`total`."""
    if world() == 1:
        return x
    sizes = total((torch.arange(world()) == rank()) * len(x), device).tolist()
    padded = torch.zeros(max(sizes), *x.shape[1:], dtype=x.dtype, device=device)
    padded[: len(x)] = x
    parts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).to(x.device)
