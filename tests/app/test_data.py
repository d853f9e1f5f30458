"""Image sets: parts of them, what training sees of them, noise."""

import pytest
import torch
import torch.nn.functional as F

from tie_ext.app import data
from tie_ext.app.data import ImageBatches, ImageSet, training_batches


def images(count: int = 20, size: int = 28) -> ImageSet:
    x = torch.randint(1, 256, (count, 3, size, size), dtype=torch.uint8)
    return ImageSet(x, torch.arange(count) % 10, tuple("abcdefghij"))


def test_shifted_images_are_crops_of_the_padded_ones():
    some = images(6, 8)
    padded = F.pad(some.x, (2, 2, 2, 2)).float() / 255
    ((x, y),) = ImageBatches(some, 6, shift=2)
    assert torch.equal(y, some.y)
    for i in range(6):
        crops = [padded[i, :, top : top + 8, left : left + 8] for top in range(5) for left in range(5)]
        assert sum(torch.equal(x[i], crop) for crop in crops) == 1


def test_every_shift_occurs_in_both_directions():
    some = ImageSet(torch.zeros(500, 1, 9, 9, dtype=torch.uint8), torch.zeros(500, dtype=torch.long), ("a",))
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


def test_some_classes_of_a_named_set(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for label in range(4):
        (tmp_path / "mnist" / "train" / str(label)).mkdir(parents=True)
        Image.new("L", (28, 28), 10 * label).save(tmp_path / "mnist" / "train" / str(label) / "0.png")
    part = data.load("mnist:1-2", "train", tmp_path)
    assert part.shape == (1, 28, 28)
    assert part.classes == ("1", "2")
    assert part.y.tolist() == [0, 1]
    assert part.x[:, 0, 0, 0].tolist() == [10, 20]


def test_a_set_that_is_known_and_not_there_is_told_from_one_that_is_not_known(tmp_path):
    with pytest.raises(ValueError, match=r"Expected train images of tinyimagenet, which torchvision does not have, in a folder, one of .*/tin/train"):
        data.load("tinyimagenet", "train", tmp_path)
    with pytest.raises(ValueError, match=r"Expected a data set, one of mnist.*, but got 'imagenette' and no folder"):
        data.load("imagenette", "train", tmp_path)


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "sphere"])
def test_noise_is_the_same_for_the_same_seed(kind):
    x = data.noise(kind, 5, (3, 28, 28)).x
    assert torch.equal(x, data.noise(kind, 5, (3, 28, 28)).x)
    assert not torch.equal(x, data.noise(kind, 5, (3, 28, 28), seed=1).x)
    assert x.float().std() > 0


def test_unknown_noise_is_refused():
    with pytest.raises(ValueError, match="Expected kind to be 'gaussian', 'uniform' or 'sphere', but got 'pink'"):
        data.noise("pink", 1, (1, 28, 28))
