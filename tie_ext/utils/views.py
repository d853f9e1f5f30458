"""Views of a module: the same weights under modes and hooks of their own.

A hook or a mode that is set on a shared module changes what every other thread computes with it.
A view shares the tensors and nothing else, so that what one call does to it stays with that call.
"""

import copy
from types import MethodType
from typing import Any, TypeVar

from torch import nn

Holder = TypeVar("Holder")
Module = TypeVar("Module", bound=nn.Module)

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hook_view(module: Module) -> Module:
    """A view in the mode of the module; hooks that are registered on it are its own."""
    return _View(None, False).of(module)


def eval_view(module: Module) -> Module:
    """A view in evaluation mode; gradients reach the weights of the module."""
    return _View(False, False).of(module)


def frozen_view(module: Module) -> Module:
    """A view in evaluation mode; gradients flow through it to its input, and reach no weight."""
    return _View(False, True).of(module)


def holder_view(holder: Holder) -> Holder:
    """A shallow copy of an object, such as a detector, whose modules are views in evaluation mode.

    So are the modules in its lists and dicts, and those whose methods it holds. Attributes that
    share a module share its view. Gradients that its methods leave on weights stay with the view.
    """
    view, views = copy.copy(holder), _View(False, True, True)
    for name, value in vars(holder).items():
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            value = MethodType(value.__func__, views.clone(value.__self__))
        setattr(view, name, views.inner(value))
    views.bind()
    return view


class _View:
    """One view of a tree of modules, each of them once.

    Arguments:
        training: Mode of every part; None for the part's own.
        detached: Whether its parameters are copies that share the weights, and no gradients.
        grads: Whether such copies take gradients of their own, as the parameters do.
    """

    def __init__(self, training: bool | None, detached: bool, grads: bool = False):
        self.training, self.detached, self.grads = training, detached, grads
        self.views: dict[int, nn.Module] = {}

    def of(self, module: Module) -> Module:
        """The view of a module and of all below it."""
        view: Any = self.clone(module)
        self.bind()
        return view

    def bind(self) -> None:
        """Methods that were put on an instance would go on calling the module itself; the views
        have them of the views.
        """
        for part in self.views.values():
            for name, value in list(vars(part).items()):
                if isinstance(value, MethodType) and id(value.__self__) in self.views:
                    bound = MethodType(value.__func__, self.views[id(value.__self__)])
                    object.__setattr__(part, name, bound)

    def clone(self, module: nn.Module) -> nn.Module:
        """The view of a module and of all below it, before :meth:`bind`."""
        module = module._modules.get("_orig_mod") or module  # what torch.compile wraps
        if id(module) in self.views:
            return self.views[id(module)]
        # Not copy.copy, which asks parametrised modules for a state that they refuse to give.
        view = object.__new__(type(module))
        self.views[id(module)] = view
        own = {name: self.inner(value) for name, value in vars(module).items()}
        own |= {name: own[name].copy() for name in _HOOKS if name in own}
        own["_modules"] = {
            name: None if part is None else self.clone(part)
            for name, part in module._modules.items()
        }
        if self.detached:
            own["_parameters"] = {
                name: None
                if p is None
                else nn.Parameter(p.detach(), requires_grad=self.grads and p.requires_grad)
                for name, p in module._parameters.items()
            }
        if self.training is not None:
            own["training"] = self.training
        own["_compiled_call_impl"] = None
        view.__dict__.update(own)
        return view

    def inner(self, value: Any) -> Any:
        """A plain attribute; modules that it holds without registering them are viewed too."""
        if isinstance(value, nn.Module):
            return self.clone(value)
        if type(value) in (list, tuple) and any(isinstance(part, nn.Module) for part in value):
            return type(value)(map(self.inner, value))
        if type(value) is dict and any(isinstance(part, nn.Module) for part in value.values()):
            return {key: self.inner(part) for key, part in value.items()}
        return value
