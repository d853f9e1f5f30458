"""Views share the weights of a module, and neither its modes nor its hooks."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import Small
from torch import nn

from tie_ext.utils.views import add_hook, eval_view, frozen_view, hook_view

IMAGE = torch.zeros(1, 1, 28, 28)


class Odd(nn.Module):
    """What trees of modules do besides registering their parts."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first  # tied
        self.hidden = [nn.Dropout(0.5)]  # in containers, where PyTorch does not see them
        self.nested = {"a": [nn.Dropout(0.5)], "b": 1}
        self.late = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.run = self.body  # a method put on the instance
        self.steps = [partial(self.body), self.body]
        self.compiled = torch.compile(self.body, backend="eager")

    def body(self, x):
        dropped = self.nested["a"][0](self.hidden[0](self.again(self.first(x))))
        return dropped if not self.training else x * 0

    def forward(self, x):
        return self.late(self.run(x)) + self.steps[0](x) + self.steps[1](x) + self.compiled(x)


def old_norms() -> nn.Module:
    weight = nn.utils.weight_norm(nn.Linear(4, 4))
    return nn.Sequential(weight, nn.utils.spectral_norm(nn.Linear(4, 4)))


MODULES = {
    "small": Small,
    "norms": old_norms,
    "graph": lambda: torch.fx.symbolic_trace(Small()),
    "compiled": lambda: torch.compile(Small()),
}


@pytest.mark.filterwarnings("ignore")  # old norms are deprecated, and still in use
@pytest.mark.parametrize("name", MODULES)
def test_values_are_those_of_evaluation_mode(name):
    net = MODULES[name]().train()
    x = torch.randn(3, 4) if name == "norms" else torch.randn(3, 1, 28, 28)
    before, view = [v.clone() for v in net.state_dict().values()], eval_view(net)
    got = view(x)
    assert all(part.training for part in net.modules())
    assert not any(part.training for part in view.modules())
    assert all(map(torch.equal, net.state_dict().values(), before))
    assert torch.equal(got, getattr(net.eval(), "_orig_mod", net)(x))
    if name in ("small", "compiled"):
        assert type(view) is Small
        assert view.fc.weight.data_ptr() == net.fc.weight.data_ptr()


def test_tied_hidden_and_parametrised_parts():
    x, net = torch.randn(3, 4), Odd().train()
    y = net.first(net.first(x))
    assert torch.equal(eval_view(net)(x), net.late(y) + y + y + y)
    assert net.hidden[0].training
    assert len(list(eval_view(net).parameters())) == len(list(net.parameters()))


class Recurrent(nn.Module):
    """Recurrent and tied parts, and a weight in a list."""

    def __init__(self):
        super().__init__()
        self.rnn, self.first, self.last = nn.GRU(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.others = [self.first.weight]

    def forward(self, x):
        return self.last(self.first(self.rnn(x)[0])) @ self.others[0]


def test_gradients_through_a_frozen_view():
    net, x = Recurrent(), torch.randn(2, 3, 4, requires_grad=True)
    view = frozen_view(net)
    view(x).sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert view.last.weight is view.first.weight
    assert torch.equal(view(x), net(x))
    eval_view(net)(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_hooks_of_views_beside_those_of_the_module():
    seen, net = [], Small().train()
    net.conv[1].eval()
    net.fc.register_forward_hook(lambda *_: seen.append("module's"))
    view = hook_view(net)
    view.fc.register_forward_hook(lambda *_: seen.append("view's"))
    for word in ("first", "second"):
        add_hook(view, "fc", lambda *_, word=word: seen.append(word))
    view(IMAGE.expand(2, -1, -1, -1))
    assert seen == ["module's", "view's", "first", "second"]
    net(IMAGE.expand(2, -1, -1, -1))
    assert seen[4:] == ["module's"]
    assert [p.training for p in view.modules()] == [p.training for p in net.modules()]


class Counting(Small):
    """A hook that is its method, and a buffer that it assigns."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.fc.register_forward_hook(self.count)

    def count(self, module, args, output):
        self.calls = getattr(self, "calls", 0) + 1

    def forward(self, x):
        self.steps = self.steps + 1
        return super().forward(x)


def test_methods_as_hooks_and_assigned_buffers():
    net = Counting()
    view = eval_view(net)
    view(IMAGE)
    assert (view.calls, hasattr(net, "calls"), float(net.steps)) == (1, False, 0)
    hook_view(net)(IMAGE.expand(2, -1, -1, -1))  # in training mode, as the module itself would
    assert float(net.steps) == 1


@pytest.mark.filterwarnings("ignore")
def test_script_modules_of_one_mode():
    net = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))))
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"call \.eval\(\) and \.requires_grad_\(False\) on it"):
        eval_view(net)
    assert torch.equal(eval_view(net.eval())(x), net(x))
    with pytest.raises(ValueError, match=r"has one mode for all"):
        frozen_view(net)
    assert torch.equal(frozen_view(net.requires_grad_(False))(x), net(x))
    optimized = torch.jit.freeze(torch.jit.script(Small().eval()))  # which has no mode left
    assert eval_view(optimized) is optimized


FEW = {"num_classes": 5}
MODELS = {
    "resnet18": FEW,
    "efficientnet_b0": FEW,
    "convnext_tiny": FEW,
    "googlenet": {"init_weights": False, **FEW},
    "inception_v3": {"init_weights": False, **FEW},
    "VisionTransformer": dict(
        image_size=96,
        patch_size=16,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        dropout=0.1,
        **FEW,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "compiled"])
def test_torchvision_models_in_many_threads(name):
    models = pytest.importorskip("torchvision").models
    if name == "compiled":
        net = torch.compile(models.resnet18(**FEW), backend="eager").train()
    else:
        net = getattr(models, name)(**MODELS[name]).train()
    before = [value.clone() for value in net.state_dict().values()]
    batches = [torch.rand(count, 3, 96, 96) for count in (1, 3, 2, 1, 4, 2, 1, 3)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(torch.no_grad()(lambda x: eval_view(net)(x)), batches))
    assert all(part.training for part in net.modules())
    assert all(map(torch.equal, before, net.state_dict().values()))
    net = getattr(net.eval(), "_orig_mod", net)
    with torch.no_grad():
        assert all(map(torch.equal, found, map(net, batches)))


@pytest.mark.parametrize("make", [eval_view, frozen_view])
def test_hooks_of_views_in_many_threads(make):
    net, x = Small().train(), torch.randn(40, 1, 28, 28)
    want = [make(net)(part).detach() for part in x[:, None]]

    def call(part):
        view, found = make(net), []
        view.fc.register_forward_hook(lambda module, args, output: found.append(output))
        view(part)
        return found

    with ThreadPoolExecutor(8) as pool:
        for found, expected in zip(pool.map(call, x[:, None]), want, strict=True):
            assert len(found) == 1
            assert torch.equal(found[0], expected)
