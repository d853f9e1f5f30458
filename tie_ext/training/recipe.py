"""A method by the names of its parts, as command lines, configs and records have them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch.nn.functional as F

from tie_ext.models.network import HEADS, TIENet
from tie_ext.outliers import SYNTHESIZERS, make
from tie_ext.outliers.base import Prior
from tie_ext.outliers.saliency import uniform_criterion
from tie_ext.training.config import TIEConfig
from tie_ext.training.strategies import Criterion, LinearGarbage, MultilayerGarbage
from tie_ext.training.trainer import TIETrainer
from tie_ext.utils.checks import check_choice
from tie_ext.utils.distributed import rank
from tie_ext.utils.random import FIRST_WEIGHTS, seeded
from tie_ext.utils.settings import plain

CRITERIA: dict[str, Criterion] = {"garbage": F.cross_entropy, "uniform": uniform_criterion}
"""Losses by name: garbage is a class of its own, or (ASCOOD's) all outputs are equally likely."""
PRIORS = tuple(name for name, (cls, _) in SYNTHESIZERS.items() if issubclass(cls, Prior))
"""The synthesizers that a pool can begin with."""


def names(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names in a list, or in one word with commas between; ``none`` and None for no name."""
    if value is None or value == "none":
        return ()
    return tuple(value.split(",")) if isinstance(value, str) else tuple(value)


def default_prior(head: str) -> tuple[str, ...]:
    """The name of what the pool of a trainer begins with, for one of the heads."""
    prior = (LinearGarbage if head == "linear" else MultilayerGarbage).prior_class
    known = (prior, prior.settings_class())
    return tuple(name for name, found in SYNTHESIZERS.items() if found == known)


@dataclass(frozen=True)
class Recipe:
    """A method by the names of its parts.

    Raises:
        ValueError: If a name is unknown.
    """

    config: TIEConfig = field(default_factory=TIEConfig)
    """The settings of the loop."""
    synthesizers: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {"inversion": {}}
    )
    """Of :data:`tie_ext.outliers.SYNTHESIZERS`, with settings that differ from the defaults."""
    prior: tuple[str, ...] | None = None
    """What the pool begins with, of :data:`PRIORS`; empty for nothing, None for
    :func:`default_prior`."""
    criterion: str = "garbage"
    """Of :data:`CRITERIA`."""
    head: str = "linear"
    """What gives the garbage logit, of :data:`tie_ext.models.network.HEADS`."""

    def __post_init__(self) -> None:
        check_choice("head to be", self.head, HEADS)
        check_choice("a criterion,", self.criterion, CRITERIA)
        if self.prior is None:
            object.__setattr__(self, "prior", default_prior(self.head))
        for name in self.synthesizers:
            check_choice("a synthesizer,", name, SYNTHESIZERS)
        for name in self.prior or ():
            check_choice("a prior,", name, PRIORS)

    def trainer(self, net: TIENet, progress: bool = False) -> TIETrainer:
        """The trainer of a network by this method.

        Raises:
            ValueError: If a setting is unknown or out of range, or the network has no image shape.
        """
        # Generators and VAEs begin as the seed says, whatever was drawn before.
        with seeded(self.config.seed, 0, rank(), FIRST_WEIGHTS):
            synthesizers = [
                make(name, net, **settings) for name, settings in self.synthesizers.items()
            ]
            prior = cast(list[Prior], [make(name, net) for name in self.prior or ()])
        criterion = CRITERIA[self.criterion]
        return TIETrainer(net, self.config, synthesizers, prior, criterion, progress)

    def record(self) -> dict[str, Any]:
        """The method as JSON, with every setting, defaults included."""
        settings = {
            name: plain(replace(SYNTHESIZERS[name][1], **changed))  # type: ignore[type-var]
            for name, changed in self.synthesizers.items()
        }
        parts = {"prior": list(self.prior or ()), "criterion": self.criterion, "head": self.head}
        return {"config": plain(self.config), "synthesizers": settings, **parts}

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> "Recipe":
        """The method of a :meth:`record`; a setting that is newer than it has its default.

        Raises:
            KeyError: If the record lacks a part.
            ValueError: If a name or a setting is unknown.
        """
        known = {f.name for f in fields(TIEConfig)}
        if unknown := sorted(set(record["config"]) - known):
            raise ValueError(
                f"Expected settings among {', '.join(sorted(known))}, but got {', '.join(unknown)}"
            )
        recipe = cls(
            TIEConfig(**record["config"]),
            record["synthesizers"],
            tuple(record["prior"]),
            record["criterion"],
            record.get("head", "linear"),
        )
        recipe.record()  # which looks at the settings of synthesizers
        return recipe
