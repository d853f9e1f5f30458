"""Type I outliers: projecting off the tangent space against building the null space, at 28x28 with 8 latent dimensions.

    python tests/bench/null_space.py

Prints seconds for a batch of images and their ratio, and writes docs/results/null_space.json.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tie_ext.outliers.base import Domain
from tie_ext.outliers.boundary import jacobian, normal
from tie_ext.outliers.vae import VAE
from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance

BATCH, LATENT, REPEATS = 64, 8, 5
OUT = Path(__file__).parents[2] / "docs" / "results" / "null_space.json"


def by_projection(J: Tensor) -> Tensor:
    """As the package does it, from the Jacobians ``(B, D, L)`` of a batch."""
    return normal(torch.linalg.qr(J).Q, torch.randn(J.shape[:2]))


def by_null_space(J: Tensor) -> Tensor:
    """As the paper describes it: all basis vectors of the null space of each image's Jacobian, and a random combination of them."""
    bases = [torch.linalg.qr(each, mode="complete").Q[:, LATENT:] for each in J]
    return torch.stack(
        [F.normalize(basis @ torch.randn(basis.shape[1]), dim=0) for basis in bases]
    )


def seconds(function: Callable, *arguments) -> float:
    """Median of some runs after one to warm up."""
    function(*arguments)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return sorted(times)[REPEATS // 2]


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    vae = VAE(Domain(10, (1, 28, 28), torch.tensor(0.0), torch.tensor(1.0)), LATENT).eval()
    x, y = torch.rand(BATCH, 1, 28, 28), torch.arange(BATCH) % 10
    z = vae.encode(x, y)
    J = jacobian(vae, z, y)
    for v in (by_projection(J), by_null_space(J)):  # both are normals, of unit length
        assert (J.mT @ v[:, :, None]).abs().max() < 1e-3 * J.abs().max()
        assert (v.norm(dim=1) - 1).abs().max() < 1e-4
    fast, slow, common = (
        seconds(by_projection, J),
        seconds(by_null_space, J),
        seconds(jacobian, vae, z, y),
    )
    record = {
        "batch": BATCH,
        "latent": LATENT,
        "projection_s": fast,
        "null_space_s": slow,
        "ratio": slow / fast,
        "jacobian_of_both_s": common,
    }
    print(record)
    write_json(OUT, {**record, **provenance(), "command": " ".join(["python", *sys.argv])})


if __name__ == "__main__":
    main()
