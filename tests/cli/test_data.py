"""Image sets: how folders are read and split, parts of them, what training sees of them, noise."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cli.conftest import write_images
from tie_ext.cli import batches, data
from tie_ext.cli.batches import ImageBatches, training_batches
from tie_ext.cli.images import ImageFiles, ImageSet
from tie_ext.cli.transform import Transform


def images(count: int = 20, size: int = 28) -> ImageSet:
    x = torch.randint(1, 256, (count, 3, size, size), dtype=torch.uint8)
    return ImageSet(x, torch.arange(count) % 10, tuple("abcdefghij"))


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
    name, shape = f"folder:{path}", (1, 4, 4)
    train, test = (data.load(name, split, shape=shape, seed=seed) for split in ("train", "test"))
    return train, test


def test_shifted_images_are_crops_of_the_padded_ones():
    some = images(6, 8)
    padded = F.pad(some.x, (2, 2, 2, 2)).float() / 255
    ((x, y),) = ImageBatches(some, 6, shift=2)
    assert torch.equal(y, some.y)
    for i in range(6):
        crops = [padded[i, :, t : t + 8, left : left + 8] for t in range(5) for left in range(5)]
        assert sum(torch.equal(x[i], crop) for crop in crops) == 1
    assert batches.shifted(some.x, 2).is_contiguous()
    assert batches.shifted(some.x, 0) is some.x


def test_shifts_in_every_direction():
    x = torch.zeros(500, 1, 9, 9, dtype=torch.uint8)
    x[:, :, 4, 4] = 255
    ((x, _),) = ImageBatches(ImageSet(x, torch.zeros(500).long(), ("a",)), 500, shift=1)
    seen = {tuple(place) for place in x.nonzero()[:, 2:].tolist()}
    assert seen == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}


def test_training_sees_shuffled_images_and_scoring_does_not():
    some = images()
    shuffled = [y.tolist() for _, y in training_batches(some, 5)]
    assert shuffled != [y.tolist() for _, y in ImageBatches(some, 5)]
    assert sorted(itertools.chain(*shuffled)) == sorted(some.y.tolist())
    assert torch.equal(next(iter(ImageBatches(some)))[0], some.x.float() / 255)


def test_some_classes_of_a_set():
    some = images()
    part = some.classes_between(3, 5)
    assert part.classes == ("d", "e", "f")
    assert sorted(part.y.tolist()) == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="Expected classes among 0 to 9, but got 5 to 10"):
        some.classes_between(5, 10)


@pytest.mark.parametrize("place", ["mnist", "images_classic/mnist"])
def test_some_classes_of_a_named_set(place, tmp_path):
    write(tmp_path / place / "train", dict.fromkeys("0123", 1), 28)
    part = data.load("mnist:1-2", "train", tmp_path)
    assert (part.shape, part.classes) == ((1, 28, 28), ("1", "2"))
    assert (part.y.tolist(), values(part)) == ([0, 1], [1, 2])


def test_mnist_of_torchvision(data_root):
    train = data.load("mnist", "train", data_root)
    assert (len(train), train.shape, len(train.classes)) == (60_000, (1, 28, 28), 10)
    colour = data.load("mnist", "test", data_root, (3, 32, 32))
    assert colour.shape == (3, 32, 32)
    assert torch.equal(colour.x[:, 0], colour.x[:, 1])


@pytest.mark.parametrize(
    ("name", "size", "axes"),
    [("mnist", 28, ""), ("cifar10", 32, "last"), ("svhn", 32, "first")],
)
def test_arrays_of_torchvision(name, size, axes, monkeypatch):
    """Channels come last, first or not at all."""
    import torchvision

    x = torch.randint(0, 256, (5, 3 if axes else 1, size, size), dtype=torch.uint8)
    arrays = {"": x[:, 0], "last": x.permute(0, 2, 3, 1), "first": x}[axes].numpy()

    class Fake:
        def __init__(self, root, download, **which):
            self.data, self.targets, self.labels = arrays, [0, 1, 2, 1, 0], [0, 1, 2, 1, 0]

    monkeypatch.setattr(torchvision.datasets, data._TORCHVISION[name], Fake)
    found = data.load(name, "test", "nowhere")
    assert torch.equal(found.x, x)
    assert found.y.tolist() == [0, 1, 2, 1, 0]


def test_names_of_sets_that_are_not_there(tmp_path):
    (tmp_path / "mine").mkdir()
    for name, message in {
        "tinyimagenet": r"which torchvision does not have, in a folder, one of .*/tin,",
        "mnist": "Expected mnist in .* as torchvision or an image folder keeps it, but got none",
        "imagenette": r"Expected a data set, one of mnist.*, but got 'imagenette' and no folder",
        str(tmp_path / "mine"): r"did you mean folder:.*mine\?",
    }.items():
        with pytest.raises(ValueError, match=message):
            data.load(name, "train", tmp_path)


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "sphere"])
def test_noise_of_a_seed(kind):
    x = data.noise(kind, 5, (3, 28, 28)).x
    assert torch.equal(x, data.noise(kind, 5, (3, 28, 28)).x)
    assert not torch.equal(x, data.noise(kind, 5, (3, 28, 28), seed=1).x)
    assert x.float().std() > 0
    with pytest.raises(ValueError, match="Expected kind to be 'gaussian', 'uniform' or"):
        data.noise("pink", 1, (1, 28, 28))


def test_one_image_in_five_of_each_class_is_held_out(tmp_path):
    train, test = parts(write(tmp_path / "set", {"a": 50, "b": 11, "c": 2, "one": 1}))
    assert train.classes == test.classes == ("a", "b", "c", "one")
    assert train.y.bincount().tolist() == [40, 9, 1, 1]
    assert test.y.bincount().tolist() == [10, 2, 1]
    assert sorted(values(train) + values(test)) == list(range(64))
    said = "51 images to train on, 13 held out (one in five of each class, seed 0)"
    assert (train.note, test.note) == ("", f"{tmp_path / 'set'} has no test/: {said}")
    assert test.first(2).note == test.classes_between(1, 1).note == test.note
    with pytest.raises(ValueError, match="Expected a class of two images or more below"):
        parts(write(tmp_path / "ones", {"a": 1, "b": 1}))


def test_a_split_is_the_seeds_and_not_the_disks(tmp_path):
    path = write(tmp_path / "set", {"a": 20, "b": 20})
    first = [values(part) for part in parts(path)]
    moved = path.rename(tmp_path / "moved")
    assert [values(part) for part in parts(moved)] == first
    assert [values(part) for part in parts(moved, seed=1)] != first
    # As earlier versions chose them, so that their runs go on with the same images.
    assert sorted(first[1]) == [1, 5, 10, 19, 28, 32, 34, 39]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
@pytest.mark.parametrize("place", ["folder", "named"])
def test_validation_images_as_test_images(name, place, tmp_path):
    path = tmp_path / "birds"
    write(path / "train", {"a": 3, "b": 2})
    write(path / name, {"a": 1, "b": 2})
    called = f"folder:{path}" if place == "folder" else "birds"
    train, test = (data.load(called, split, tmp_path, (1, 4, 4)) for split in ("train", "test"))
    assert train.classes == test.classes == ("a", "b")
    assert (len(train), len(test)) == (5, 3)
    assert test.note == f"{path} has no test/: the images of {name}/ are the test set"
    write(path / "test", {"a": 4, "b": 4})
    assert len(test := data.load(called, "test", tmp_path, (1, 4, 4))) == 8
    assert test.note == ""


def test_test_images_alone(tmp_path):
    write(tmp_path / "test", {"a": 2, "b": 2})
    assert len(data.load(f"folder:{tmp_path}", "test")) == 4
    with pytest.raises(ValueError, match=r"Expected training images in .*/train, beside .*/test"):
        data.load(f"folder:{tmp_path}", "train")


def test_a_class_called_train(tmp_path):
    train, test = parts(write(tmp_path / "set", {"bus": 5, "train": 5}))
    assert train.classes == test.classes == ("bus", "train")
    with pytest.raises(ValueError, match=r"Expected images in folders, one per class, below .*"):
        parts(write(tmp_path / "flat", {"train": 5, "test": 5}))


@pytest.mark.parametrize(
    ("counts", "count"),
    [({"a": 5, "b": 1}, 6), ({"train/a": 3}, 3), ({"train/a": 3, "val/a": 2}, 2)],
)
def test_images_of_an_ood_set(counts, count, tmp_path):
    assert len(data.load(f"folder:{write(tmp_path / 'set', counts)}", "ood")) == count


def test_hidden_files_and_nested_folders(tmp_path):
    nested = {"a": 3, "10": 1, "9": 1, "b/left": 2, "b/right/far": 2}
    write(tmp_path, {**nested, "b/.thumbnails": 1, ".hidden": 2, "__MACOSX": 1})
    for name in ("a/.DS_Store", "a/._0.png", "a/notes.txt", "b/left/._0.png"):
        (tmp_path / name).write_bytes(b"no image")
    found = data.load(f"folder:{tmp_path}", "ood", shape=(1, 4, 4))
    assert found.classes == ("9", "10", "a", "b")  # numbers by value
    assert sorted(values(found)) == list(range(9))
    assert found.y.tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 3]


def test_a_class_without_images(tmp_path):
    write(tmp_path, {"a": 3, "b": 0})
    with pytest.raises(ValueError, match=r"Expected images in .*/b, one folder per class, but"):
        data.load(f"folder:{tmp_path}", "train")


def test_images_on_disk_to_the_last_bit(tmp_path, monkeypatch):
    path = f"folder:{write_images(tmp_path, {'bright': 80, 'dark': 80}, (12, 9), 'jpg')}"
    memory = data.load(path, "ood", shape=(3, 10, 10))
    monkeypatch.setattr(data, "BUDGET", 160 * 300 - 1)
    disk = data.load(path, "ood", shape=(3, 10, 10))
    assert (type(memory), type(disk)) == (ImageSet, ImageFiles)
    assert (disk.shape, len(disk), disk.classes) == (memory.shape, len(memory), memory.classes)
    assert torch.equal(disk[3][0], memory[3][0])
    assert torch.equal(disk.first(70).loaded().x, memory.first(70).x)
    drawn = []
    for some in (memory, disk, disk):
        torch.manual_seed(1)
        found = ImageBatches(some, 48, shuffle=True, shift=2)
        drawn.append([*itertools.chain(*found), torch.rand(3)])
    assert [len(batch) for batch in drawn[0][:-1:2]] == [48, 48, 48, 16]
    for other in drawn[1:]:
        assert all(torch.equal(a, b) for a, b in zip(drawn[0], other, strict=True))
    (tmp_path / "dark" / "7.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^Expected an image file at .*dark/7\.jpg, but got: "):
        list(ImageBatches(disk))


GROWTH = """
import sys, torch
from tie_ext.cli import data
from tie_ext.cli.batches import training_batches
from tie_ext.utils.provenance import peak_memory

images = data.load(f"folder:{sys.argv[1]}", "ood", shape=(3, 224, 224))
peaks = []
for some in (images.first(300), images):
    seen = sum(float(x[0, 0, 0, 0]) >= 0 for x, _ in training_batches(some, 64))
    peaks.append(peak_memory())
print(peaks[1] - peaks[0])
"""
"""Memory that ten times as many images take."""


@pytest.mark.slow
def test_memory_does_not_grow_with_a_folder_that_is_larger_than_the_budget(tmp_path):
    write_images(tmp_path, {"a": 1}, (32, 32), "jpg")
    for i in range(1, 3000):
        os.link(tmp_path / "a" / "0.jpg", tmp_path / "a" / f"{i}.jpg")
    program = [sys.executable, "-c", GROWTH, str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150  # where all of them are 450 MB


def test_a_transform_of_arrays_and_of_files(tmp_path):
    path = write_images(tmp_path, {"a": 4}, (40, 30))
    files = [path / "a" / f"{i}.png" for i in range(4)]
    x = torch.stack([Transform.squash((3, 40, 30)).read(file) for file in files])
    for shape in ((3, 28, 28), (1, 20, 20)):
        how = Transform.squash(shape)
        read = torch.stack([how.read(file) for file in files])
        assert torch.equal(data.transformed(x, how), read)
