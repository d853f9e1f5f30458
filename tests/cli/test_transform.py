"""How image files become images of a network: as torchvision's and timm's own pipelines, and the
files that people's folders hold.
"""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models
from torchvision import transforms as T

from tie_ext.cli import data, reading
from tie_ext.cli.presets import make_transform
from tie_ext.cli.settings import ImageSettings
from tie_ext.cli.transform import Transform, load_transform

RNG = np.random.default_rng(0)
SHAPES = [(300, 400), (401, 223), (224, 224), (30, 700)]
"""Height and width of pictures."""


def picture(height: int, width: int, channels: int = 3):
    return Image.fromarray(RNG.integers(0, 256, (height, width, channels), np.uint8).squeeze())


def of(name: str, backbone: str, size: int | None = None, channels: int = 3, **more) -> Transform:
    return make_transform(name, backbone, channels, size, 64, **more)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arch", ["resnet50", "efficientnet_b0", "vit_b_16"])
def test_presets_of_torchvision(arch, shape):
    image, weights = picture(*shape), models.get_model_weights(arch).DEFAULT
    ours = of("torchvision", f"torchvision:{arch}")
    torch.testing.assert_close(ours(image), weights.transforms()(image), atol=1e-6, rtol=0)
    first = next(iter(models.get_model_weights(arch)))
    named = of(f"torchvision:{first.name}", f"torchvision:{arch}")
    torch.testing.assert_close(named(image), first.transforms()(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("arch", ["resnet18", "convnext_tiny", "swinv2_cr_small_224", "dla34"])
def test_data_configs_of_timm(arch, shape):
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    image, own = picture(*shape), timm.get_pretrained_cfg(arch).to_dict()
    theirs = create_transform(**resolve_data_config({}, pretrained_cfg=own))
    ours = of("timm", f"timm:{arch}")
    torch.testing.assert_close(ours(image), theirs(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "side"), [("crop", 54), ("crop:1", 48), ("crop:1.25", 60)])
def test_a_crop_of_the_middle(name, side, shape):
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
def test_the_default_transform(data, backbone, size, expected):
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
        ("torchvision:V9", "torchvision:resnet18", "Expected weights of resnet18, one of IMAG"),
    ],
)
def test_a_transform_that_does_not_exist(name, backbone, message):
    settings = ImageSettings(data="folder:x", backbone=backbone, transform=name)
    with pytest.raises(ValueError, match=message):
        settings.image_transform()


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [3, 1]},
        {"resize": "32"},
        {"interpolation": "eval"},
        {"mean": [2, 0]},
        {"std": [0.1, 0.0, 0.1]},
        {"more": 1},
    ],
)
def test_a_damaged_record_of_a_transform(changed, tmp_path):
    kept = of("crop", "torchvision:resnet18", 32, exif_transpose=True)
    record = json.loads(json.dumps(asdict(kept)))
    assert Transform.of_record(record) == kept
    assert load_transform(tmp_path) is None
    (tmp_path / "run.json").write_text(json.dumps({"transform": {**record, **changed}}))
    with pytest.raises(ValueError, match=r"^Expected a transform of images in a record, but got"):
        load_transform(tmp_path)


def test_photographs_turned_only_if_asked(tmp_path):
    bar = np.zeros((64, 64, 3), np.uint8)
    bar[:20] = 255
    lies = Image.Exif()
    lies[0x0112] = 6  # the orientation
    Image.fromarray(bar).save(tmp_path / "up.jpg", quality=95)
    Image.fromarray(bar).rotate(90).save(tmp_path / "lying.jpg", exif=lies, quality=95)
    for turned in (False, True):
        how = Transform.squash((1, 8, 8), exif_transpose=turned)
        up, lying = (how.read(tmp_path / f"{name}.jpg").float() for name in ("up", "lying"))
        assert ((up - lying).abs().max() < 30) == turned


@pytest.mark.parametrize("suffix", sorted(reading.SUFFIXES))
def test_suffixes_of_images(suffix, tmp_path):
    reading.register_heif()
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        pytest.skip("not by this Pillow")
    (tmp_path / "a").mkdir()
    grey = suffix == ".pgm"
    for i in range(2):
        Image.new("L" if grey else "RGB", (20, 10), 120).save(tmp_path / f"a/{i}{suffix.upper()}")
    found = data.load(f"folder:{tmp_path}", "ood", shape=(3, 8, 8))
    assert len(found) == 2
    shade = torch.tensor([120.0] * 3 if grey else [120.0, 0, 0]).view(3, 1, 1)
    assert (found.x.float() - shade).abs().max() < 9


GREY16 = np.array([[0, 257 * 10], [257 * 200 + 128, 65535]], dtype=np.uint16)
"""0, 10, 200 and 255 of 255, in 16 bits."""


@pytest.mark.parametrize(
    ("kind", "suffix"), [("<u2", "png"), ("<u2", "tif"), (">u2", "tif"), ("<i4", "tif")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_eight(kind, suffix, channels, tmp_path):
    Image.fromarray(GREY16.astype(kind)).save(tmp_path / f"x.{suffix}")
    x = Transform.squash((channels, 2, 2)).read(tmp_path / f"x.{suffix}")
    assert x.tolist() == [[[0, 10], [200, 255]]] * channels


@pytest.mark.parametrize(
    "values", [np.float32(0.5), np.int32(65536), np.int32(-1)], ids=["F", "above", "below"]
)
def test_pixels_of_no_known_range(values, tmp_path):
    Image.fromarray(np.full((2, 2), values)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=r"x\.tif, but got: pixels of neither 8 nor 16 bits"):
        Transform.squash((3, 2, 2)).read(tmp_path / "x.tif")


def palette() -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "options", "colour"),
    [
        (palette(), "png", {"transparency": 1}, (200, 100, 50)),
        (palette(), "png", {"transparency": bytes([255, 128])}, (200, 100, 50)),
        (Image.new("RGBA", (2, 2), (200, 100, 50, 0)), "png", {}, (200, 100, 50)),
        (Image.new("LA", (2, 2), (90, 0)), "png", {}, (90, 90, 90)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "tif", {}, (255, 0, 0)),
        (Image.new("1", (2, 2), 1), "png", {}, (255, 255, 255)),
    ],
    ids=["clear palette", "half-clear palette", "RGBA", "LA", "CMYK", "white bit"],
)
def test_colours_without_their_transparency(image, suffix, options, colour, tmp_path):
    image.save(tmp_path / f"x.{suffix}", **options)
    colours, greys = (Transform.squash((c, 2, 2)).read(tmp_path / f"x.{suffix}") for c in (3, 1))
    assert colours[:, 0, 0].tolist() == list(colour)
    grey = round(0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])
    assert greys[0, 0, 0].item() == pytest.approx(grey, abs=1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "webp", "gif"])
def test_truncated_images(suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    Image.effect_noise((40, 40), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"^Expected an image file at {path}, but got: ."):
        Transform.squash((3, 8, 8)).read(path)
