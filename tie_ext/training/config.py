"""The settings of training; each synthesizer has settings of its own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tie_ext.models.classifier import AUTOCAST_DTYPES
from tie_ext.training.augmentation import CorruptionConfig
from tie_ext.utils.settings import Settings, setting


@dataclass(frozen=True)
class TIEConfig(Settings):
    """The settings of the loop. The defaults are the paper's, or ``docs/research/defaults.md``
    says why they are not.

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
        "Learning rate of the classifier (Adam) in the first epoch; it falls along half a cosine "
        "(the paper: 1e-4 throughout).",
        low=0,
        high=1,
        above=True,
    )
    lam: float = setting(
        2.0,
        "lambda in tau = mean + lambda * std (the paper: 0.5, docs/research/defaults.md); -inf "
        "excludes every candidate (--lam=-inf).",
        low=-math.inf,
        high=1e6,
    )
    candidates: int = setting(
        2000,
        "Outliers that each synthesizer proposes in an epoch: a tenth of the pool; beside a head "
        "on every layer fewer, where there are few images.",
        low=1,
        high=10**9,
    )
    pool_size: int = setting(
        20_000,
        "Garbage images kept at most, as uint8: 16 MB at 28x28 grey, 60 MB at 32x32 colour, 3 GB "
        "at 224x224 colour.",
        low=1,
        high=10**9,
    )
    garbage_weight: float = setting(
        1.0,
        "Weight of the garbage class in the loss, where the ID classes together have 10 (Vernekar "
        "et al.: 0.1).",
        low=0,
        high=1e6,
        above=True,
    )
    adversarial_steps: int = setting(
        0,
        "PGD steps that turn the garbage images of a batch into adversarial ones; with 5, "
        "adversarial images that fool the network are harder to find (ACET: 40).",
        low=0,
        high=1000,
    )
    autocast_dtype: str = setting(
        "float32",
        "Arithmetic inside the backbone: float32, or bfloat16 (autocast: weights, features and "
        "logits stay float32), which is faster on GPUs and CPUs that support it, and slower on "
        "others.",
        choices=AUTOCAST_DTYPES,
    )
    seed: int = setting(0, "Seed of everything that is random in an epoch.", low=0, high=2**31 - 1)

    def lr_in(self, epoch: int) -> float:
        """Learning rate of the classifier in an epoch, counted from 0; past the end of the run it
        stays that of the last.

        Not CosineAnnealingLR: a function of the epoch needs no state to resume from, and serves
        whichever optimiser the trainer has been given.
        """
        return self.lr * (1 + math.cos(math.pi * min(epoch, self.epochs - 1) / self.epochs)) / 2


@dataclass(frozen=True)
class HeadConfig(Settings):
    """How a garbage head on every layer is fitted.

    Raises:
        ValueError: If a setting is out of range.
    """

    max_images: int = setting(
        3000,
        "ID images that a head is attached with at most, drawn at random.",
        low=2,
        high=10**9,
    )
    steps: int = setting(
        600,
        "Most steps of the optimiser in attach and in the last epoch of the loop; it stops where "
        "the loss on held-out images falls no more.",
        low=1,
        high=10**9,
    )
    epoch_steps: int = setting(
        200, "Steps in each other epoch, from where the head stood.", low=1, high=10**9
    )
    batch_size: int = setting(512, "Images in a step.", low=1, high=10**9)
    lr: float = setting(
        1e-3,
        "Learning rate of Adam in the first step; it falls along half a cosine.",
        low=0,
        high=1,
        above=True,
    )
    outliers: int = setting(
        2,
        "Outliers for each ID image, of each synthesizer in attach, and of each prior in the last "
        "epoch of the loop.",
        low=1,
        high=10**6,
    )
    epoch_outliers: int = setting(
        2, "Outliers of each prior for each ID image in each other epoch.", low=1, high=10**6
    )
    weight: float = setting(
        3.0,
        "Weight of all outliers together, where all ID images have 1: level 1 takes an accepted "
        "outlier to be as bad as three rejected ID images.",
        low=0,
        high=1e9,
        above=True,
    )
    memory: int = setting(
        2**28,
        "Bytes of statistics kept of ID images, as many of the same images corrupted, and as many "
        "of outliers; where there are more, a random sample is kept.",
        low=1,
        high=2**50,
    )
    corruption: CorruptionConfig = field(default_factory=CorruptionConfig)
    """How strongly the ID images are corrupted that the head learns beside those as they are."""


@dataclass(frozen=True)
class SampleConfig(Settings):
    """The random sample of an epoch's ID images that is kept in memory as they are trained on.

    BatchNorm's statistics, garbage head, tau and candidates are computed from it, so that an epoch
    reads each image once, and what TIE adds to plain training does not grow with the data. With a
    head on every layer it is smaller where there are few images
    (:meth:`tie_ext.training.strategies.GarbageStrategy.effort`).

    Raises:
        ValueError: If a setting is out of range.
    """

    size: int = setting(3000, "Images kept in an epoch at most.", low=2, high=10**9)
    last_size: int = setting(8192, "Images kept in the last epoch at most.", low=2, high=10**9)
    memory: int = setting(2**28, "Bytes of float32 images kept at most.", low=1, high=2**50)
    batch_size: int = setting(128, "Images of the sample in one forward pass.", low=1, high=10**9)

    def at_once(self, image_shape: Sequence[int]) -> int:
        """Images ``(C, S, S)`` of a sample that are held at once, >= 2."""
        return min(self.size, self.capacity(image_shape))

    def capacity(self, image_shape: Sequence[int]) -> int:
        """Images ``(C, S, S)`` that fit into :attr:`memory`, >= 2."""
        return max(2, self.memory // (4 * math.prod(image_shape)))
