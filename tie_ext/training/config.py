"""The settings of TIE's loop; who proposes outliers has settings of its own."""

import math
from dataclasses import dataclass

from tie_ext.models.network import AUTOCAST_DTYPES
from tie_ext.utils.settings import Settings, setting


@dataclass(frozen=True)
class TIEConfig(Settings):
    """Every setting of the loop. The defaults are the paper's, or say why not in ``docs/research/defaults.md``.

    Raises:
        ValueError: If a setting is out of range.
    """

    epochs: int = setting(
        20,
        "T, the length of the run; the schedules of learning rate and gamma span it.",
        low=1,
        high=10**6,
    )
    lr: float = setting(
        1e-3,
        "Learning rate of the classifier (Adam) in the first epoch; it falls along half a cosine (the paper: 1e-4 throughout).",
        low=0,
        high=1,
        above=True,
    )
    lam: float = setting(
        2.0,
        "lambda in tau = mean + lambda * std (the paper: 0.5, docs/research/defaults.md); -inf excludes every candidate (--lam=-inf).",
        low=-math.inf,
        high=1e6,
    )
    candidates: int = setting(
        2000,
        "Outliers proposed an epoch by each synthesizer: a tenth of the pool, for any number of classes.",
        low=1,
        high=10**9,
    )
    pool_size: int = setting(
        20_000,
        "Most garbage images kept, as uint8: 16 MB at 28x28 grey, 60 MB at 32x32 colour, 3 GB at 224x224 colour.",
        low=1,
        high=10**9,
    )
    garbage_weight: float = setting(
        1.0,
        "Weight of the garbage class in the loss, where the ID classes together have 10 (Vernekar et al.: 0.1).",
        low=0,
        high=1e6,
        above=True,
    )
    adversarial_steps: int = setting(
        0,
        "Steps that move a batch's garbage to where the network is pgd of a class: with 5, searched images are harder to find (ACET: 40).",
        low=0,
        high=1000,
    )
    autocast_dtype: str = setting(
        "float32",
        "Arithmetic inside the backbone: float32, or bfloat16 (autocast: weights, features and logits stay float32), which is faster on GPUs and "
        "CPUs that have it, and slower on others.",
        choices=AUTOCAST_DTYPES,
    )
    seed: int = setting(0, "Seed of all that is random inside an epoch.", low=0, high=2**31 - 1)

    def lr_in(self, epoch: int) -> float:
        """Learning rate of the classifier in an epoch, counted from 0; past the run's length it stays that of the last."""
        return self.lr * (1 + math.cos(math.pi * min(epoch, self.epochs - 1) / self.epochs)) / 2
