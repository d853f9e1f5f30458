"""tie_ext with the packages it declares and no others: every room of the core is imported, a
network is trained, saved and read again.

pip install . && python tests/minimal.py
"""

import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch

import tie_ext
from tie_ext.models.backbones import Conv3
from tie_ext.outliers import Inversion, InversionSettings

EXTRAS = ("pytorch_ood", "openood", "torchvision", "matplotlib", "sklearn", "PIL")
"""Packages that the core does without."""
WITH_EXTRAS = ("cli", "openood", "pytorch_ood")
"""Rooms that need them."""


def core() -> list[str]:
    """Names of the rooms that need no extras."""
    house = Path(tie_ext.__file__).parent
    rooms = (path.relative_to(house).with_suffix("").parts for path in sorted(house.rglob("*.py")))
    return [
        ".".join(("tie_ext", *(part for part in room if part != "__init__")))
        for room in rooms
        if room[0] not in WITH_EXTRAS
    ]


def main() -> None:
    """Raise where something is missing."""
    rooms = core()
    for room in rooms:
        import_module(room)
    if missing := {
        "tie_ext.utils.files",
        "tie_ext.outliers.inversion",
        "tie_ext.training.recipe",
    } - set(rooms):
        raise RuntimeError(
            f"Expected the rooms of the core, but got none of {', '.join(sorted(missing))}"
        )
    batches = [(torch.rand(8, 1, 28, 28), torch.arange(8) % 2)]
    net = tie_ext.TIENet(Conv3(1, 2), 2, (1, 28, 28))
    inversion = Inversion(net, InversionSettings(steps=2, width=4))
    tie_ext.TIETrainer(
        net, tie_ext.TIEConfig(epochs=1, candidates=12, pool_size=20), [inversion]
    ).epoch(batches)
    with tempfile.TemporaryDirectory() as folder:
        net.eval().save(Path(folder) / "network.safetensors")
        again = tie_ext.TIENet.load(Path(folder) / "network.safetensors")
    if not torch.equal(again.decide(batches[0][0]).level, net.decide(batches[0][0]).level):
        raise RuntimeError(
            "Expected the same decisions from a network that was saved and read again"
        )
    if loaded := [name for name in EXTRAS if sys.modules.get(name)]:
        raise RuntimeError(f"Expected the core to load no extras, but got {', '.join(loaded)}")
    print(
        f"tie_ext {tie_ext.__version__} from {Path(tie_ext.__file__).parent}: {len(rooms)} rooms, an epoch, a file, and no extras"
    )


if __name__ == "__main__":
    main()
