"""An epoch of trainer ``tie`` inside OpenOOD beside one of its own baseline trainer, loading included, and how often each image is read.

    python tests/bench/openood_epoch.py --openood OPENOOD --data DATA

OPENOOD is a checkout; DATA holds images_classic/ and benchmark_imglist/ as OpenOOD keeps them. Its own loaders, LeNet on MNIST, both networks as
their configs have them. Epochs of both in turn; medians of the processor's time, of this process on one thread and the one that loads for it.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from cost import OUT
from folders import spent

from tie_ext.utils.files import write_json
from tie_ext.utils.provenance import provenance

TRAINED = {
    "plain": ("networks/lenet.yml", "pipelines/train/baseline.yml"),
    "tie": ("networks/tie_net.yml", "pipelines/train/train_tie.yml"),
}
"""Configs of each, OpenOOD's where it has them."""


def trainer_of(name: str, theirs: Path, repeats: int):
    """A trainer with its own loader, and the count of images that the loader has asked for."""
    import openood.utils.config as read
    from openood.datasets import get_dataloader
    from openood.networks import get_network
    from openood.trainers import get_trainer

    from tie_ext.openood import configs

    files = ["datasets/mnist/mnist.yml", *TRAINED[name], "preprocessors/base_preprocessor.yml"]
    config = read.merge_configs(
        *[read.Config(str(theirs / f if (theirs / f).exists() else configs() / f)) for f in files]
    )
    config.num_workers, config.optimizer.num_epochs = 1, max(2, repeats)
    if name == "tie":
        config.network.backbone.name = "lenet"
    config.parse_refs()
    torch.manual_seed(0)
    loader = get_dataloader(config)["train"]
    read_images = [0]
    sampler = loader.batch_sampler

    class Counted:
        """Batches of indices, counted as the loader asks for them."""

        batch_size = sampler.batch_size

        def __iter__(self):
            for batch in sampler:
                read_images[0] += len(batch)
                yield batch

        def __len__(self):
            return len(sampler)

    object.__setattr__(loader, "batch_sampler", Counted())
    return (
        get_trainer(get_network(config.network), loader, None, config),
        read_images,
        len(loader.dataset),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--openood", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    said = provenance(places={"OPENOOD": a.openood, "DATA": a.data})
    torch.set_num_threads(1)
    root = a.openood.resolve()
    sys.path.insert(0, str(root))
    from tie_ext.openood import register, without_cuda

    times: dict[str, list[float]] = {name: [] for name in TRAINED}
    with tempfile.TemporaryDirectory() as place, without_cuda(True):
        register()
        (Path(place) / "data").symlink_to(a.data.resolve())  # where OpenOOD's configs look
        home = os.getcwd()
        os.chdir(place)
        made = {name: trainer_of(name, root / "configs", a.repeats) for name in TRAINED}
        for epoch in range(1, a.repeats + 1):
            for name, (trainer, _, _) in made.items():
                start = spent()
                trainer.train_epoch(epoch)
                times[name].append(spent() - start)
            print({name: round(of[-1], 1) for name, of in times.items()}, flush=True)
        os.chdir(home)
    images = made["tie"][2]
    reads = {name: count[0] / images / a.repeats for name, (_, count, _) in made.items()}
    ratio = median(times["tie"]) / median(times["plain"])
    print(f"ratio {ratio:.2f}, reads {reads}")
    write_json(
        OUT / "openood-epoch.json",
        {"images": images, "seconds": times, "ratio": ratio, "reads": reads, **said},
    )


if __name__ == "__main__":
    main()
