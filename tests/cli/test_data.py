"""Image sets: how folders are read and split, parts of them, what training sees of them, noise."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tie_ext.cli import batches, data
from tie_ext.cli.batches import ImageBatches, training_batches
from tie_ext.cli.images import ImageFiles, ImageSet
from tie_ext.cli.transform import Transform

Image = pytest.importorskip("PIL.Image")


def squashed(path, shape) -> torch.Tensor:
    return Transform.squash(shape).read(path)


def images(count: int = 20, size: int = 28) -> ImageSet:
    x = torch.randint(1, 256, (count, 3, size, size), dtype=torch.uint8)
    return ImageSet(x, torch.arange(count) % 10, tuple("abcdefghij"))


def test_shifted_images_are_crops_of_the_padded_ones():
    some = images(6, 8)
    padded = F.pad(some.x, (2, 2, 2, 2)).float() / 255
    ((x, y),) = ImageBatches(some, 6, shift=2)
    assert torch.equal(y, some.y)
    for i in range(6):
        crops = [
            padded[i, :, top : top + 8, left : left + 8] for top in range(5) for left in range(5)
        ]
        assert sum(torch.equal(x[i], crop) for crop in crops) == 1


def test_every_shift_occurs_in_both_directions():
    some = ImageSet(
        torch.zeros(500, 1, 9, 9, dtype=torch.uint8), torch.zeros(500, dtype=torch.long), ("a",)
    )
    some.x[:, :, 4, 4] = 255
    ((x, _),) = ImageBatches(some, 500, shift=1)
    seen = {tuple(place) for place in x.nonzero()[:, 2:].tolist()}
    assert seen == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}


def test_training_sees_shuffled_shifted_images_and_testing_does_not():
    some = images()
    assert not torch.equal(next(iter(training_batches(some)))[0], some.x.float() / 255)
    assert torch.equal(next(iter(ImageBatches(some)))[0], some.x.float() / 255)


def test_some_classes_and_the_others_are_the_whole():
    some = images()
    part = some.classes_between(3, 5)
    assert part.classes == ("d", "e", "f")
    assert sorted(part.y.tolist()) == [0, 0, 1, 1, 2, 2]
    rest = some.without([3, 4, 5])
    assert len(part) + len(rest) == len(some)
    assert set(rest.y.tolist()) == {-1}
    with pytest.raises(ValueError, match="Expected classes among 0 to 9, but got 5 to 10"):
        some.classes_between(5, 10)


def test_folders_of_numbers_have_the_names_that_torchvision_gives_the_classes(tmp_path):
    from torchvision.datasets import FashionMNIST

    for label in range(10):
        (tmp_path / "fashionmnist" / "train" / str(label)).mkdir(parents=True)
        Image.new("L", (28, 28), 10 * label).save(
            tmp_path / "fashionmnist" / "train" / str(label) / "0.png"
        )
    named = data.load("fashionmnist", "train", tmp_path)
    assert named.classes == tuple(FashionMNIST.classes)
    assert named.y.tolist() == list(range(10))
    assert data.load("fashionmnist:8-9", "train", tmp_path).classes == ("Bag", "Ankle boot")
    (tmp_path / "fashionmnist" / "train" / "9").rename(
        tmp_path / "fashionmnist" / "train" / "boots"
    )
    assert data.load("fashionmnist", "train", tmp_path).classes == (*map(str, range(9)), "boots")


def test_some_classes_of_a_named_set(tmp_path):
    for label in range(4):
        (tmp_path / "mnist" / "train" / str(label)).mkdir(parents=True)
        Image.new("L", (28, 28), 10 * label).save(
            tmp_path / "mnist" / "train" / str(label) / "0.png"
        )
    part = data.load("mnist:1-2", "train", tmp_path)
    assert part.shape == (1, 28, 28)
    assert part.classes == ("1", "2")
    assert part.y.tolist() == [0, 1]
    assert part.x[:, 0, 0, 0].tolist() == [10, 20]


def test_a_set_that_is_known_and_not_there_is_told_from_one_that_is_not_known(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"Expected train images of tinyimagenet, which torchvision does not have, in a "
        r"folder, one of .*/tin/train",
    ):
        data.load("tinyimagenet", "train", tmp_path)
    with pytest.raises(
        ValueError,
        match=r"Expected a data set, one of mnist.*, but got 'imagenette' and no folder",
    ):
        data.load("imagenette", "train", tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(
        ValueError, match=r"but got '.*mine' and no folder .*; did you mean folder:.*mine\?"
    ):
        data.load(str(tmp_path / "mine"), "train", tmp_path)


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "sphere"])
def test_noise_is_the_same_for_the_same_seed(kind):
    x = data.noise(kind, 5, (3, 28, 28)).x
    assert torch.equal(x, data.noise(kind, 5, (3, 28, 28)).x)
    assert not torch.equal(x, data.noise(kind, 5, (3, 28, 28), seed=1).x)
    assert x.float().std() > 0


def test_unknown_noise_is_refused():
    with pytest.raises(
        ValueError, match="Expected kind to be 'gaussian', 'uniform' or 'sphere', but got 'pink'"
    ):
        data.noise("pink", 1, (1, 28, 28))


def write(folder: Path, counts: dict[str, int], size: int = 4) -> Path:
    """Grey images in ``folder/CLASS/i.png``, each of a value of its own."""
    value = itertools.count()
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (size, size), next(value)).save(folder / name / f"{i}.png")
    return folder


def values(images: ImageSet) -> list[int]:
    return images.x[:, 0, 0, 0].tolist()


def parts(path: Path, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    train, test = (
        data.load(f"folder:{path}", split, shape=(1, 4, 4), seed=seed)
        for split in ("train", "test")
    )
    return train, test


def test_a_folder_without_splits_is_split_one_in_five_of_each_class(tmp_path):
    train, test = parts(write(tmp_path / "set", {"a": 50, "b": 11, "c": 2}))
    assert train.classes == test.classes == ("a", "b", "c")
    assert train.y.bincount().tolist() == [40, 9, 1]
    assert test.y.bincount().tolist() == [10, 2, 1]
    assert sorted(values(train) + values(test)) == list(range(63))
    said = (
        f"{tmp_path / 'set'} has no train/ and test/: 50 images to train on, 13 held out "
        f"(one in five of each class, seed 0)"
    )
    assert (train.note, test.note) == ("", said)


def test_a_split_is_the_seeds_and_not_the_disks(tmp_path, monkeypatch):
    path = write(tmp_path / "set", {"a": 20, "b": 20})
    first = [values(part) for part in parts(path)]
    for listing in ("iterdir", "rglob"):
        ordered = getattr(Path, listing)
        monkeypatch.setattr(
            Path, listing, lambda self, *a, ordered=ordered: iter(list(ordered(self, *a))[::-1])
        )
    assert [values(part) for part in parts(path)] == first
    assert [values(part) for part in parts(path.rename(tmp_path / "moved"))] == first
    assert [values(part) for part in parts(tmp_path / "moved", seed=1)] != first
    assert first[1] != list(range(4)) + list(range(20, 24))


def test_a_class_of_one_image_is_trained_on_and_said(tmp_path):
    train, test = parts(write(tmp_path / "set", {"a": 6, "one": 1, "two": 2}))
    assert train.y.bincount().tolist() == [5, 1, 1]
    assert test.y.tolist() == [0, 2]
    assert test.note.endswith(
        "(one in five of each class, seed 0); no test image of one, of which there is one image"
    )
    with pytest.raises(
        ValueError,
        match=r"Expected a class of two images or more below .*, to hold one out, but got one "
        r"image of each",
    ):
        parts(write(tmp_path / "ones", {"a": 1, "b": 1}))


def test_training_images_alone_are_split_too(tmp_path):
    write(tmp_path / "train", {"a": 10, "b": 10})
    write(tmp_path / "pictures", {"c": 3})
    train, test = parts(tmp_path)
    assert (len(train), len(test)) == (16, 4)
    assert test.note.startswith(
        f"{tmp_path} has train/ and no test/: 16 images to train on, 4 held out"
    )


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@pytest.mark.parametrize("place", ["folder", "named"])
def test_validation_images_are_the_test_set_where_there_is_no_other(name, place, tmp_path):
    path = tmp_path / "birds"
    write(path / "train", {"a": 3, "b": 2})
    write(path / name, {"a": 1, "b": 2})
    called = f"folder:{path}" if place == "folder" else "birds"
    train, test = (data.load(called, split, tmp_path, (1, 4, 4)) for split in ("train", "test"))
    assert train.classes == test.classes == ("a", "b")
    assert (len(train), len(test)) == (5, 3)
    assert test.note == f"{path} has no test/: the 3 images of {name}/ are the test set"
    write(path / "test", {"a": 4, "b": 4})
    assert len(test := data.load(called, "test", tmp_path, (1, 4, 4))) == 8
    assert test.note == ""


@pytest.mark.parametrize("place", ["folder", "named"])
def test_test_images_alone_cannot_be_trained_on(place, tmp_path):
    write(tmp_path / "birds" / "test", {"a": 2, "b": 2})
    called = f"folder:{tmp_path / 'birds'}" if place == "folder" else "birds"
    assert len(data.load(called, "test", tmp_path)) == 4
    with pytest.raises(
        ValueError,
        match=r"Expected training images in .*birds/train, beside .*birds/test, but got no such "
        r"folder",
    ):
        data.load(called, "train", tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    train, test = parts(write(tmp_path / "set", {"bus": 5, "train": 5}))
    assert train.classes == test.classes == ("bus", "train")
    with pytest.raises(
        ValueError,
        match=r"Expected images in folders, one per class, below .*/flat/train, but got none",
    ):
        parts(write(tmp_path / "flat", {"train": 5, "test": 5}))


def test_of_an_ood_set_all_images_are_used_unless_it_has_a_test_set(tmp_path):
    path = write(tmp_path / "set", {"a": 5, "b": 1})
    assert len(data.load(f"folder:{path}", "ood")) == 6
    write(tmp_path / "split" / "train", {"a": 3})
    assert len(data.load(f"folder:{tmp_path / 'split'}", "ood")) == 3
    write(tmp_path / "split" / "val", {"a": 2})
    assert len(data.load(f"folder:{tmp_path / 'split'}", "ood")) == 2


def test_validation_images_are_those_of_val_alone_and_have_no_labels(tmp_path):
    write(tmp_path / "set" / "train", {"a": 3})
    write(tmp_path / "set" / "test", {"a": 4})
    with pytest.raises(
        ValueError, match=r"Expected validation images in a folder, one of .*set/val, but got none"
    ):
        data.load("set", "val", tmp_path)
    write(tmp_path / "set" / "val", {"a": 2, "b": 1})
    for name in ("set", f"folder:{tmp_path / 'set'}"):
        found = data.load(name, "val", tmp_path, (1, 8, 8))
        assert (found.x.shape, found.y.tolist(), found.classes) == ((3, 1, 8, 8), [-1] * 3, ())
    assert len(data.load("set", "test", tmp_path)) == 4


def test_parts_of_a_set_keep_what_is_said_of_it(tmp_path):
    _, test = parts(write(tmp_path / "set", {"a": 10, "b": 10}))
    assert test.first(2).note == test.classes_between(1, 1).note == test.note != ""


GREY16 = np.array([[0, 257 * 10], [257 * 200 + 128, 65535]], dtype=np.uint16)
"""0, 10, 200 and 255 of 255, in 16 bits."""


@pytest.mark.parametrize(
    ("kind", "suffix"), [("<u2", "png"), ("<u2", "tif"), (">u2", "tif"), ("<i4", "tif")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_eight(kind, suffix, channels, tmp_path):
    Image.fromarray(GREY16.astype(kind)).save(tmp_path / f"x.{suffix}")
    x = squashed(tmp_path / f"x.{suffix}", (channels, 2, 2))
    assert x.dtype == torch.uint8
    assert x.tolist() == [[[0, 10], [200, 255]]] * channels


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_every_mode_that_sixteen_bits_are_opened_in_is_known(mode, tmp_path, monkeypatch):
    image = Image.fromarray(GREY16.astype({"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]))
    assert image.mode == mode
    monkeypatch.setattr(Image, "open", lambda _: image)
    assert squashed(__file__, (1, 2, 2)).flatten().tolist() == [0, 10, 200, 255]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (
            np.full((2, 2), 0.5, dtype=np.float32),
            r"floating-point pixels \(mode F\), of which black and white are not known; save it",
        ),
        (
            np.full((2, 2), 65536, dtype=np.int32),
            r"pixels in \[65536, 65536\], outside \[0, 65535\]; save it with 8 or 16 bits",
        ),
        (np.full((2, 2), -1, dtype=np.int32), r"pixels in \[-1, -1\], outside \[0, 65535\]"),
    ],
)
def test_pixels_of_no_known_range_are_refused(values, reason, tmp_path):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(
        ValueError, match=rf"Expected an image file at .*x\.tif, but got: {reason}"
    ):
        squashed(tmp_path / "x.tif", (3, 2, 2))


def palette(alpha: int | bytes) -> tuple:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image, "png", {"transparency": alpha}


@pytest.mark.parametrize(
    ("image", "suffix", "options", "colour"),
    [
        (*palette(0), (200, 100, 50)),
        (*palette(1), (200, 100, 50)),
        (*palette(bytes([255, 128])), (200, 100, 50)),
        (Image.new("RGBA", (2, 2), (200, 100, 50, 0)), "png", {}, (200, 100, 50)),
        (Image.new("LA", (2, 2), (90, 0)), "png", {}, (90, 90, 90)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "tif", {}, (255, 0, 0)),
        (Image.new("1", (2, 2), 1), "png", {}, (255, 255, 255)),
        (Image.new("1", (2, 2), 0), "png", {}, (0, 0, 0)),
    ],
    ids=[
        "palette",
        "clear palette",
        "half-clear palette",
        "RGBA",
        "LA",
        "CMYK",
        "white bit",
        "black bit",
    ],
)
def test_every_kind_of_image_keeps_its_colour_and_loses_its_transparency(
    image, suffix, options, colour, tmp_path
):
    image.save(tmp_path / f"x.{suffix}", **options)
    assert squashed(tmp_path / f"x.{suffix}", (3, 2, 2))[:, 0, 0].tolist() == list(colour)
    grey = round(0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2])
    assert squashed(tmp_path / f"x.{suffix}", (1, 2, 2))[0, 0, 0].item() == pytest.approx(
        grey, abs=1
    )


def test_hidden_files_are_skipped_and_nested_folders_are_not(tmp_path):
    write(
        tmp_path / "train",
        {"a": 3, "b/left": 2, "b/right/far": 2, "b/.thumbnails": 1, ".hidden": 2},
    )
    for name in (".DS_Store", "a/.DS_Store", "a/._0.png", "a/notes.txt", "b/left/._0.png"):
        (tmp_path / "train" / name).write_bytes(b"no image")
    write(tmp_path / "test", {"a": 1, "b": 1})
    images, _ = parts(tmp_path)
    assert images.classes == ("a", "b")
    assert values(images) == [0, 1, 2, 3, 4, 5, 6]


def test_an_empty_class_is_named(tmp_path):
    write(tmp_path, {"a": 3, "b": 3, "c": 0})
    (tmp_path / "c" / ".DS_Store").write_bytes(b"")
    with pytest.raises(
        ValueError,
        match=r"Expected images in .*/c, one folder per class, but got none \(.*\); add some, "
        r"or remove the folder",
    ):
        data.load(f"folder:{tmp_path}", "train")


def broken_files(folder: Path) -> dict[str, bytes]:
    """Files that begin as images do, and are none."""
    found = {"empty.png": b"", "text.jpg": b"hello"}
    for suffix in ("png", "jpg", "bmp", "tif", "webp"):
        Image.effect_noise((40, 40), 60).convert("RGB").save(folder / f"whole.{suffix}")
        found[f"half.{suffix}"] = (folder / f"whole.{suffix}").read_bytes()[
            : (folder / f"whole.{suffix}").stat().st_size // 2
        ]
    return found


def test_a_broken_image_is_named(tmp_path):
    for name, content in broken_files(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=f"Expected an image file at {tmp_path / name}, but got: ."
        ):
            squashed(tmp_path / name, (3, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_moved_images_keep_the_memory_layout_that_backbones_expect(channels):
    x = torch.randint(0, 256, (5, channels, 28, 28), dtype=torch.uint8)
    assert batches.shifted(x, 2).is_contiguous()
    assert batches.shifted(x, 0) is x


@pytest.fixture
def drawn(tmp_path):
    """Two classes of as many images as workers are started for."""
    rng = np.random.default_rng(0)
    for label, low in (("bright", 100), ("dark", 0)):
        (tmp_path / "set" / "train" / label).mkdir(parents=True)
        for i in range(80):
            image = Image.fromarray(rng.integers(low, low + 156, (12, 9, 3), dtype=np.uint8))
            image.save(tmp_path / "set" / "train" / label / f"{i}.jpg")
    shutil.copytree(tmp_path / "set" / "train", tmp_path / "set" / "test")
    return tmp_path / "set"


def test_images_on_disk_are_those_in_memory_to_the_last_bit(drawn):
    memory, disk = (
        data.load(f"folder:{drawn}", "train", shape=(3, 10, 10), in_memory=where)
        for where in ("yes", "no")
    )
    assert (type(memory), type(disk)) == (ImageSet, ImageFiles)
    assert (disk.shape, len(disk), disk.classes) == (memory.shape, len(memory), memory.classes)
    assert torch.equal(disk[3][0], memory[3][0])
    assert torch.equal(disk.first(70).loaded().x, memory.first(70).x)
    drawn_so = []
    for images in (memory, disk, disk):
        torch.manual_seed(1)
        batches = ImageBatches(images, 48, shuffle=True, shift=2)
        drawn_so.append([*(part for batch in batches for part in batch), torch.rand(3)])
    assert [len(batch) for batch in drawn_so[0][:-1:2]] == [48, 48, 48, 16]
    assert all(
        torch.equal(a, b)
        for other in drawn_so[1:]
        for a, b in zip(drawn_so[0], other, strict=True)
    )


def test_a_folder_is_in_memory_where_it_fits_the_budget(drawn, monkeypatch):
    for budget, kind in ((160 * 300, ImageSet), (160 * 300 - 1, ImageFiles)):
        monkeypatch.setattr(data, "BUDGET", budget)
        assert (
            type(data.load(f"folder:{drawn}", "train", shape=(3, 10, 10), in_memory="auto"))
            is kind
        )
    with pytest.raises(
        ValueError, match="Expected in_memory to be one of auto, yes, no, but got 'often'"
    ):
        data.load(f"folder:{drawn}", "train", in_memory="often")


def test_a_broken_image_on_disk_is_named_by_the_worker_that_finds_it(drawn):
    (drawn / "train" / "dark" / "7.jpg").write_bytes(b"no image")
    images = data.load(f"folder:{drawn}", "train", shape=(3, 10, 10), in_memory="no")
    for read in (images.check, lambda: list(ImageBatches(images))):
        with pytest.raises(
            ValueError, match=r"Expected an image file at .*dark/7\.jpg, but got: "
        ) as error:
            read()
        assert "\n" not in str(error.value)


GROWTH = """
import sys, torch
from tie_ext.cli import data
from tie_ext.cli.batches import training_batches
from tie_ext.utils.provenance import peak_memory

images = data.load(f"folder:{sys.argv[1]}", "train", shape=(3, 224, 224), in_memory="auto")
peaks = []
for some in (images.first(300), images):
    seen = sum(float(x[0, 0, 0, 0]) >= 0 for x, _ in training_batches(some, 64))
    peaks.append(peak_memory())
print(peaks[1] - peaks[0])
"""
"""Memory that ten times as many images take."""


@pytest.mark.slow
def test_memory_does_not_grow_with_a_folder_that_is_larger_than_the_budget(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.effect_noise((32, 32), 60).convert("RGB").save(tmp_path / "train" / "a" / "0.jpg")
    for i in range(1, 3000):
        os.link(tmp_path / "train" / "a" / "0.jpg", tmp_path / "train" / "a" / f"{i}.jpg")
    (tmp_path / "test" / "a").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 150  # where all of them are 450 MB
