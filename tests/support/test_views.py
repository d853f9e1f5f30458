"""Views share the weights of a module, and neither its modes nor its hooks."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import Small
from torch import nn

from tie_ext.utils.views import eval_view, frozen_view, hook_view


class Odd(nn.Module):
    """What trees of modules do besides registering their parts."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first  # tied
        self.hidden = [nn.Dropout(0.5)]  # in a list, where PyTorch does not see it
        self.late = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.run = self.body  # a method put on the instance

    def body(self, x):
        return self.hidden[0](self.again(self.first(x))) if not self.training else x * 0

    def forward(self, x):
        return self.late(self.run(x))


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
    want = net.late(net.first(net.first(x)))
    assert torch.equal(eval_view(net)(x), want)
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
