"""OpenOOD's multi-seed path on our checkpoints, run on stand-ins for its data.

That is ``scripts/eval_ood*.py`` and the evaluation API.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import set_head_defaults

from tie_ext.models.backbones import Conv3

pytestmark = pytest.mark.filterwarnings("ignore")
LISTED = {"cifar10": ["cifar10", "cifar100", "tin", "mnist", "svhn", "texture", "places365"]}
LISTED["imagenet"] = [
    "imagenet_1k",
    "ssb_hard",
    "ninco",
    "inaturalist",
    "texture",
    "openimage_o",
    "imagenet_v2",
    "imagenet_c",
    "imagenet_r",
    "imagenet_es",
]
LISTED["imagenet200"] = LISTED["imagenet"][:-1]


@pytest.fixture
def openood(openood_root, monkeypatch):
    """OpenOOD with TIE registered, without CUDA, reading images in this process."""
    import openood.evaluation_api.datasets as datasets

    import tie_ext.openood as ours

    # Eight workers a loader take longer to start than a handful of images to read.
    monkeypatch.setattr(
        datasets,
        "DataLoader",
        lambda *args, **kwargs: torch.utils.data.DataLoader(*args, **{**kwargs, "num_workers": 0}),
    )
    with ours.without_cuda(wanted=False):
        ours.register()
        yield ours
        ours.unregister()


@pytest.fixture(scope="module")
def place(openood_root, tmp_path_factory) -> Path:
    """A folder like a checkout of OpenOOD with its data: few drawn images, in its own lists."""
    from openood.evaluation_api.datasets import DATA_INFO

    place = tmp_path_factory.mktemp("checkout")
    (place / "configs").symlink_to(openood_root / "configs")
    (
        place / "scripts"
    ).mkdir()  # a link to the whole folder would lead its scripts back to the data of the checkout
    for script in (openood_root / "scripts").glob("*.py"):
        (place / "scripts" / script.name).symlink_to(script)
    for kind in ("images_classic", "images_largescale"):
        for name in {
            name for names in LISTED.values() for name in names
        }:  # a folder that is not empty is not downloaded
            (place / "data" / kind / name).mkdir(parents=True)
            (place / "data" / kind / name / "images").touch()
    for name, many in (("cifar10", 4), ("imagenet", 2), ("imagenet200", 2)):
        info = DATA_INFO[name]
        groups = [
            info["id"],
            {key: info["csid"][key] for key in info["csid"]["datasets"]},
            {"val": info["ood"]["val"]},
        ]
        groups += [
            {key: info["ood"][split][key] for key in info["ood"][split]["datasets"]}
            for split in ("near", "far")
        ]
        for kind, group in zip(("id", "csid", "val", "near", "far"), groups, strict=True):
            for of, where in group.items():
                count = 10 * many if (kind, name) == ("id", "cifar10") else 2 * many
                draw(place / "data", where, f"{name}_{kind}_{of}", count, kind in ("id", "csid"))
    return place


def draw(data: Path, where: dict, name: str, count: int, inside: bool) -> None:
    """A list of images and the images: squares whose place is their label, or noise."""
    import numpy as np
    from PIL import Image

    rng, rows = np.random.default_rng(len(name)), []
    for i in range(count):
        image = rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)
        if inside:
            image //= 4
            image[3 * (i % 10) : 3 * (i % 10) + 5] = 255
        if name.endswith("imagenet_c"):  # which OpenOOD does not resize
            image = image.repeat(7, 0).repeat(7, 1)
        Image.fromarray(image).save(data / where["data_dir"] / f"{name}_{i}.png")
        rows.append(f"{name}_{i}.png {i % 10 if inside else -1}\n")
    path = data / where["imglist_path"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(rows))


RANGE = [-2.0] * 3, [2.2] * 3


def around(backbone, garbage: str = "linear", size: int = 32, seed: int = 0):
    from tie_ext.openood import OpenOODTIENet

    torch.manual_seed(seed)
    net = OpenOODTIENet(
        backbone, 1000 if size == 224 else 10, (3, size, size), *RANGE, head=garbage
    ).eval()
    net.tau.fill_(0.25)
    return net


@pytest.fixture
def seeds(openood, place, tmp_path) -> Path:
    """Three seeds as OpenOOD's training leaves them; the third has a garbage head."""
    from openood.evaluation_api.preprocessor import get_default_preprocessor
    from PIL import Image

    prepare = get_default_preprocessor("cifar10")
    x = torch.stack(
        [
            prepare(Image.open(place / f"data/images_classic/cifar10_id_train_{i}.png"))
            for i in range(40)
        ]
    )
    for seed in range(3):
        torch.manual_seed(seed)
        net = around(Conv3(3, 10), "multilayer" if seed == 2 else "linear", seed=seed)
        learn(net, x, torch.arange(40) % 10)
        (tmp_path / f"s{seed}").mkdir()
        torch.save(net.state_dict(), tmp_path / f"s{seed}" / "best.ckpt")
    return tmp_path


@torch.no_grad()
def learn(net, x, y) -> None:
    """Least squares: every training image is right, as several postprocessors need."""
    h = net.features(x)
    weight = 20 * (torch.linalg.pinv(h - h.mean(0)) @ (torch.nn.functional.one_hot(y, 10) - 0.1)).T
    net.fc.weight.copy_(weight)
    net.fc.bias.copy_(-weight @ h.mean(0))
    assert torch.equal(net(x).argmax(1), y)


def launch(*arguments: str) -> None:
    """``python -m tie_ext.openood``, in this process."""
    from tie_ext.openood.__main__ import main

    before = sys.argv, list(sys.path)
    try:
        main(list(arguments))
    finally:
        sys.argv, sys.path[:] = before


def run(script: Path, *arguments: str) -> None:
    launch(str(script), *arguments)


@pytest.mark.parametrize(
    "name", ["tie", "tie_combined", "dmr", "msp", "react", "mds", "she", "openmax", "temp_scaling"]
)
def test_eval_ood_scores_every_seed(openood, place, seeds, name):
    import pandas as pd
    from openood.evaluation_api import Evaluator
    from openood.networks import ResNet18_32x32

    run(
        place / "scripts" / "eval_ood.py",
        "--id-data",
        "cifar10",
        "--root",
        str(seeds),
        "--postprocessor",
        name,
        "--save-csv",
    )
    table = pd.read_csv(seeds / "ood" / f"{name}.csv", index_col=0)
    assert list(table.index) == [
        "cifar100",
        "tin",
        "nearood",
        "mnist",
        "svhn",
        "texture",
        "places365",
        "farood",
    ]
    assert table.map(lambda cell: 0 <= float(cell.split()[0]) <= 100).all(axis=None)
    if name != "tie":
        return
    found = []
    for folder in sorted(
        seeds.glob("s*")
    ):  # what the table says is what the networks say, one by one, through the evaluation API
        net = openood.tie_net_of(
            torch.load(folder / "best.ckpt", weights_only=True), ResNet18_32x32(num_classes=10), 32
        )
        evaluator = Evaluator(
            net,
            id_name="cifar10",
            data_root=str(place / "data"),
            postprocessor=openood.TIEPostprocessor(),
            num_workers=0,
        )
        found.append(evaluator.eval_ood(progress=False).to_numpy())
    mean, std = (
        getattr(torch.tensor(found), part)(**how)
        for part, how in (("mean", {"dim": 0}), ("std", {"dim": 0, "correction": 0}))
    )
    assert table.to_numpy().tolist() == [
        [f"{m:.2f} ± {s:.2f}" for m, s in zip(*rows, strict=True)]
        for rows in zip(mean, std, strict=True)
    ]
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


@pytest.fixture
def by_main(openood_root, openood, place, seeds, monkeypatch):
    """The scores that ``main.py`` saves of the first checkpoint, by postprocessor and seed."""
    theirs, ours = openood_root / "configs", openood.configs()
    files = [theirs / "datasets/cifar10/cifar10.yml", theirs / "datasets/cifar10/cifar10_ood.yml"]
    files += [ours / "networks/tie_net.yml", theirs / "pipelines/test/test_ood.yml"]
    files += [theirs / "preprocessors/base_preprocessor.yml"]
    options = [
        "--network.backbone.name",
        "conv3",
        "--network.head",
        "linear",
        "--num_workers",
        "0",
    ]
    options += ["--network.checkpoint", str(seeds / "s0" / "best.ckpt"), "--merge_option", "merge"]
    options += ["--output_dir", str(seeds / "results")]
    names = [(name, seed) for name in ("tie_combined", "dmr") for seed in (0, 1)]
    runs = []
    for name, seed in names:
        post = ours / "postprocessors" / f"{name}.yml"
        runs.append(["--config", *map(str, [*files, post]), *options, "--seed", str(seed)])
    (place / "runs.json").write_text(json.dumps([str(openood_root / "main.py"), *runs]))
    (place / "runs.py").write_text(MAIN)
    in_a_process(openood_root, place, "runs.py")
    folder = seeds / "results" / "cifar10_tie_net_test_ood_ood_{}_default" / "s{}" / "ood"
    return {key: Path(str(folder).format(*key)) for key in names}


def test_all_scripts_give_the_same_numbers(openood, place, seeds, by_main):
    import numpy as np
    import pandas as pd
    from openood.evaluation_api import Evaluator
    from openood.networks import ResNet18_32x32

    for name in ("tie_combined", "dmr"):
        net = ResNet18_32x32(num_classes=10)
        net.load_state_dict(torch.load(seeds / "s0" / "best.ckpt", weights_only=True))
        evaluator = Evaluator(
            net.eval(),
            id_name="cifar10",
            data_root=str(place / "data"),
            config_root="nowhere",
            postprocessor_name=name,
            num_workers=0,
        )
        api = evaluator.eval_ood(progress=False).round(2)
        for seed in (0, 1):
            saved = by_main[name, seed]
            table = pd.read_csv(saved / "ood.csv", index_col=0)
            for row in SETS:
                columns = ["FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT"]
                assert table.loc[row, columns].tolist() == api.loc[row, columns].tolist()
                conf = np.load(saved / "scores" / f"{row}.npz")["conf"]
                assert (conf == evaluator.scores["ood"][SETS[row]][row][1]).all()
            conf = np.load(saved / "scores" / "cifar10.npz")["conf"]
            assert (conf == evaluator.scores["id"]["test"][1]).all()
        (seeds / "one").mkdir(exist_ok=True)
        if not (seeds / "one" / "s0").exists():
            (seeds / "one" / "s0").symlink_to(seeds / "s0")
        arguments = ["--id-data", "cifar10", "--root", str(seeds / "one"), "--save-csv"]
        run(place / "scripts" / "eval_ood.py", *arguments, "--postprocessor", name)
        table = pd.read_csv(seeds / "one" / "ood" / f"{name}.csv", index_col=0)
        rows = [[f"{value:.2f} ± 0.00" for value in row] for row in api.to_numpy()]
        assert table.to_numpy().tolist() == rows


def in_a_process(openood_root: Path, place: Path, *arguments: str) -> None:
    """``python -m tie_ext.openood``, as a user runs it."""
    command = [sys.executable, "-W", "ignore", "-m", "tie_ext.openood", *arguments]
    path = os.pathsep.join([str(openood_root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


ROWS = ["cifar100", "tin", "nearood", "mnist", "svhn", "texture", "places365", "farood"]
LARGE = ["ssb_hard", "ninco", "nearood", "inaturalist", "textures", "openimage_o", "farood"]


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

    for name in ("ResNet18_32x32", "ResNet18_224x224", "ResNet50"):
        init = getattr(networks, name).__base__.__init__
        block, _, num_classes = init.__defaults__
        monkeypatch.setattr(init, "__defaults__", (block, [1] * 4, num_classes))
    vit, swin = (224, 16, 1, 2, 16, 32, 1000), ([4, 4], 8, [1] * 4, [1] * 4, [7, 7], 0.2, 1000)
    monkeypatch.setattr(networks.ViT_B_16.__base__.__init__, "__defaults__", vit)
    monkeypatch.setattr(networks.Swin_T.__base__.__init__, "__defaults__", swin)
    small = {"depth": 4, "w_0": 8, "w_a": 8.0, "w_m": 2.0, "group_width": 8, "se_ratio": 0.25}
    params = BlockParams.from_init_params
    monkeypatch.setattr(BlockParams, "from_init_params", lambda **_: params(**small))


def of_the_page(begin: str) -> list[str]:
    """Arguments of the only line of docs/how-to/hosts.md that begins so."""
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "hosts.md").read_text()
    begin = f"python -m tie_ext.openood {begin}"
    (line,) = [line for line in page.splitlines() if line.startswith(begin)]
    return shlex.split(line)[3:]


def tables(folder: Path, rows: list[str]) -> dict:
    """The tables below a folder, by where they lie; each has AUROCs of all sets."""
    import pandas as pd

    found = {}
    for path in folder.rglob("*.csv"):
        table = pd.read_csv(path, index_col=0)
        assert list(table.index) == rows
        auroc = table.AUROC.astype(str).str.split().str[0].astype(float)
        assert auroc.between(0, 100).all()
        found[path.relative_to(folder).with_suffix("").as_posix()] = auroc
    return found


def test_one_line_of_the_page_attaches_to_every_seed_and_scores(checkout, capsys):
    from openood.networks import ResNet18_32x32

    arguments = of_the_page("attach --id-data cifar10")
    root = checkout / arguments[arguments.index("--root") + 1]
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        (root / f"s{seed}").mkdir(parents=True)
        nets.append(ResNet18_32x32(num_classes=10).eval())
        torch.save(nets[-1].state_dict(), root / f"s{seed}" / "best.ckpt")
    launch(*arguments)
    out = root.with_name(f"{root.name}_attach")
    assert "no garbage class" not in capsys.readouterr().out
    first = tables(out, ROWS)
    assert set(first) == {"ood/tie", "ood/tie_combined"}
    x = torch.rand(2, 3, 32, 32)
    for seed, net in enumerate(nets):
        scores = sorted(path.name for path in (out / f"s{seed}" / "scores").iterdir())
        assert scores == ["tie.pkl", "tie_combined.pkl"]
        again = ResNet18_32x32(num_classes=10).eval()
        again.load_state_dict(torch.load(out / f"s{seed}" / "best.ckpt", weights_only=True))
        assert torch.equal(again.eval()(x), net(x))
        assert again.tau.isfinite()
    # In OpenOOD's own script, by the name of the postprocessor alone.
    run(
        Path("scripts/eval_ood.py"),
        *("--id-data", "cifar10", "--root", str(root), "--postprocessor", "attach", "--save-csv"),
    )
    same = tables(root, ROWS)["ood/attach"]
    assert same.tolist() == first["ood/tie_combined"].tolist()
    # Scores of another checkpoint do not stay; full-spectrum tables come beside the others.
    before = (out / "s0" / "scores" / "tie.pkl").read_bytes()
    torch.save(nets[1].state_dict(), root / "s0" / "best.ckpt")
    for folder in (root, out):
        shutil.rmtree(folder / "s1")
    launch(*arguments, "--fsood")
    assert set(tables(out, ROWS)) == {*first, "fsood/tie", "fsood/tie_combined"}
    assert (out / "s0" / "scores" / "tie.pkl").read_bytes() != before
    for folder in (root, out):
        shutil.rmtree(folder)


@pytest.mark.parametrize("arch", ["resnet50", "swin-t", "vit-b-16", "regnet"])
def test_torchvisions_weights_are_attached_to_and_scored(checkout, monkeypatch, arch):
    import openood.networks as networks
    from torchvision.models import get_weight

    from tie_ext.openood.attach import TORCHVISION

    name, weights = TORCHVISION[arch]
    torch.manual_seed(0)
    net, asked = getattr(networks, name)(), []
    if arch == "vit-b-16":  # whose last layer begins with zeros
        torch.nn.init.normal_(net.heads.head.weight)
    state = net.state_dict()

    def read(url):
        asked.append(url)
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", read)
    arguments = of_the_page("attach --id-data imagenet --tvs-pretrained")
    arguments[arguments.index("--arch") + 1] = arch
    more = ["--fsood"] if arch in ("vit-b-16", "regnet") else []
    launch(*arguments, *more)
    assert asked == [get_weight(weights).url]
    out = checkout / "results" / f"imagenet_{arch}_tvsv1_base_default"
    found = tables(out, LARGE)
    expected = {"ood/tie", "ood/tie_combined"}
    assert set(found) == expected | ({"fsood/tie", "fsood/tie_combined"} if more else set())
    saved = torch.load(out / "best.ckpt", weights_only=True)
    assert saved["garbage.mean"].isfinite().all()
    assert torch.hub.load_state_dict_from_url is read


def test_imagenet_200_and_checkpoints_of_imagenet_are_attached_to(checkout, tmp_path):
    import openood.networks as networks

    torch.manual_seed(0)
    for name, net in (
        ("imagenet200", networks.ResNet18_224x224(num_classes=200)),
        ("imagenet", networks.ResNet50()),
    ):
        (tmp_path / name / "s0").mkdir(parents=True)
        torch.save(net.state_dict(), tmp_path / name / "s0" / "best.ckpt")
        launch("attach", "--id-data", name, "--root", str(tmp_path / name))
        found = tables(tmp_path / f"{name}_attach", LARGE)
        place = "s0/" * (name == "imagenet") + "ood"
        assert set(found) == {f"{place}/tie", f"{place}/tie_combined"}


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
def test_attach_says_what_it_wants(checkout, tmp_path, capsys, arguments, message):
    (tmp_path / "s0").mkdir()
    torch.save(Conv3(3, 10).state_dict(), tmp_path / "s0" / "best.ckpt")
    with pytest.raises(SystemExit) as stopped:
        launch("attach", *arguments.format(other=tmp_path).split())
    assert re.search(message, f"{stopped.value}{capsys.readouterr().err}")


def test_eval_ood_imagenet_scores_an_attached_network(openood, place, tmp_path):
    import pandas as pd
    from openood.networks import ResNet50

    torch.save(around(ResNet50(), "multilayer", 224).state_dict(), tmp_path / "best.ckpt")
    run(
        place / "scripts" / "eval_ood_imagenet.py",
        "--ckpt-path",
        str(tmp_path / "best.ckpt"),
        "--postprocessor",
        "tie",
        "--save-csv",
    )
    table = pd.read_csv(tmp_path / "ood" / "tie.csv", index_col=0)
    assert list(table.index) == [
        "ssb_hard",
        "ninco",
        "nearood",
        "inaturalist",
        "textures",
        "openimage_o",
        "farood",
    ]
    assert table.AUROC.between(0, 100).all()


@pytest.mark.parametrize(
    ("backbone", "garbage"),
    [
        ("resnet18_32x32", "linear"),
        ("resnet18_32x32", "multilayer"),
        ("conv3", "linear"),
        ("resnet20", "multilayer"),
        ("wrn", "linear"),
    ],
)
def test_a_network_of_its_scripts_becomes_the_tie_net_of_a_checkpoint(openood, backbone, garbage):
    from openood.networks import ResNet18_32x32
    from openood.utils.config import Config

    from tie_ext.openood.network import backbone_of

    saved = around(backbone_of(Config(name=backbone, num_classes=10)), garbage)
    saved.autocast_dtype = "bfloat16"
    net = ResNet18_32x32(num_classes=10)
    net.load_state_dict(saved.state_dict())
    net.eval()
    x = torch.rand(2, 3, 32, 32)
    assert isinstance(net, openood.OpenOODTIENet)
    assert (net.tau, net.autocast_dtype, net.image_shape) == (0.25, "bfloat16", (3, 32, 32))
    assert torch.equal(net(x, garbage=True), saved(x, garbage=True))


def test_other_checkpoints_are_loaded_as_before_or_refused(openood):
    from openood.networks import ResNet18_32x32
    from openood.networks.lenet import LeNet

    first, second = ResNet18_32x32(num_classes=10), ResNet18_32x32(num_classes=10)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.fc.weight, first.fc.weight)
    assert not isinstance(second, openood.OpenOODTIENet)
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_state_dict({})
    with pytest.raises(ValueError, match=r"around one of ResNet18_32x32, conv3.* main.py"):
        second.load_state_dict(around(LeNet(10), size=28).state_dict())
    state = around(Conv3(3, 10), "multilayer").state_dict()
    state["garbage.mean"] = state["garbage.mean"][:-4]
    with pytest.raises(ValueError, match="for 32 pixels, but got another"):
        second.load_state_dict(state)


def test_networks_are_its_own_again_afterwards(openood):
    import openood.networks as networks
    from openood.networks.resnet50 import ResNet50

    assert networks.ResNet50 is not ResNet50
    openood.unregister()
    assert networks.ResNet50 is ResNet50


# The user's configs.


def test_the_evaluation_api_reads_the_users_own_file(openood, tmp_path):
    from openood.evaluation_api.postprocessor import get_postprocessor

    assert get_postprocessor(str(tmp_path), "tie", "cifar10").t == 1.0
    assert not list(tmp_path.iterdir())  # nothing was downloaded
    (tmp_path / "postprocessors").mkdir()
    (tmp_path / "postprocessors" / "tie.yml").write_text(
        "postprocessor:\n  name: tie\n  APS_mode: False\n  postprocessor_args:\n    t: 0.5\n"
    )
    post = get_postprocessor(str(tmp_path), "tie", "cifar10")
    assert (post.t, post.config.dataset.name) == (0.5, "cifar10")


BEFORE = """
import sys
{imports}
import urllib.request
urllib.request.urlretrieve = None
for name in ('tie', 'tie_ue', 'tie_combined', 'attach', 'dmr'):
    post = get_postprocessor("nowhere", name, "cifar10")
    assert post.name == name, name
tie_ext.openood.unregister()
try:
    get_postprocessor("nowhere", "tie", "cifar10")
except TypeError:
    print("known")
"""


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_names_are_known_without_a_download_before_register(openood_root, tmp_path, first):
    lines = ["import tie_ext.openood"]
    lines.append("from openood.evaluation_api.postprocessor import get_postprocessor")
    code = BEFORE.format(imports="\n".join(lines if first == "ours" else lines[::-1]))
    path = os.pathsep.join([str(openood_root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("known\n"), done.stderr[-2000:]


class Loader(list):
    """Batches of normalised images, with the transform of the evaluation API or without."""

    def __init__(self, name: str | None):
        super().__init__([{"data": torch.rand(6, 3, 32, 32) - 0.5, "label": torch.arange(6) % 2}])
        if name is not None:
            from openood.evaluation_api.preprocessor import get_default_preprocessor

            self.dataset = type("", (), {"preprocessor": get_default_preprocessor(name)})()


@pytest.mark.parametrize(
    ("name", "config", "low"),
    [
        ("cifar10", None, -0.4914 / 0.2470),
        (None, {"name": "cifar100"}, -0.5071 / 0.2675),
        (None, {"name": "a", "normalization_type": "b"}, -1.0),
    ],
)
def test_dmr_knows_the_value_range_without_a_config(openood, monkeypatch, name, config, low):
    from openood.utils.config import Config

    import tie_ext.openood.rejection as rejection

    seen = []
    monkeypatch.setattr(
        rejection, "MarginalRepresentations", lambda domain, settings: seen.append(domain)
    )
    monkeypatch.setattr(rejection, "marginal_features", lambda *_: (None, None))
    monkeypatch.setattr(rejection, "fit_rejection", lambda *_, **__: None)
    post = rejection.DMRPostprocessor(
        config and Config({"postprocessor": {"name": "dmr"}, "dataset": config})
    )
    post.setup(Conv3(3, 2), {"train": Loader(name)}, {})
    assert seen[0].low.shape == seen[0].high.shape == (3, 1, 1)
    assert seen[0].low[0].item() == pytest.approx(low)


def test_tie_ue_ranks_as_gen_with_gamma_1_over_all_classes(openood):
    from openood.postprocessors import GENPostprocessor
    from openood.utils.config import Config

    settings = {"postprocessor_args": {"gamma": 1, "M": 10}, "postprocessor_sweep": {}}
    logits = 5 * torch.randn(50, 10)
    ue = openood.TIEUEPostprocessor().postprocess(torch.nn.Identity(), logits)[1]
    gen = GENPostprocessor(Config({"postprocessor": settings})).postprocess(
        torch.nn.Identity(), logits
    )[1]
    torch.testing.assert_close(ue, gen * 10 / 9)


# Without a GPU.


def test_a_device_that_is_named_is_the_cpu(openood):
    for found in (
        torch.eye(2, device="cuda"),
        torch.ones(2).to("cuda:0"),
        torch.arange(3).to(torch.device("cuda")),
        torch.nn.Linear(1, 1).to(device="cuda").weight,
        torch.cuda.FloatTensor([1.0]),
    ):
        assert found.device.type == "cpu"
    assert torch.ones(1, device="meta").device.type == "meta"
    assert torch.device("cuda").type == "cuda"
    with torch.random.fork_rng():
        torch.rand(1)


# Which epoch is scored.


def test_best_is_the_last_epoch(openood, tmp_path):
    from openood.recorders import get_recorder
    from openood.utils.config import Config

    settings = {
        "trainer": {"name": "tie"},
        "recorder": {"name": "base", "save_all_models": False},
        "optimizer": {"num_epochs": 3},
        "output_dir": str(tmp_path),
    }
    recorder = get_recorder(Config(settings))
    for epoch, accuracy in ((1, 0.9), (2, 0.5), (3, 0.7)):
        net = torch.nn.Linear(1, 1)
        net.weight.data.fill_(epoch)
        recorder.save_model(net, {"acc": accuracy, "epoch_idx": epoch})
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["weight"].item() == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best.ckpt",
        "best_epoch3_acc0.7000.ckpt",
        "last_epoch3_acc0.7000.ckpt",
    ]
    assert (recorder.best_epoch_idx, recorder.best_acc) == (3, 0.7)
