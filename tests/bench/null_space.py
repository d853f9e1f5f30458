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

from tie_ext.comparison import provenance
from tie_ext.files import write_json
from tie_ext.outliers.boundary import VAE, normal, tangent

BATCH, LATENT, REPEATS = 64, 8, 5
OUT = Path(__file__).parents[2] / "docs" / "results" / "null_space.json"


def by_projection(vae: VAE, x: Tensor, y: Tensor) -> Tensor:
    """As the package does it."""
    return normal(tangent(vae, x, y), torch.randn(len(x), x[0].numel()))


def by_null_space(vae: VAE, x: Tensor, y: Tensor) -> Tensor:
    """As the paper describes it: all basis vectors of the null space of each image's Jacobian, and a random combination of them."""
    z, out = vae.encode(x, y), []
    for i in range(len(x)):
        jacobian = torch.func.jacfwd(lambda code, i=i: vae.decode(code[None], y[i : i + 1]).flatten())(z[i])
        basis = torch.linalg.svd(jacobian, full_matrices=True).U[:, LATENT:]
        out.append(F.normalize(basis @ torch.randn(basis.shape[1]), dim=0))
    return torch.stack(out)


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
    vae = VAE((1, 28, 28), 10, LATENT).eval()
    x, y = torch.rand(BATCH, 1, 28, 28), torch.arange(BATCH) % 10
    basis = tangent(vae, x, y)
    for v in (by_projection(vae, x, y), by_null_space(vae, x, y)):  # both are normals
        assert (basis.mT @ v[:, :, None]).abs().max() < 1e-3
    fast, slow = seconds(by_projection, vae, x, y), seconds(by_null_space, vae, x, y)
    record = {"batch": BATCH, "latent": LATENT, "projection_s": fast, "null_space_s": slow, "ratio": slow / fast}
    print(record)
    write_json(OUT, {**record, **provenance(), "command": " ".join(["python", *sys.argv])})


if __name__ == "__main__":
    main()
