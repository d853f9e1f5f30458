"""Methods that propose outliers: TIE's inversion, noise, procedural images, and one file for each
other paper. :data:`SYNTHESIZERS` has them by name.
"""

from dataclasses import replace

from tie_ext.models.network import TIENet
from tie_ext.outliers.base import Candidates, Domain, Prior, Synthesizer
from tie_ext.outliers.boundary import BoundarySettings, ManifoldBoundary
from tie_ext.outliers.inversion import Inversion, InversionSettings
from tie_ext.outliers.marginal import MarginalRepresentations, MarginalSettings
from tie_ext.outliers.noise import Noise, NoiseSettings
from tie_ext.outliers.procedural import Procedural, ProceduralSettings
from tie_ext.outliers.saliency import Saliency, SaliencySettings
from tie_ext.utils.checks import check_choice
from tie_ext.utils.settings import Settings

SYNTHESIZERS: dict[str, tuple[type[Synthesizer], Settings]] = {
    "inversion": (Inversion, InversionSettings()),
    "boundary": (ManifoldBoundary, BoundarySettings()),
    "marginal": (MarginalRepresentations, MarginalSettings()),
    "gradient": (Saliency, SaliencySettings(kind="gradient")),
    "shuffle": (Saliency, SaliencySettings(kind="shuffle")),
    "white": (Noise, NoiseSettings(kind="white")),
    "multiscale": (Noise, NoiseSettings(kind="multiscale")),
    "procedural": (Procedural, ProceduralSettings()),
}
"""Class and default settings by the name that command lines and configs use: TIE's inversion,
Vernekar et al., DMR, ASCOOD and noise (two kinds each), procedural images.
"""
__all__ = [
    "SYNTHESIZERS",
    "BoundarySettings",
    "Candidates",
    "Domain",
    "Inversion",
    "InversionSettings",
    "ManifoldBoundary",
    "MarginalRepresentations",
    "MarginalSettings",
    "Noise",
    "NoiseSettings",
    "Prior",
    "Procedural",
    "ProceduralSettings",
    "Saliency",
    "SaliencySettings",
    "Synthesizer",
    "make",
]


def make(name: str, domain: TIENet | Domain, **settings) -> Synthesizer:
    """A synthesizer by name.

    Arguments:
        name: One of :data:`SYNTHESIZERS`.
        domain: The network that the outliers are for, or the :class:`Domain` of its data.
        settings: Settings that differ from the defaults of the name.

    Raises:
        ValueError: If there is no such name, or a setting is unknown or out of range.
    """
    check_choice("a synthesizer,", name, SYNTHESIZERS)
    cls, defaults = SYNTHESIZERS[name]
    if unknown := sorted(set(settings) - set(defaults.__dataclass_fields__)):
        raise ValueError(
            f"Expected settings of {name} among {', '.join(defaults.__dataclass_fields__)}, "
            f"but got {', '.join(unknown)}"
        )
    return cls(domain, replace(defaults, **settings))
