"""Views share the weights of a module, and neither its modes nor its hooks."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import Small
from torch import nn

from tie_ext.utils.views import add_hook, eval_view, frozen_view, hook_view


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


def test_a_view_computes_what_the_module_does_in_evaluation_mode():
    x, net = torch.randn(5, 1, 28, 28), Small().train()
    view = eval_view(net)
    got = view(x)
    assert net.training
    assert all(part.training for part in net.modules())
    assert not any(part.training for part in view.modules())
    assert torch.equal(got, net.eval()(x))


def test_a_view_follows_tied_hidden_and_parametrised_parts():
    x, net = torch.randn(3, 4), Odd().train()
    net.hidden[0].train()
    y = net.first(net.first(x))
    assert torch.equal(eval_view(net)(x), net.late(y) + y + y + y)
    assert net.hidden[0].training
    assert len(list(eval_view(net).parameters())) == len(list(net.parameters()))


def test_what_is_learned_later_shows_in_a_view():
    net = Small().eval()
    view = eval_view(net)
    with torch.no_grad():
        net.fc.weight.mul_(2)
    assert view.fc.weight.data_ptr() == net.fc.weight.data_ptr()


def test_gradients_pass_through_a_frozen_view_and_reach_no_weight():
    x, net = torch.randn(2, 1, 28, 28, requires_grad=True), Small().train()
    frozen_view(net)(x).sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    eval_view(net)(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_hooks_of_a_view_are_its_own_and_those_of_the_module_run():
    seen, net = [], Small().eval()
    net.fc.register_forward_hook(lambda *_: seen.append("module's"))
    view = hook_view(net)
    view.fc.register_forward_hook(lambda *_: seen.append("view's"))
    view(torch.zeros(1, 1, 28, 28))
    assert seen == ["module's", "view's"]
    net(torch.zeros(1, 1, 28, 28))
    assert seen == ["module's", "view's", "module's"]


def test_a_view_keeps_the_modes_where_hooks_alone_are_wanted():
    net = Small().train()
    net.conv[1].eval()
    modes = [part.training for part in net.modules()]
    assert [part.training for part in hook_view(net).modules()] == modes


def test_the_view_of_a_compiled_module_is_that_of_what_was_compiled():
    net = Small().train()
    view = eval_view(torch.compile(net))
    assert type(view) is Small
    assert not view.training


def test_a_hook_that_is_a_method_of_a_part_sees_the_view():
    class Counting(Small):
        def count(self, module, args, output):
            self.calls = getattr(self, "calls", 0) + 1

    net = Counting().eval()
    net.fc.register_forward_hook(net.count)
    view = hook_view(net)
    view(torch.zeros(1, 1, 28, 28))
    assert (view.calls, hasattr(net, "calls")) == (1, False)


def test_a_hook_by_name_stands_beside_those_of_the_module():
    seen, net = [], Small().eval()
    net.fc.register_forward_hook(lambda *_: seen.append("module's"))
    view = hook_view(net)
    for word in ("first", "second"):
        add_hook(view, "fc", lambda *_, word=word: seen.append(word))
    view(torch.zeros(1, 1, 28, 28))
    assert seen == ["module's", "first", "second"]


def test_buffers_that_a_view_assigns_stay_its_own_in_evaluation_mode():
    class Assigning(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.steps = self.steps + 1
            return x

    net = Assigning()
    eval_view(net)(torch.zeros(1))
    assert float(net.steps) == 0
    hook_view(net)(torch.zeros(1))  # in training mode, as the module itself would
    assert float(net.steps) == 1


def test_gradients_reach_no_weight_of_recurrent_and_tied_parts():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.first, self.last = nn.GRU(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.last.weight = self.first.weight
            self.others = [self.first.weight]

        def forward(self, x):
            return self.last(self.first(self.rnn(x)[0])) @ self.others[0]

    net, x = Recurrent(), torch.randn(2, 3, 4, requires_grad=True)
    view = frozen_view(net)
    view(x).sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert all(p.grad is None for p in net.parameters())
    assert view.last.weight is view.first.weight
    assert torch.equal(view(x), net(x))


@pytest.mark.filterwarnings("ignore")  # both are deprecated, and still in use
def test_spectral_and_weight_norm_of_old_are_viewed():
    weight = nn.utils.weight_norm(nn.Linear(4, 4))
    net = nn.Sequential(weight, nn.utils.spectral_norm(nn.Linear(4, 4))).train()
    u, x = net[1].weight_u.clone(), torch.randn(3, 4)
    got = eval_view(net)(x)
    assert torch.equal(net[1].weight_u, u)
    assert torch.equal(got, net.eval()(x))


def test_a_graph_module_is_viewed():
    net, x = torch.fx.symbolic_trace(Small()).train(), torch.randn(3, 1, 28, 28)
    got = eval_view(net)(x)
    assert net.training
    assert torch.equal(got, net.eval()(x))


@pytest.mark.filterwarnings("ignore")
def test_a_script_module_is_shared_in_evaluation_mode_and_refused_in_another():
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


def torchvision_models():
    """One of each kind, small; images ``(B, 3, 96, 96)``."""
    models = pytest.importorskip("torchvision").models
    few = {"num_classes": 5}
    return {
        "resnet18": lambda: models.resnet18(**few),
        "efficientnet_b0": lambda: models.efficientnet_b0(**few),
        "swin": lambda: models.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [7, 7], **few),
        "vit": lambda: models.VisionTransformer(96, 16, 2, 2, 32, 64, dropout=0.1, **few),
        "convnext_tiny": lambda: models.convnext_tiny(**few),
        "googlenet": lambda: models.googlenet(init_weights=False, **few),
        "inception_v3": lambda: models.inception_v3(init_weights=False, **few),
        "compiled": lambda: torch.compile(models.resnet18(**few), backend="eager"),
    }


NAMES = [
    "resnet18",
    "efficientnet_b0",
    "swin",
    "vit",
    "convnext_tiny",
    "googlenet",
    "inception_v3",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "compiled"])
def test_views_of_torchvision_models_in_many_threads(name):
    net = torchvision_models()[name]().train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    batches = [torch.rand(count, 3, 96, 96) for count in (1, 3, 2, 1, 4, 2, 1, 3)]

    def call(x):
        with torch.no_grad():
            return eval_view(net)(x)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, batches))
    assert all(part.training for part in net.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    net.eval()
    with torch.no_grad():
        for x, y in zip(batches, found, strict=True):
            assert torch.equal(y, getattr(net, "_orig_mod", net)(x))


@pytest.mark.parametrize("make", [eval_view, frozen_view])
def test_views_of_many_threads_do_not_meet(make):
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
