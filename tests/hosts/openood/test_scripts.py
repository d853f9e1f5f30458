"""OpenOOD's ``scripts/eval_ood*.py``, its evaluation API, and ``python -m tie_ext.openood attach``,
on stand-ins for its data.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import set_head_defaults
from PIL import Image

from hosts.openood.conftest import build, draw, run_openood
from tie_ext.models.backbones import Conv3

pd = pytest.importorskip("pandas")  # as OpenOOD has it
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
ROWS = ["cifar100", "tin", "nearood", "mnist", "svhn", "texture", "places365", "farood"]
LARGE = ["ssb_hard", "ninco", "nearood", "inaturalist", "textures", "openimage_o", "farood"]
FOLDERS = "cifar10 cifar100 tin mnist svhn texture places365 imagenet_1k ssb_hard ninco "
FOLDERS += "inaturalist openimage_o imagenet_v2 imagenet_c imagenet_r imagenet_es"
CIFAR10 = {"image_size": 32, "normalization_type": "cifar10"}
HUB = "load_state_dict_from_url"


@pytest.fixture(scope="module")
def place(openood_root, tmp_path_factory) -> Path:
    """A folder like a checkout of OpenOOD with its data: few drawn images, in its own lists."""
    from openood.evaluation_api.datasets import DATA_INFO

    place = tmp_path_factory.mktemp("checkout")
    (place / "configs").symlink_to(openood_root / "configs")
    # A link to the whole folder would lead its scripts back to the data of the checkout.
    (place / "scripts").mkdir()
    for script in (openood_root / "scripts").glob("*.py"):
        (place / "scripts" / script.name).symlink_to(script)
    for kind in ("images_classic", "images_largescale"):
        for name in FOLDERS.split():  # a folder that is not empty is not downloaded
            (place / "data" / kind / name).mkdir(parents=True)
            (place / "data" / kind / name / "images").touch()
    for name, many in (("cifar10", 4), ("imagenet", 2), ("imagenet200", 2)):
        info = DATA_INFO[name]
        groups = {"id": info["id"], "val": {"val": info["ood"]["val"]}}
        for kind, of in {"csid": info["csid"], **info["ood"]}.items():
            if kind != "val":
                groups[kind] = {key: of[key] for key in of["datasets"]}
        for kind, group in groups.items():
            for key, where in group.items():
                count = 10 * many if (kind, name) == ("id", "cifar10") else 2 * many
                data = place / "data" / where["data_dir"]
                rows = draw(data, f"{name}_{kind}_{key}", count, kind in ("id", "csid"))
                path = place / "data" / where["imglist_path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(rows)
    return place


@pytest.fixture
def seeds(openood, place, tmp_path) -> Path:
    """Three seeds as OpenOOD's training leaves them; the third has a garbage head."""
    from openood.evaluation_api.preprocessor import get_default_preprocessor

    prepare, y = get_default_preprocessor("cifar10"), torch.arange(40) % 10
    files = [place / f"data/images_classic/cifar10_id_train_{i}.png" for i in range(40)]
    x = torch.stack([prepare(Image.open(file)) for file in files])
    for seed in range(3):
        head = "multilayer" if seed == 2 else "linear"
        net = build(seed, backbone="conv3", head=head, **CIFAR10).eval()
        # Least squares: every training image is right, as several postprocessors need.
        h, target = net.features(x).detach(), torch.eye(10)[y] - 0.1
        weight = 20 * (torch.linalg.pinv(h - h.mean(0)) @ target).T
        net.fc.weight.data, net.fc.bias.data = weight, -weight @ h.mean(0)
        assert torch.equal(net(x).argmax(1), y)
        (tmp_path / f"s{seed}").mkdir()
        torch.save(net.state_dict(), tmp_path / f"s{seed}" / "best.ckpt")
    return tmp_path


def launch(*arguments: str | Path) -> None:
    """``python -m tie_ext.openood``, in this process."""
    from tie_ext.openood.__main__ import main

    before = sys.argv, list(sys.path)
    try:
        main(list(map(str, arguments)))
    finally:
        sys.argv, sys.path[:] = before


def tables(folder: Path, rows: list[str]) -> dict:
    """The tables below a folder, by where they lie; each has AUROCs of all sets."""
    found = {}
    for path in folder.rglob("*.csv"):
        table = pd.read_csv(path, index_col=0)
        assert list(table.index) == rows
        auroc = table.AUROC.astype(str).str.split().str[0].astype(float)
        assert auroc.between(0, 100).all()
        found[path.relative_to(folder).with_suffix("").as_posix()] = table
    return found


def evaluated(net, place: Path, **post):
    """The evaluation API's evaluator, and its table."""
    from openood.evaluation_api import Evaluator

    data = {"id_name": "cifar10", "data_root": str(place / "data"), "num_workers": 0}
    evaluator = Evaluator(net, config_root="nowhere", **data, **post)
    return evaluator, evaluator.eval_ood(progress=False)


def read(folder: Path):
    from openood.networks import ResNet18_32x32

    net = ResNet18_32x32(num_classes=10)
    net.load_state_dict(torch.load(folder / "best.ckpt", weights_only=True))
    return net.eval()


NAMES = "tie tie_combined dmr msp react mds she openmax temp_scaling"


@pytest.mark.parametrize("name", NAMES.split())
def test_eval_ood_scores_every_seed(openood, place, seeds, name):
    root = ("--id-data", "cifar10", "--root", seeds)
    launch(place / "scripts/eval_ood.py", *root, "--postprocessor", name, "--save-csv")
    table = tables(seeds, ROWS)[f"ood/{name}"]
    if name != "tie":
        return
    # The table says what the networks say, one by one, by name and by instance.
    found = []
    for folder in sorted(seeds.glob("s*")):
        net = read(folder)
        _, one = evaluated(net, place, postprocessor=openood.TIEPostprocessor())
        assert one.equals(evaluated(net, place, postprocessor_name="tie")[1])
        found.append(one.to_numpy())
    mean, std = np.mean(found, 0), np.std(found, 0)
    rows = [
        [f"{m:.2f} ± {s:.2f}" for m, s in zip(*of, strict=True)]
        for of in zip(mean, std, strict=True)
    ]
    assert table.to_numpy().tolist() == rows
    assert std[:, 1].max() > 0  # three networks, not one


MAIN = """
import json, runpy, sys
import torch
main, *runs = json.load(open("runs.json"))
for seed, run in enumerate(runs):
    torch.manual_seed(seed)
    sys.argv = [main, *run]
    runpy.run_path(main, run_name="__main__")
"""
SETS = {"cifar100": "near", "tin": "near", "mnist": "far", "svhn": "far", "texture": "far"}
COLUMNS = ["FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT"]


def test_main_api_and_scripts_give_the_same(openood_root, openood, place, seeds):
    import json

    theirs, ours = openood_root / "configs", openood.configs()
    files = [theirs / "datasets/cifar10" / name for name in ("cifar10.yml", "cifar10_ood.yml")]
    files += [ours / "networks/tie_net.yml", theirs / "pipelines/test/test_ood.yml"]
    files += [theirs / "preprocessors/base_preprocessor.yml"]
    options = "--network.backbone.name conv3 --network.head linear --num_workers 0 --merge_option "
    options += f"merge --network.checkpoint {seeds}/s0/best.ckpt --output_dir {seeds}/results"
    runs = [str(openood_root / "main.py")]
    for name in ("tie_combined", "dmr"):
        post = ours / "postprocessors" / f"{name}.yml"
        for seed in "01":
            own = ["--config", *map(str, [*files, post]), "--seed", seed]
            runs.append(own + options.split())
    (place / "runs.json").write_text(json.dumps(runs))
    (place / "runs.py").write_text(MAIN)
    run_openood(openood_root, place, "-m", "tie_ext.openood", "runs.py")
    (seeds / "one").mkdir()
    (seeds / "one/s0").symlink_to(seeds / "s0")
    for name in ("tie_combined", "dmr"):
        evaluator, api = evaluated(read(seeds / "s0"), place, postprocessor_name=name)
        api = api.round(2)
        for seed in "01":
            saved = seeds / f"results/cifar10_tie_net_test_ood_ood_{name}_default/s{seed}/ood"
            table = pd.read_csv(saved / "ood.csv", index_col=0)
            scores = {row: evaluator.scores["ood"][SETS[row]][row] for row in SETS}
            for row in SETS:
                assert table.loc[row, COLUMNS].tolist() == api.loc[row, COLUMNS].tolist()
            for row, of in {**scores, "cifar10": evaluator.scores["id"]["test"]}.items():
                assert (np.load(saved / "scores" / f"{row}.npz")["conf"] == of[1]).all()
        root = ("--id-data", "cifar10", "--root", seeds / "one")
        launch(place / "scripts/eval_ood.py", *root, "--postprocessor", name, "--save-csv")
        rows = [[f"{value:.2f} ± 0.00" for value in row] for row in api.to_numpy()]
        assert tables(seeds / "one", ROWS)[f"ood/{name}"].to_numpy().tolist() == rows


# python -m tie_ext.openood attach.


@pytest.fixture
def checkout(openood_root, openood, place, monkeypatch):
    """The folder of a checkout, for ``python -m tie_ext.openood`` in this process; a head that
    learns for a moment, of images that have not all classes.
    """
    import openood.evaluation_api.datasets as datasets

    monkeypatch.chdir(place)
    monkeypatch.setattr(datasets.gdown, "download", None)
    set_head_defaults(monkeypatch, steps=20)
    monkeypatch.setattr("tie_ext.training.attach.check_class_counts", lambda counts: None)
    make_small(monkeypatch)
    return place


def make_small(monkeypatch) -> None:
    """The networks that OpenOOD's scripts build, with few layers and channels."""
    import openood.networks as networks
    from torchvision.models.regnet import BlockParams

    defaults = {
        "ViT_B_16": (224, 16, 1, 2, 16, 32, 1000),
        "Swin_T": ([4, 4], 8, [1] * 4, [1] * 4, [7, 7], 0.2, 1000),
    }
    for name in ("ResNet18_32x32", "ResNet18_224x224", "ResNet50"):
        block, _, num_classes = getattr(networks, name).__base__.__init__.__defaults__
        defaults[name] = (block, [1] * 4, num_classes)
    for name, values in defaults.items():
        init = getattr(networks, name).__base__.__init__
        monkeypatch.setattr(init, "__defaults__", values)
    small = {"depth": 4, "w_0": 8, "w_a": 8.0, "w_m": 2.0, "group_width": 8, "se_ratio": 0.25}
    params = BlockParams.from_init_params
    monkeypatch.setattr(BlockParams, "from_init_params", lambda **_: params(**small))


def of_the_page(begin: str) -> list[str]:
    """Arguments of the only line of docs/how-to/hosts.md that begins so."""
    page = (Path(__file__).parents[3] / "docs" / "how-to" / "hosts.md").read_text()
    begin = f"python -m tie_ext.openood {begin}"
    (line,) = [line for line in page.splitlines() if line.startswith(begin)]
    return shlex.split(line)[3:]


def test_one_line_attaches_to_every_seed_and_scores(checkout, capsys):
    from openood.networks import ResNet18_32x32

    arguments = of_the_page("attach --id-data cifar10")
    root = checkout / arguments[arguments.index("--root") + 1]
    out, x, nets = root.with_name(f"{root.name}_attach"), torch.rand(2, 3, 32, 32), []
    for seed in range(2):
        torch.manual_seed(seed)
        (root / f"s{seed}").mkdir(parents=True)
        nets.append(ResNet18_32x32(num_classes=10).eval())
        torch.save(nets[-1].state_dict(), root / f"s{seed}" / "best.ckpt")
    launch(*arguments)
    assert "no garbage class" not in capsys.readouterr().out
    first = tables(out, ROWS)
    assert set(first) == {"ood/tie", "ood/tie_combined"}
    for seed, net in enumerate(nets):
        names = sorted(path.name for path in (out / f"s{seed}" / "scores").iterdir())
        assert names == ["tie.pkl", "tie_combined.pkl"]
        again = read(out / f"s{seed}")
        assert torch.equal(again(x), net(x))
        assert again.tau.isfinite()
    # In OpenOOD's own script, by the name of the postprocessor alone.
    own = ("--id-data", "cifar10", "--root", root, "--postprocessor", "attach", "--save-csv")
    launch("scripts/eval_ood.py", *own)
    assert tables(root, ROWS)["ood/attach"].equals(first["ood/tie_combined"])
    # Scores of another checkpoint do not stay; full-spectrum tables come beside the others.
    before = (out / "s0/scores/tie.pkl").read_bytes()
    torch.save(nets[1].state_dict(), root / "s0" / "best.ckpt")
    for folder in (root, out):
        shutil.rmtree(folder / "s1")
    launch(*arguments, "--fsood")
    assert set(tables(out, ROWS)) == {*first, "fsood/tie", "fsood/tie_combined"}
    assert (out / "s0/scores/tie.pkl").read_bytes() != before
    for folder in (root, out):
        shutil.rmtree(folder)


@pytest.mark.parametrize("arch", ["resnet50", "swin-t", "vit-b-16", "regnet"])
def test_torchvisions_weights_are_attached_to(checkout, monkeypatch, arch):
    import openood.networks as networks
    from torchvision.models import get_weight

    from tie_ext.openood.attach import TORCHVISION

    name, weights = TORCHVISION[arch]
    net, asked = getattr(networks, name)(), []
    if arch == "vit-b-16":  # whose last layer begins with zeros
        torch.nn.init.normal_(net.heads.head.weight)
    state = net.state_dict()
    monkeypatch.setattr(torch.hub, HUB, lambda url: asked.append(url) or state)
    arguments = of_the_page("attach --id-data imagenet --tvs-pretrained")
    arguments[arguments.index("--arch") + 1] = arch
    spectra = ["ood", "fsood"] if arch in ("vit-b-16", "regnet") else ["ood"]
    launch(*arguments, *(f"--{of}" for of in spectra[1:]))
    assert asked == [get_weight(weights).url]
    out = checkout / "results" / f"imagenet_{arch}_tvsv1_base_default"
    names = {f"{of}/{post}" for of in spectra for post in ("tie", "tie_combined")}
    assert set(tables(out, LARGE)) == names
    saved = torch.load(out / "best.ckpt", weights_only=True)
    assert saved["garbage.mean"].isfinite().all()


@pytest.mark.parametrize(
    ("data", "network", "classes", "where"),
    [("imagenet200", "ResNet18_224x224", 200, ""), ("imagenet", "ResNet50", 1000, "s0/")],
)
def test_checkpoints_of_large_images(checkout, tmp_path, data, network, classes, where):
    import openood.networks as networks

    (tmp_path / "r/s0").mkdir(parents=True)
    net = getattr(networks, network)(num_classes=classes)
    torch.save(net.state_dict(), tmp_path / "r/s0/best.ckpt")
    launch("attach", "--id-data", data, "--root", tmp_path / "r")
    found = tables(tmp_path / "r_attach", LARGE)
    assert set(found) == {f"{where}ood/tie", f"{where}ood/tie_combined"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--id-data imagenet", "give --root RESULTS, or --id-data imagenet --tvs-pretrained"),
        ("--tvs-pretrained", "are for --id-data imagenet"),
        ("--root a --arch vit-b-16", "one of resnet18_32x32, conv3, .* but got vit-b-16"),
        ("--id-data cifar100 --root a --fsood", "no full-spectrum sets .* for cifar100"),
        ("--root nowhere", "Expected s\\*/best.ckpt in --root nowhere, but found none"),
        ("--root {other}", "Expected a checkpoint of OpenOOD's network resnet18_32x32, but got"),
    ],
)
def test_errors_of_the_command_attach(checkout, tmp_path, capsys, arguments, message):
    (tmp_path / "s0").mkdir()
    torch.save(Conv3(3, 10).state_dict(), tmp_path / "s0" / "best.ckpt")
    with pytest.raises(SystemExit) as stopped:
        launch("attach", *arguments.format(other=tmp_path).split())
    assert re.search(message, f"{stopped.value}{capsys.readouterr().err}")
