"""A look at all data before several processes train.

A process that found bad data while others train would leave them waiting for it, so each reads its
share once before; what is wrong in one is raised in all.
"""

import torch
from torch import Tensor

from tie_ext.utils.distributed import gathered, total
from tie_ext.utils.loader import BatchReader


def survey(reader: BatchReader, num_classes: int, device: torch.device) -> Tensor:
    """Read this process's share.

    Arguments:
        reader: Its labelled batches.
        num_classes: n.
        device: Where the processes communicate.

    Returns:
        Images of each class ``(n,)``, of all processes.

    Raises:
        ValueError: In every process: if the data of one is bad, or they have different numbers of
            batches or of batches of one image.
    """
    counts = torch.zeros(num_classes, dtype=torch.long)
    sizes, error = torch.zeros(1, 2, dtype=torch.long), None
    try:
        for _, y in reader:
            counts += y.cpu().bincount(minlength=num_classes)
            sizes += torch.tensor([1, len(y) == 1])
    except Exception as found:
        error = found
    failed = int(total(torch.tensor(int(error is not None)), device))
    if error is not None:
        raise error
    if failed:
        raise ValueError(
            f"Expected sound data in every process, but got an error in {failed} of them, which "
            "says more"
        )
    sizes = gathered(sizes, device)
    if bool((sizes != sizes[0]).any()):
        raise ValueError(
            "Expected as many batches in every process, as a DistributedSampler gives them, but "
            f"got {sizes[:, 0].tolist()}, of which {sizes[:, 1].tolist()} of one image"
        )
    return total(counts, device)
