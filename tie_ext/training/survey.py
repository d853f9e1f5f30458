"""The data of a run: that it has every class, stays the same, and is sound in every process."""

import torch
from torch import Tensor

from tie_ext.outliers.base import Loader
from tie_ext.utils.checks import check_class_counts
from tie_ext.utils.distributed import gathered, total


def survey(batches: Loader, num_classes: int, device: torch.device) -> Tensor:
    """Read all data before several processes train.

    A process that found bad data while others train would leave them waiting for it, so each reads
    its share before; what is wrong in one is raised in all.

    Arguments:
        batches: Those of this process.
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
        for _, y in batches:
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


def check_counts(counts: Tensor, before: Tensor | None) -> None:
    """Refuse data that lacks a class, or that is not the data a run began with.

    Arguments:
        counts: Images of each class ``(n,)``.
        before: The same of the first epoch; None in the first.

    Raises:
        ValueError: With both.
    """
    check_class_counts(counts)
    if before is None:
        return
    # A loader that drops its last batch differs a little.
    if abs(int(counts.sum()) - int(before.sum())) > 0.1 * int(before.sum()):
        raise ValueError(
            f"Expected the data this run began with, {before.tolist()} images of each class, but "
            f"got {counts.tolist()}"
        )
