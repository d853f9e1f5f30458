"""The network and the images of ``tie-ext demo``, with their card: tie_ext/cli/clothes/.

    python tests/bench/clothes.py --root DATA

DATA holds FashionMNIST as torchvision keeps it. The paper's three-convolution network is trained
on all training images, shifted by up to two pixels and mirrored. Of the images, a part ships: the
first 2000 training images, and the first 2400 test images, of which two in three calibrate.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tie_ext.cli.batches import shifted
from tie_ext.cli.data import load
from tie_ext.models.backbones import Conv3
from tie_ext.utils.provenance import provenance

OUT = Path(__file__).parents[2] / "tie_ext" / "cli" / "clothes"
EPOCHS, BATCH, RATE = 6, 128, 0.01
TRAIN, TEST, COLUMNS = 2000, 2400, 50


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """The network after one cycle of the learning rate."""
    torch.manual_seed(0)
    model = Conv3(1, 10)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(x)).split(BATCH):
            batch = shifted(x[rows].float() / 255, 2)
            mirrored = torch.rand(len(rows), 1, 1, 1) < 0.5
            batch = torch.where(mirrored, batch.flip(3), batch)
            loss = F.cross_entropy(model(batch), y[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    a = parser.parse_args()
    train, test = (load("fashionmnist", split, a.root) for split in ("train", "test"))
    model = trained(train.x, train.y)
    model.half().float()  # as it is saved
    with torch.no_grad():
        logits = torch.cat([model(part.float() / 255) for part in test.x.split(500)])
    accuracy = (logits.argmax(1) == test.y).double().mean().item()
    OUT.mkdir(exist_ok=True)
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()},
        OUT / "conv3.safetensors",
    )
    x = torch.cat([train.x[:TRAIN], test.x[:TEST]])[:, 0]
    sheet = x.unflatten(0, (-1, COLUMNS)).permute(0, 2, 1, 3).flatten(0, 1).flatten(1)
    Image.fromarray(sheet.numpy().astype(np.uint8)).save(OUT / "images.png", optimize=True)
    labels = torch.cat([train.y[:TRAIN], test.y[:TEST]]).tolist()
    about = {
        "classes": train.classes,
        "labels": labels,
        "train": TRAIN,
        "accuracy": round(accuracy, 4),
    }
    (OUT / "images.json").write_text(
        json.dumps(about | provenance(places={"DATA": a.root})) + "\n"
    )
    print(f"accuracy on {len(test)} test images {accuracy:.2%}")


if __name__ == "__main__":
    main()
