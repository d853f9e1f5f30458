"""What a loader may give a detector: each kind of batch gives what plain batches give, the rest is
refused by name.
"""

import numpy as np
import pytest
import pytorch_ood.detector as theirs
import torch
from conftest import SHAPE
from torch.utils.data import TensorDataset

from hosts.pytorch_ood.conftest import N, images, loader, rejection, trained
from tie_ext import Combined, TIEDetector, combine
from tie_ext.pytorch_ood import MahalanobisPlusPlus, SampledKNN

X, Y = images(60, seed=4)
PARTS = list(zip(X.split(20), Y.split(20), strict=True))


def with_ood() -> list:
    """The same ID images, with others that are labelled -1 among them."""
    other = torch.rand(7, *SHAPE)
    mixed = [(torch.cat([other, x]), torch.cat([torch.full((7,), -1), y])) for x, y in PARTS]
    return [(other, torch.full((7,), -1)), *mixed]


LABELLED = {
    "triples": [(x, y, torch.arange(len(x))) for x, y in PARTS],
    "dicts": [{"pixel_values": x, "label": y, "path": ["a"] * len(x)} for x, y in PARTS],
    "numpy": [(x.numpy(), y.numpy().astype(np.uint16)) for x, y in PARTS],
    "one-hot": [(x, torch.eye(N)[y]) for x, y in PARTS],
    "OOD among them": with_ood(),
}
UNLABELLED = {
    "images alone": [x for x, _ in PARTS],
    "dicts of images": [{"data": x} for x, _ in PARTS],
}
net = trained().eval()


def combined(data) -> torch.Tensor:
    detector = combine(net, train_loader=list(data), calibration_loader=data, false_alarm=0.2)
    gaussians = next(m for m in detector.detectors if isinstance(m, MahalanobisPlusPlus))
    return torch.stack([detector.threshold, *detector.predict(X), *gaussians.mu.flatten()])


FITS = {
    "combine": combined,
    "Combined": lambda data: (
        Combined([TIEDetector(net), theirs.GEN(net)], 0.2).fit(data).threshold
    ),
    "TIEDetector": lambda data: TIEDetector(net, 0.2).fit(data).threshold,
    "tau": lambda data: TIEDetector(net).fit(data).tau,
    "SampledKNN": lambda data: SampledKNN(net.features, k=3).fit(data).sample,
}


@pytest.mark.filterwarnings("ignore:.*held-out images are training images")
@pytest.mark.parametrize("kind", [*LABELLED, *UNLABELLED])
@pytest.mark.parametrize("name", list(FITS))
def test_every_kind_of_batch_fits_alike(name, kind):
    torch.manual_seed(3)
    # Without labels combine has one Gaussian.
    like = UNLABELLED["images alone"] if name == "combine" and kind in UNLABELLED else PARTS
    torch.testing.assert_close(FITS[name]((LABELLED | UNLABELLED)[kind]), FITS[name](like))


@pytest.mark.parametrize("kind", list(LABELLED))
def test_labelled_batches_of_every_kind(kind):
    gaussians = [MahalanobisPlusPlus(net.features).fit(of).mu for of in (LABELLED[kind], PARTS)]
    torch.testing.assert_close(*gaussians)
    assert rejection(net).fit(LABELLED[kind])(X).isfinite().all()


REFUSED = {
    "a dataset": (lambda: TensorDataset(X, Y), "DataLoader"),
    "one image": (lambda: [(X[0], Y[0])], r"Expected batches \(B, C, H, W\)"),
    "the range": (lambda: [(X * 255, Y)], "value range"),
    "the shape": (lambda: [(torch.rand(4, 3, 28, 28), Y[:4])], r"\(B, 1, 28, 28\)"),
    "a label": (lambda: [(X, Y + N)], r"labels in \[0, 3\)"),
    "OOD alone": (lambda: [(X, Y - N)], r"Expected ID images in \w+, but got 60 with labels < 0"),
    "nothing": (lambda: [], r"Expected ID images in \w+, but got an empty loader"),
    "no number": (lambda: [(X * float("nan"), Y)], "Expected finite images"),
}


@pytest.mark.parametrize("kind", list(REFUSED))
@pytest.mark.parametrize("name", list(FITS))
def test_errors_of_batches_without_id_images(name, kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        FITS[name](make())


@pytest.mark.parametrize("which", ["train_loader", "calibration_loader"])
@pytest.mark.parametrize("kind", list(REFUSED))
def test_errors_of_either_loader_of_combine(which, kind):
    loaders = {"train_loader": loader(60), "calibration_loader": loader(60, 8)}
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        combine(net, **{**loaders, which: make()})


def test_errors_where_labels_are_needed():
    for detector in (MahalanobisPlusPlus(net.features), rejection(net)):
        with pytest.raises(ValueError, match="Expected labels beside the images of data_loader"):
            detector.fit(UNLABELLED["images alone"])
