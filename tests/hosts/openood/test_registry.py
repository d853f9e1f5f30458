"""Registration: every place that holds a name, before and after, and in other processes."""

import pytest
import torch
from torch import nn

from hosts.openood.conftest import config, postprocessor, run_openood

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_place_that_holds_a_name(openood):
    import openood.evaluation_api as api
    import openood.evaluation_api.evaluator as evaluator
    import openood.networks as networks
    import openood.pipelines.test_ood_pipeline as testing
    import openood.pipelines.train_pipeline as training
    import openood.postprocessors as postprocessors
    import openood.trainers as trainers

    trainer, network = training.get_trainer, training.get_network
    assert trainer is trainers.get_trainer is trainers.utils.get_trainer
    assert network is networks.get_network is networks.utils.get_network
    assert testing.get_postprocessor is postprocessors.utils.get_postprocessor
    assert evaluator.get_postprocessor is api.postprocessor.get_postprocessor
    for function in (trainer, network, postprocessors.get_postprocessor):
        assert function.__wrapped__.__module__ == function.__module__
    ours = {"tie", "tie_ue", "tie_combined", "attach", "dmr"}
    assert ours <= set(api.postprocessor.postprocessors)


def test_registration_is_once_and_undone(openood):
    import openood.evaluation_api.postprocessor as api
    import openood.networks as networks
    import openood.postprocessors.info as info
    import openood.trainers as trainers
    from openood.networks.resnet50 import ResNet50

    once = trainers.get_trainer
    openood.register()
    assert trainers.get_trainer is once
    assert networks.ResNet50 is not ResNet50
    for _ in range(2):
        openood.unregister()
    assert not openood.registered()
    assert not hasattr(trainers.get_trainer, "__wrapped__")
    assert "tie" not in api.postprocessors
    assert set(info.num_classes_dict) == {"cifar10", "cifar100", "imagenet200", "imagenet"}
    assert networks.ResNet50 is ResNet50


def test_built_ins_stay_what_they_were(openood):
    from openood.networks import get_network
    from openood.networks.lenet import LeNet
    from openood.postprocessors import BasePostprocessor

    named = {"num_classes": 10, "num_gpus": 1}
    assert type(get_network(config({"name": "lenet", **named}))) is LeNet
    assert type(postprocessor("msp")) is BasePostprocessor
    with pytest.raises(KeyError):
        postprocessor("no_such_method")
    with pytest.raises(Exception, match="Unexpected Network"):
        get_network(config({"name": "no_such_net", **named}))


def test_the_users_own_config_of_a_postprocessor(openood, tmp_path):
    from openood.evaluation_api.postprocessor import get_postprocessor

    assert get_postprocessor(str(tmp_path), "tie", "cifar10").t == 1.0
    assert not list(tmp_path.iterdir())  # nothing was downloaded
    (tmp_path / "postprocessors").mkdir()
    text = "postprocessor:\n  name: tie\n  APS_mode: False\n  postprocessor_args:\n    t: 0.5\n"
    (tmp_path / "postprocessors" / "tie.yml").write_text(text)
    post = get_postprocessor(str(tmp_path), "tie", "cifar10")
    assert (post.t, post.config.dataset.name) == (0.5, "cifar10")


IMPORTS = [
    "import tie_ext.openood",
    "from openood.evaluation_api.postprocessor import get_postprocessor",
]
BEFORE = """
import urllib.request
urllib.request.urlretrieve = None
for name in ('tie', 'tie_ue', 'tie_combined', 'attach', 'dmr'):
    assert get_postprocessor("nowhere", name, "cifar10").name == name, name
tie_ext.openood.unregister()
try:
    get_postprocessor("nowhere", "tie", "cifar10")
except TypeError:
    print("known")
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1])
def test_names_are_known_by_import_alone(openood_root, tmp_path, order):
    code = "\n".join([*IMPORTS[::order], BEFORE])
    assert run_openood(openood_root, tmp_path, "-c", code).endswith("known\n")


PROBE = """
import os, sys
from openood.utils import launch

def main(word):
    from openood.pipelines.train_pipeline import get_trainer
    with open(f"{word}{os.getpid()}", "w") as f:
        f.write(str(hasattr(get_trainer, "__wrapped__")))

def worker(local_rank, main_func, world_size, num_gpus, machine_rank, dist_url, args, timeout):
    main_func(*args)

if __name__ == "__main__":
    # The real one asks for two GPUs.
    sys.modules["openood.utils.launch"]._distributed_worker = worker
    launch(main, 2, dist_url="auto", args=("process",))
"""


@pytest.mark.slow
def test_processes_of_its_launcher_know_tie(openood_root, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    run_openood(openood_root, tmp_path, "-m", "tie_ext.openood", "probe.py")
    assert [path.read_text() for path in tmp_path.glob("process*")] == ["True", "True"]


def test_best_checkpoint_is_the_last_epoch(openood, tmp_path):
    from openood.recorders import get_recorder

    about = {"trainer": {"name": "tie"}, "optimizer": {"num_epochs": 3}}
    about |= {"recorder": {"name": "base", "save_all_models": False}, "output_dir": str(tmp_path)}
    recorder = get_recorder(config(about))
    for epoch, accuracy in ((1, 0.9), (2, 0.5), (3, 0.7)):
        net = nn.Linear(1, 1)
        net.weight.data.fill_(epoch)
        recorder.save_model(net, {"acc": accuracy, "epoch_idx": epoch})
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["weight"].item() == 3
    names = sorted(path.name for path in tmp_path.iterdir())
    newest = [f"{which}_epoch3_acc0.7000.ckpt" for which in ("best", "last")]
    assert names == ["best.ckpt", *newest]
    assert (recorder.best_epoch_idx, recorder.best_acc) == (3, 0.7)
