"""Checkpoints as people have them: their weights are found, what they lack is named, nothing in
them is run.
"""

import argparse
import collections
import json
import pathlib

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import Small

from tie_ext.utils import weight_files
from tie_ext.utils.weight_files import read_checkpoint
from tie_ext.utils.weights import load_weights

STATE = Small().state_dict()


def under(prefix: str) -> dict:
    return {prefix + key: value for key, value in STATE.items()}


def lightning(state: dict, **more) -> dict:
    best = {"monitor": "val_acc", "best_model_score": torch.tensor(0.93)}
    callbacks = {"ModelCheckpoint{'monitor': 'val_acc'}": best}
    about = {"epoch": 3, "pytorch-lightning_version": "2.4.0", "hyper_parameters": {"lr": 0.1}}
    return {**about, "callbacks": callbacks, "state_dict": state, **more}


OPTIMISER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
CHECKPOINTS = {
    "alone": STATE,
    "Lightning's": lightning(under("model."), optimizer_states=[OPTIMISER]),
    "Lightning's with a loss": lightning(under("net.") | {"criterion.weight": torch.ones(10)}),
    "of a compiled network": under("_orig_mod."),
    "of a compiled part": {k.replace("conv.", "conv._orig_mod."): v for k, v in STATE.items()},
    "parallel, compiled, in a wrapper": {"model": under("module._orig_mod.backbone.model.")},
    "under any key": {"student_weights": {"weights": STATE}, "optimizer": OPTIMISER},
    "with a moving average": {"model": under("module."), "model_ema": under("module.")},
    "counted by thop": {**STATE, "total_ops": torch.zeros(1), "conv.0.total_ops": torch.zeros(1)},
    "with numpy's numbers": {"state_dict": STATE, "best_acc": np.float64(0.93)},
    "with arrays and a state of numpy's": {"model": STATE, "rng": np.random.get_state()},
    "with flags": {"state_dict": STATE, "args": argparse.Namespace(lr=0.1, out=pathlib.Path("x"))},
    "with a path of Windows": {"net": STATE, "out": pathlib.PureWindowsPath("C:/x")},
    "with a history": {"net": STATE, "log": collections.defaultdict(list, loss=[1.0])},
    "in half precision": {key: v.half() if v.ndim else v for key, v in STATE.items()},
}
LEFT = {
    "Lightning's with a loss": "criterion.weight",
    "counted by thop": "total_ops, conv.0.total_ops",
}


def saved(content, path):
    torch.save(content, path)
    return path


def check_loaded(path, atol: float = 0.0) -> None:
    torch.manual_seed(1)
    model = load_weights(Small(), path)
    assert not model.training
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, STATE[key], atol=atol, rtol=0)


needs_safe_torch = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < weight_files.SAFE_SINCE,
    reason="pickles are refused",
)


@needs_safe_torch
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_weights_are_found_in_every_checkpoint(kind, tmp_path):
    path = saved(CHECKPOINTS[kind], tmp_path / "last.ckpt")
    if kind not in LEFT:
        check_loaded(path, atol=1e-3 if kind == "in half precision" else 0.0)
        return
    with pytest.warns(UserWarning, match=f"has no such weights: {LEFT[kind]}$"):
        check_loaded(path)


@pytest.mark.parametrize("given", ["folder", "index", "one file"])
def test_weights_of_hugging_face_in_shards(given, tmp_path):
    names = list(STATE)
    shards = {"model-1.safetensors": names[:5], "model-2.safetensors": names[5:]}
    if given == "one file":
        shards = {"model.safetensors": names}
    for file, keys in shards.items():
        part = {f"timm_model.{key}": STATE[key].contiguous() for key in keys}
        safetensors.torch.save_file(part, tmp_path / file)
    index = {f"timm_model.{key}": file for file, keys in shards.items() for key in keys}
    if given != "one file":
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    check_loaded(tmp_path / "model.safetensors.index.json" if given == "index" else tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a.json", 3])
def test_errors_of_an_index_of_other_files(name, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"fc.weight": name}}))
    with pytest.raises(ValueError, match=r"^Expected (shards beside|a weight_map in) "):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({k: v for k, v in STATE.items() if k != "fc.bias"}, "but got others: none at fc.bias$"),
        (STATE | {"fc.bias": torch.ones(7)}, r"fc.bias of \(7,\) instead of \(3,\)$"),
        (STATE | {"conv.9.weight": torch.ones(7)}, "conv.9.weight, which it does not have$"),
        (STATE | {"fc.bias": torch.full((3,), torch.inf)}, "infinite ones in fc.bias$"),
    ],
)
def test_errors_of_weights_that_do_not_fit(state, message, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "w")
    with pytest.raises(ValueError, match=message):
        load_weights(Small(), tmp_path / "w")


def test_error_of_pickles_in_older_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=r"in torch 2\.5\.1.*CVE-2025-32434.*safetensors\.torch"):
        read_checkpoint(saved(STATE, tmp_path / "w.pt"))
    safetensors.torch.save_file(STATE, tmp_path / "w.safetensors")
    check_loaded(tmp_path / "w.safetensors")


class Config:
    """An object of the user's own code."""


@needs_safe_torch
def test_error_of_objects_of_other_code(tmp_path):
    path = saved({"state_dict": STATE, "config": Config()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"\(test_weights\.Config\), which was not run; save the"):
        read_checkpoint(path)


@needs_safe_torch
@pytest.mark.parametrize(
    ("content", "accuracy"),
    [
        (CHECKPOINTS["Lightning's"], 0.93),
        ({"best_acc1": torch.tensor(76.1), "acc5": 93.0, "train_acc": 0.1}, 0.761),
        ({"metrics": {"val/accuracy": np.float32(0.5)}}, 0.5),
        ({"accumulate": 0.3, "acc_history": [0.4], "top5_acc": 0.0}, None),
    ],
)
def test_accuracy_that_a_checkpoint_says(content, accuracy, tmp_path):
    found = read_checkpoint(saved({"net": STATE, **content}, tmp_path / "w.pt")).accuracy
    assert found == pytest.approx(accuracy)
