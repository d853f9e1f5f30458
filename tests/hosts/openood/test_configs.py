"""The configs for OpenOOD."""

from pathlib import Path

import pytest

from hosts.openood.conftest import CONFIGS
from tie_ext.openood import configs

IDS = ["cifar10", "cifar100", "fashionmnist", "mnist", "svhn", "tinyimagenet"]
BACKBONES = {28: "lenet", 32: "resnet18_32x32", 64: "resnet18_64x64"}


def test_configs_of_six_data_sets_of_the_paper():
    assert configs() == CONFIGS
    assert sorted(path.name for path in (CONFIGS / "datasets").iterdir()) == IDS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IDS)
def test_configs_of_every_data_set(openood, openood_root, tmp_path, monkeypatch, name):
    from openood.datasets import get_dataloader, get_ood_dataloader
    from openood.networks import get_network
    from openood.postprocessors import get_postprocessor
    from openood.trainers import get_trainer
    from openood.utils.config import Config, merge_configs

    wanted = (
        f"datasets/{name}/{name}.yml",
        f"datasets/{name}/{name}_tie_ood.yml",
        "networks/tie_net.yml",
        "pipelines/train/train_tie.yml",
        "preprocessors/base_preprocessor.yml",
        "postprocessors/tie.yml",
    )
    places = [[base / of for base in (CONFIGS, openood_root / "configs")] for of in wanted]
    found = [next(str(path) for path in paths if path.exists()) for paths in places]
    config = merge_configs(*map(Config, found))
    config.num_workers, config.trainer.trainer_args.pool_size = 0, 100
    config.network.backbone.name = BACKBONES[config.dataset.image_size]
    config.parse_refs()
    data, ood = config.dataset, config.ood_dataset
    lists = [data[split].imglist_pth for split in data.split_names]
    # TinyImageNet's validation images are those that the others are chosen by.
    assert ("val" in ood.split_names) == (name != "tinyimagenet")
    for split in ood.split_names:
        of = ood[split]
        lists += [of[name].imglist_pth for name in of.datasets] if split != "val" else []
        lists += [of.imglist_pth] if split == "val" else []
    assert len(lists) == 3 + 5 + (name != "tinyimagenet")
    monkeypatch.chdir(tmp_path)
    for path in map(Path, lists):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("a.png 0\n")
    loaders, others = get_dataloader(config), get_ood_dataloader(config)
    assert len(others.pop("val", "a")) == 1
    assert {len(loader) for split in others.values() for loader in split.values()} == {1}
    net = get_network(config.network)
    assert net.num_classes == data.num_classes
    assert net.image_shape == (3, data.image_size, data.image_size)
    trainer = get_trainer(net, loaders["train"], loaders["val"], config).trainer
    assert trainer.config.epochs == 20
    assert get_postprocessor(config).t == 1.0
