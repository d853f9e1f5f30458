"""Other papers' outliers behind TIE's interface, one paper a file; :data:`SYNTHESIZERS` has all of them by name."""

from tie_ext.inversion import Inversion
from tie_ext.networks import TIENet
from tie_ext.outliers.boundary import ManifoldBoundary
from tie_ext.outliers.latent import MarginalRepresentations
from tie_ext.outliers.saliency import Saliency
from tie_ext.synthesis import Noise, Synthesizer

SYNTHESIZERS: dict[str, tuple[type[Synthesizer], dict]] = {
    "inversion": (Inversion, {}),
    "boundary": (ManifoldBoundary, {}),
    "marginal": (MarginalRepresentations, {}),
    "gradient": (Saliency, {"kind": "gradient"}),
    "shuffle": (Saliency, {"kind": "shuffle"}),
    "white": (Noise, {"multiscale": False}),
    "multiscale": (Noise, {"multiscale": True}),
}
"""What ``--synthesizer`` takes: TIE's inversion, Vernekar et al., DMR, ASCOOD (two kinds), and noise (two kinds); class and settings."""


def make(name: str, net: TIENet, **settings) -> Synthesizer:
    """A synthesizer for a network's images.

    Arguments:
        name: One of :data:`SYNTHESIZERS`.
        net: The network it is to propose outliers for.
        settings: What else its class takes.

    Raises:
        ValueError: If there is no such name.
    """
    if name not in SYNTHESIZERS:
        raise ValueError(f"Expected a synthesizer, one of {', '.join(SYNTHESIZERS)}, but got {name!r}")
    cls, fixed = SYNTHESIZERS[name]
    settings = {**fixed, **settings, "low": net.low.cpu(), "high": net.high.cpu()}
    if cls not in (Noise, Saliency):  # which take images as they come
        settings |= {"image_shape": net.image_shape, "num_classes": net.num_classes}
    return cls(**settings)
