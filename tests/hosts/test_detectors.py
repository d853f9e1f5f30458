"""i-ODIN, DMR's rejection network, Mahalanobis++ and combinations: pytorch-ood's contract, and
OpenOOD's i-ODIN on the same images.
"""

import pytest
import torch
from conftest import make_net
from test_pytorch_ood import images, loader

pytest.importorskip("pytorch_ood")
from pytorch_ood.api import (
    Detector,
    DetectorInfo,
    FeaturesDetector,
    ModelNotSetException,
    RequiresFittingException,
)
from pytorch_ood.detector import ODIN

from tie_ext.outliers.marginal import MarginalRepresentations, MarginalSettings
from tie_ext.pytorch_ood import (
    IODIN,
    BoundaryDistance,
    Combined,
    MahalanobisPlusPlus,
    RejectionNetwork,
    SampledKNN,
    TIEDetector,
)


def rejection(net):
    return RejectionNetwork(
        net.features, MarginalRepresentations(net, MarginalSettings(k=2, vae_epochs=1)), epochs=2
    )


def combined(net):
    return Combined(
        [TIEDetector(net), MahalanobisPlusPlus(net.features).fit(loader()), IODIN(net)],
        false_alarm=0.2,
    )


MAKERS = {
    "IODIN": IODIN,
    "RejectionNetwork": rejection,
    "MahalanobisPlusPlus": lambda net: MahalanobisPlusPlus(net.features),
    "SampledKNN": lambda net: SampledKNN(net.features, k=3),
    "BoundaryDistance": lambda net: BoundaryDistance(net.features, net.fc.weight, net.fc.bias),
    "Combined": combined,
}


@pytest.fixture(params=list(MAKERS))
def detector(request) -> Detector:
    return MAKERS[request.param](make_net().eval()).fit(loader())


def test_scores_are_finite_one_an_image_and_do_not_depend_on_the_batch(detector):
    x = images()[0]
    scores = detector(x)
    assert scores.shape == (24,)
    assert scores.isfinite().all()
    last = (
        1e-3 if isinstance(detector, Combined) else 1e-5
    )  # an untrained network's logits differ little: a deviation is few of their digits
    torch.testing.assert_close(
        torch.cat([detector(one[None]) for one in x]), scores, rtol=1e-4, atol=last
    )


def test_the_classifier_is_left_as_it_was(detector):
    net = (
        detector.encoder.__self__
        if isinstance(detector, FeaturesDetector)
        else getattr(detector, "network", None) or detector.model
    )
    before = {k: v.clone() for k, v in net.state_dict().items()}
    detector(images()[0])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_it_says_what_it_is_and_can_be_set_by_name(detector):
    assert isinstance(vars(type(detector))["info"], DetectorInfo)
    assert set(detector.get_hyperparameters()) == set(type(detector).hyperparameter_space)
    with pytest.raises(ValueError, match="nonsense"):
        detector.set_hyperparameters(nonsense=1)


def test_without_a_model_or_before_fit_it_says_so():
    for make in (
        IODIN,
        RejectionNetwork,
        MahalanobisPlusPlus,
        SampledKNN,
        lambda _: Combined([TIEDetector(None)]),
    ):
        with pytest.raises(ModelNotSetException):
            make(None).predict(images()[0])
    for make in list(MAKERS.values())[1:]:
        with pytest.raises(RequiresFittingException):
            make(make_net().eval()).predict(images()[0])
    with pytest.raises(ValueError, match="Expected ID images in data_loader"):
        rejection(make_net().eval()).fit([(images()[0], torch.full((24,), -1))])
    with pytest.raises(ValueError, match="outliers"):
        RejectionNetwork(None).fit_features(torch.zeros(3, 2), torch.zeros(3))


def test_iodin_on_all_values_is_their_odin():
    net, x = make_net().eval(), images()[0]
    torch.testing.assert_close(IODIN(net, values=28 * 28)(x), ODIN(net)(x))
    assert not torch.equal(IODIN(net, eps=0.1)(x), ODIN(net, eps=0.1)(x))


def test_iodin_is_openoods_on_the_same_images(openood_root):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from openood.networks.lenet import LeNet
        from openood.postprocessors import IODINPostprocessor
        from openood.utils.config import Config
    torch.manual_seed(0)
    net, x = LeNet(10).eval(), torch.rand(5, 3, 28, 28)
    settings = {
        "postprocessor_args": {"temperature": 10, "noise": 0.05},
        "postprocessor_sweep": {},
    }
    theirs = IODINPostprocessor(
        Config(
            {
                "postprocessor": settings,
                "dataset": {"name": "cifar10", "normalization_type": "cifar10"},
            }
        )
    )
    _, conf = theirs.postprocess(net, x.clone())
    torch.testing.assert_close(
        IODIN(net, eps=0.05, temperature=10, norm_std=list(theirs.input_std))(x), -conf
    )


def test_the_rejection_network_learns_what_separates_the_features():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(300, 4), torch.randn(300, 4) + 3])
    detector = RejectionNetwork(None).fit_features(
        x, torch.cat([torch.zeros(300), -torch.ones(300)])
    )
    scores = detector.predict_features(x)
    assert (scores[300:] > 0).float().mean() > 0.95
    assert (scores[:300] < 0).float().mean() > 0.95
