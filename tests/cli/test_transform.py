"""How image files become images of a network: as torchvision's and timm's own pipelines, and the
files that people's folders hold.
"""

import csv
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_net

from tie_ext.cli import data, reading, settings
from tie_ext.cli.images import ImageFiles
from tie_ext.cli.main import main
from tie_ext.cli.presets import make_transform
from tie_ext.cli.settings import ImageSettings
from tie_ext.cli.transform import Transform, load_transform

Image = pytest.importorskip("PIL.Image")
models = pytest.importorskip("torchvision.models")
T = pytest.importorskip("torchvision.transforms")
RNG = np.random.default_rng(0)
SHAPES = [(300, 400), (401, 223), (224, 224), (30, 700)]
"""Height and width of pictures."""


def picture(height: int, width: int, channels: int = 3):
    return Image.fromarray(RNG.integers(0, 256, (height, width, channels), np.uint8).squeeze())


def of(name: str, backbone: str, size: int | None = None, channels: int = 3, **more) -> Transform:
    return make_transform(name, backbone, channels, size, 64, **more)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arch", ["resnet50", "efficientnet_b0", "vit_b_16"])
def test_torchvisions_presets_give_what_their_weights_do(arch, shape):
    image, weights = picture(*shape), models.get_model_weights(arch).DEFAULT
    ours = of("torchvision", f"torchvision:{arch}")
    torch.testing.assert_close(ours(image), weights.transforms()(image), atol=1e-6, rtol=0)
    first = next(iter(models.get_model_weights(arch)))
    named = of(f"torchvision:{first.name}", f"torchvision:{arch}")
    torch.testing.assert_close(named(image), first.transforms()(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "arch", ["resnet18", "convnext_tiny", "swinv2_cr_small_224", "eva02_tiny_patch14_336", "dla34"]
)
def test_timms_data_config_gives_what_timm_does(arch, shape):
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    image, own = picture(*shape), timm.get_pretrained_cfg(arch).to_dict()
    theirs = create_transform(**resolve_data_config({}, pretrained_cfg=own))
    ours = of("timm", f"timm:{arch}")
    torch.testing.assert_close(ours(image), theirs(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "side"), [("crop", 54), ("crop:1", 48), ("crop:1.25", 60)])
def test_a_crop_is_of_the_middle_of_the_resized_image(name, side, shape):
    image = picture(*shape)
    own = T.Compose([T.Resize(side), T.CenterCrop(48), T.ToTensor()])
    assert torch.equal(of(name, "conv3", 48)(image), own(image))
    whole = of(name, "torchvision:efficientnet_b0")
    assert (whole.shape, whole.interpolation) == ((3, 224, 224), "bicubic")
    assert whole.resize == int(224 * (float(name[5:] or 0) or 256 / 224))
    assert whole.mean == (0.485, 0.456, 0.406)
    assert of(name, "torchvision:efficientnet_b0", channels=1).mean == ()
    assert of(name, "torchvision:efficientnet_b0", mean=(0.5,), std=(0.5,)).mean == (0.5,)


@pytest.mark.parametrize(
    ("data", "backbone", "size", "expected"),
    [
        ("folder:x", "torchvision:resnet18", None, ("crop", (3, 224, 224), 256)),
        ("folder:x", "torchvision:resnet18", 28, ("crop", (3, 28, 28), 32)),
        ("folder:x", "conv3", None, ("squash", (3, 64, 64), (64, 64))),
        ("cifar10", "torchvision:resnet18", None, ("squash", (3, 32, 32), (32, 32))),
    ],
)
def test_folders_are_cropped_for_networks_of_registries_and_nothing_else(
    data, backbone, size, expected
):
    found = ImageSettings(data=data, backbone=backbone, size=size).image_transform()
    assert (found.name, found.shape, found.resize) == expected


@pytest.mark.parametrize(
    ("name", "backbone", "message"),
    [
        ("zoom", "conv3", "one of torchvision, timm, crop, squash, but got 'zoom'"),
        ("squash:2", "conv3", "but got 'squash:2'"),
        ("crop:", "conv3", "but got 'crop:'"),
        ("crop:0.5", "conv3", r"in \[1, 4\], but got 0.5"),
        ("crop:much", "conv3", "but got nan"),
        ("timm", "torchvision:resnet18", "--backbone timm:NAME beside --transform timm, but got"),
        ("torchvision", "conv3", "--backbone torchvision:NAME beside"),
    ],
)
def test_a_transform_that_is_none_is_refused(name, backbone, message):
    with pytest.raises(ValueError, match=message):
        ImageSettings(data="folder:x", backbone=backbone, transform=name)
    with pytest.raises(ValueError, match="Expected weights of resnet18, one of IMAGENET1K_V1"):
        of("torchvision:V9", "torchvision:resnet18")


def test_a_transform_is_kept_in_a_record_and_a_damaged_one_is_refused(tmp_path):
    kept = of("crop", "torchvision:resnet18", 32, exif_transpose=True)
    record = json.loads(json.dumps(asdict(kept)))
    assert Transform.of_record(record) == kept
    assert load_transform(tmp_path) is None
    for key, value in {
        "shape": [3, 0, 1],
        "resize": "32",
        "interpolation": "eval",
        "mean": [2, 0, 0],
        "std": [0.1],
        "more": 1,
    }.items():
        damaged = {"transform": {**record, key: value}}
        (tmp_path / "run.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"^Expected a transform of images in a record|^Expe"):
            load_transform(tmp_path)


@pytest.fixture
def phone(tmp_path):
    """A white bar on top: upright; lying, with the EXIF orientation that says so; and one of 1."""
    bar = np.zeros((64, 64, 3), np.uint8)
    bar[:20] = 255
    for name, orientation, turn in (("up", None, 0), ("lying", 6, 90), ("one", 1, 0)):
        exif = Image.Exif()
        if orientation:
            exif[reading.ORIENTATION] = orientation
        Image.fromarray(bar).rotate(turn).save(tmp_path / f"{name}.jpg", exif=exif, quality=95)
    return tmp_path


def test_a_photograph_is_turned_by_its_exif_orientation_only_if_asked(phone):
    files = [phone / f"{name}.jpg" for name in ("up", "lying", "one")]
    for turned in (False, True):
        how = Transform.squash((1, 8, 8), exif_transpose=turned)
        up, lying, _ = (how.read(file).float() for file in files)
        assert ((up - lying).abs().max() < 30) == turned
        (note,) = settings.survey([ImageFiles.of(files, how)], how)
        said = "turned upright" if turned else "not turned (--exif-transpose)"
        assert note == f"1 of 3 images carry an EXIF orientation: they are {said}"


def test_a_set_that_is_not_square_says_how_it_is_read(tmp_path):
    for i, shape in enumerate([(8, 8), (8, 9), (9, 8)]):
        picture(*shape).save(tmp_path / f"{i}.png")
    files = sorted(tmp_path.iterdir())
    for name, said in (
        ("squash", "squashed to 28 x 28 pixels (--transform squash; crop keeps proportions)"),
        ("crop", "resized to 32 pixels on the shorter side, and 28 x 28 are cropped from the "),
    ):
        how = of(name, "conv3", 28)
        (note,) = settings.survey([ImageFiles.of(files, how)], how)
        assert note.startswith(f"2 of 3 images are not square: they are {said}")
        assert settings.survey([ImageFiles.of(files[:1], how)], how) == ()


@pytest.mark.parametrize("suffix", sorted(reading.SUFFIXES))
def test_every_suffix_that_pillow_knows_is_read(suffix, tmp_path):
    if suffix in reading.WITH_HEIF:
        pytest.importorskip("pillow_heif")
    if suffix not in reading.readable_suffixes():
        pytest.skip("not by this Pillow")
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(2):
            file = tmp_path / label / f"{i}{suffix.upper()}"
            Image.new("L" if suffix == ".pgm" else "RGB", (20, 10), 120).save(file)
    found = data.load(f"folder:{tmp_path}", "ood", shape=(3, 8, 8))
    assert len(found) == 4
    shade = torch.tensor([120.0] * 3 if suffix == ".pgm" else [120.0, 0, 0]).view(3, 1, 1)
    assert (found.x.float() - shade).abs().max() < 9


def scored(folder, capsys, *more) -> tuple[int, list[dict], str]:
    """Exit code, rows and standard error of ``tie-ext score`` on a folder."""
    net = folder.parent / "network.safetensors"
    make_net().save(net)
    status = main(["score", str(net), str(folder), *more])
    said = capsys.readouterr()
    return status, list(csv.DictReader(said.out.splitlines())), said.err


def test_files_that_pillow_does_not_read_are_counted_and_named(tmp_path, monkeypatch, capsys):
    known = frozenset({".png", ".jpg"})
    monkeypatch.setattr(reading, "readable_suffixes", lambda: known)
    for name in ("a/0.png", "a/1.heic", "b/0.png", "b/1.heic", "b/2.avif"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        picture(28, 28).save(tmp_path / "set" / name, "png")
    said = (
        "left out, as Pillow does not read them here: 1 .avif, 2 .heic; pip install pillow-heif "
        "reads .heic"
    )
    how = Transform.squash((1, 8, 8))
    found = data.load(f"folder:{tmp_path / 'set'}", "ood", in_memory="no", transform=how)
    assert settings.survey([found, found.first(1)], how) == (said,)
    status, rows, error = scored(tmp_path / "set", capsys)
    assert (status, len(rows)) == (0, 2)
    assert error.endswith(f"tie-ext: {said}\n")


def test_a_file_that_is_no_regular_one_or_vanishes_or_has_no_utf8_name_costs_its_own_row_alone(
    tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        picture(28, 28).save(folder / f"{i}.png")
    os.mkfifo(folder / "3.png")
    os.symlink(folder / "nowhere", folder / "4.png")
    strange = os.fsencode(folder / "5") + b"\xff.png"
    Path(folder / "0.png").rename(os.fsdecode(strange))
    read = Transform.read

    def vanishing(self, path):
        Path(folder / "2.png").unlink(missing_ok=True)
        return read(self, path)

    monkeypatch.setattr(Transform, "read", vanishing)
    for more in ([], ["--out", str(tmp_path / "rows.csv")]):
        status, rows, error = scored(folder, capsys, *more)
        rows = rows or list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
        levels = {Path(row["image"]).name: row["level"] for row in rows}
        good = {name for name, level in levels.items() if level != "unreadable"}
        assert (status, good) == (1, {"1.png", r"5\udcff.png"})
        assert "2.png" in levels or more
        assert "unreadable" in error


def test_a_detector_that_does_not_say_how_images_are_read_says_so(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    for i, shape in enumerate([(28, 28), (28, 56)]):
        picture(*shape).save(tmp_path / "set" / f"{i}.png")
    status, rows, error = scored(tmp_path / "set", capsys)
    assert (status, len(rows)) == (0, 2)
    assert "1 of 2 images were squashed to 28 x 28 pixels, as the detector does not say" in error
