"""``python -m tie_ext.openood attach``: from OpenOOD's trained networks to attached, scored ones.

Run in a checkout of OpenOOD. Its own ``scripts/eval_ood*.py`` score what was attached, so that
tables and scores lie where they put them.
"""

import runpy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import openood.networks
import torch
from openood.evaluation_api.datasets import DATA_INFO, data_setup, get_id_ood_dataloader
from openood.evaluation_api.preprocessor import get_default_preprocessor
from openood.utils.config import Config
from torch import nn
from torchvision.models import get_weight

from tie_ext.openood.attached import attached
from tie_ext.openood.cpu import replaced
from tie_ext.openood.network import OTHERS, backbone_of
from tie_ext.openood.trainers import load_weights

TORCHVISION = {
    "resnet50": ("ResNet50", "ResNet50_Weights.IMAGENET1K_V1"),
    "swin-t": ("Swin_T", "Swin_T_Weights.IMAGENET1K_V1"),
    "vit-b-16": ("ViT_B_16", "ViT_B_16_Weights.IMAGENET1K_V1"),
    "regnet": ("RegNet_Y_16GF", "RegNet_Y_16GF_Weights.IMAGENET1K_SWAG_E2E_V1"),
}
"""OpenOOD's class and torchvision's weights by the name that ``eval_ood_imagenet.py`` has."""
ARCHS = {
    "cifar10": ("resnet18_32x32", *OTHERS),
    "cifar100": ("resnet18_32x32", *OTHERS),
    "imagenet200": ("resnet18_224x224",),
    "imagenet": ("resnet50",),
}
"""Networks by data set, as ``network.name`` in OpenOOD's configs; the first is the default."""
SCORED = ("tie", "tie_combined")
"""Postprocessors that score what was attached."""
WORKERS = 8


def main(arguments: list[str] | None = None) -> None:
    """Attach, and score by :data:`SCORED`. OpenOOD has to know TIE.

    Arguments:
        arguments: Those of the command; None for those of this process.

    Raises:
        SystemExit: If something is missing or does not fit, with the reason.
    """
    args = _parse(arguments)
    try:
        if args.tvs_pretrained:
            _torchvision(args)
        else:
            _seeds(args)
    except ValueError as error:
        raise SystemExit(str(error)) from error


def _parse(arguments: list[str] | None) -> Namespace:
    parser = ArgumentParser("python -m tie_ext.openood attach", description=__doc__)
    parser.add_argument("--id-data", default="cifar10", choices=ARCHS, help="ID data (cifar10)")
    parser.add_argument("--root", type=Path, help="results of a training, with s*/best.ckpt")
    parser.add_argument("--arch", help="the network (OpenOOD's baseline for the data)")
    parser.add_argument(
        "--tvs-pretrained", action="store_true", help="torchvision's weights for ImageNet"
    )
    parser.add_argument("--fsood", action="store_true", help="the full-spectrum table too")
    parser.add_argument("--batch-size", type=int, default=200, help="images scored at once (200)")
    args = parser.parse_args(arguments)
    if args.tvs_pretrained and args.id_data != "imagenet":
        parser.error("torchvision's weights (--tvs-pretrained) are for --id-data imagenet")
    if args.tvs_pretrained == (args.root is not None):
        parser.error("give --root RESULTS, or --id-data imagenet --tvs-pretrained")
    archs = TORCHVISION if args.tvs_pretrained else ARCHS[args.id_data]
    args.arch = args.arch or next(iter(archs))
    if args.arch not in archs:
        parser.error(f"expected --arch to be one of {', '.join(archs)}, but got {args.arch}")
    if args.fsood and not DATA_INFO[args.id_data]["csid"]["datasets"]:
        parser.error(f"OpenOOD has no full-spectrum sets (--fsood) for {args.id_data}")
    if not Path("scripts", "eval_ood.py").is_file():
        parser.error("run it in a checkout of OpenOOD, which has scripts/eval_ood.py")
    return args


def _seeds(args: Namespace) -> None:
    """From RESULTS/s*/best.ckpt to RESULTS_attach/s*/best.ckpt and its scores."""
    seeds = sorted(args.root.glob("s*/best.ckpt"))
    if not seeds:
        raise ValueError(f"Expected s*/best.ckpt in --root {args.root}, but found none")
    out = args.root.with_name(f"{args.root.name}_attach")
    loaders = _id_loaders(args.id_data, get_default_preprocessor(args.id_data), args.batch_size)
    for path in seeds:
        settings = Config(name=args.arch, num_classes=DATA_INFO[args.id_data]["num_classes"])
        load_weights(net := backbone_of(settings), args.arch, path)
        _attach(net, loaders, folder := out / path.parent.name)
        if args.id_data == "imagenet":  # of which OpenOOD's script scores one seed
            _score(args, "eval_ood_imagenet.py", "--ckpt-path", f"{folder}/best.ckpt")
    if args.id_data != "imagenet":
        _score(args, "eval_ood.py", "--id-data", args.id_data, "--root", str(out))


def _torchvision(args: Namespace) -> None:
    """From torchvision's weights to results/imagenet_ARCH_tvsv1_base_default/best.ckpt and its
    scores.
    """
    name, weights = TORCHVISION[args.arch]
    weights, net = get_weight(weights), getattr(openood.networks, name)()
    net.load_state_dict(torch.hub.load_state_dict_from_url(weights.url))
    # Where OpenOOD's script looks for scores.
    out = Path("results", f"imagenet_{args.arch}_tvsv1_base_default")
    state = _attach(net, _id_loaders("imagenet", weights.transforms(), args.batch_size), out)
    with replaced(torch.hub, load_state_dict_from_url=lambda *_, **__: state):
        _score(args, "eval_ood_imagenet.py", "--arch", args.arch, "--tvs-pretrained")


def _id_loaders(id_data: str, preprocessor: Callable, batch_size: int) -> dict:
    """The loaders of the evaluation API."""
    data_setup("data", id_data)
    kwargs = {"batch_size": batch_size, "shuffle": False, "num_workers": WORKERS}
    return get_id_ood_dataloader(id_data, "data", preprocessor, **kwargs)["id"]


def _attach(net: nn.Module, loaders: dict, folder: Path) -> dict:
    """The state of a network with a garbage class, saved as ``best.ckpt``, and no score of what
    was there before.
    """
    net = net.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    state = {name: value.cpu() for name, value in attached(net, loaders).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name in SCORED:
        for path in (*folder.glob(f"*/{name}.pkl"), *folder.glob(f"*/{name}.csv")):
            path.unlink()
    torch.save(state, folder / "best.ckpt")
    return state


def _score(args: Namespace, script: str, *options: str) -> None:
    """Table and scores of each postprocessor, by one of OpenOOD's scripts."""
    options += ("--batch-size", str(args.batch_size), "--save-csv", "--save-score")
    for name in SCORED:
        # The full-spectrum run begins with the scores that the first one has saved.
        for spectrum in [(), ("--fsood",)][: 1 + args.fsood]:
            argv = [f"scripts/{script}", "--postprocessor", name, *options, *spectrum]
            with replaced(sys, argv=argv, path=list(sys.path)):
                runpy.run_path(argv[0], run_name="__main__")
