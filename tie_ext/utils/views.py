"""Views of a module: the same weights under modes and hooks of their own.

A hook or a mode that is set on a shared module changes what every other thread computes with it.
A view shares the tensors and nothing else, so that what one call does to it stays with that call.
"""

import copy
from collections.abc import Callable
from functools import partial
from operator import is_
from types import FunctionType, MethodType
from typing import Any, TypeVar

import torch
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
_PLAIN = {bool, int, float, str, type(None), torch.Tensor}
_OWN = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)}
"""Attributes that every module has, and that lead to no other: hooks and buffers."""
_OWN -= {"_modules", "_parameters"}


def hook_view(module: Module) -> Module:
    """A view in the mode of the module; hooks that are registered on it are its own."""
    return _View(None, False).of(module)  # type: ignore[return-value]


def eval_view(module: Module) -> Module:
    """A view in evaluation mode; gradients reach the weights of the module."""
    return _View(False, False).of(module)  # type: ignore[return-value]


def frozen_view(module: Module) -> Module:
    """A view in evaluation mode; gradients flow through it to its input, and reach no weight."""
    return _View(False, True).of(module)  # type: ignore[return-value]


def holder_view(holder: Holder) -> Holder:
    """A shallow copy of an object, such as a detector, whose modules are views in evaluation mode.

    So are the modules in its lists and dicts, and those whose methods it holds. Attributes that
    share a module share its view. Gradients that its methods leave on weights stay with the view.
    """
    view, views = copy.copy(holder), _View(False, True, grads=True)
    vars(view).update({name: views.inner(value) for name, value in vars(holder).items()})
    views.bind_hooks()
    return view


def add_hook(view: nn.Module, name: str, hook: Callable[[nn.Module, tuple, Any], None]) -> None:
    """Register a forward hook on a part of a view, by the name of the part."""
    hooks = view.get_submodule(name)._forward_hooks
    # register_forward_hook counts its handles in a class attribute, which torch.compile and a
    # strict torch.export do not trace. Its keys are >= 0.
    hooks[-1 - len(hooks)] = hook


class _View:
    """One view of a tree of modules, each of them once.

    Arguments:
        training: Mode of every part; None for the part's own.
        detached: Whether its parameters are copies that share the weights, and no gradients.
        grads: Whether such copies take gradients of their own, as the parameters do.
    """

    def __init__(self, training: bool | None, detached: bool, grads: bool = False):
        self.training, self.detached, self.grads = training, detached, grads
        self.views: dict[int, Any] = {}  # of modules and parameters, by the id of the original

    def of(self, module: Module) -> Module:
        """The view of a module and of all below it.

        Raises:
            ValueError: If a part is a ScriptModule that is not in the mode of the view.
        """
        view: Any = self.clone(module)
        self.bind_hooks()
        return view

    def bind_hooks(self) -> None:
        """Hooks that are methods of a part become those of its view; others stay as they are."""
        for part in self.views.values():
            for name in _HOOKS if isinstance(part, nn.Module) else ():
                hooks = part.__dict__.get(name, {})
                for key, hook in hooks.items():
                    if isinstance(hook, MethodType) and id(hook.__self__) in self.views:
                        hooks[key] = self.inner(hook)

    def clone(self, module: nn.Module) -> nn.Module:
        """The view of a module and of all below it, before :meth:`bind_hooks`."""
        if isinstance(module, torch.jit.ScriptModule):
            return self._shared(module)
        module = module._modules.get("_orig_mod") or module  # what torch.compile wraps
        if id(module) in self.views:
            return self.views[id(module)]
        # Not copy.copy, which asks parametrised modules for a state that they refuse to give.
        view = object.__new__(type(module))
        self.views[id(module)] = view
        own = {
            name: value if name in _OWN else self.inner(value)
            for name, value in vars(module).items()
        }
        own |= {name: own[name].copy() for name in (*_HOOKS, "_modules") if name in own}
        if self.training is not None:
            # In training mode what a forward pass assigns to a buffer is for the module to keep.
            own |= {name: own[name].copy() for name in ("_parameters", "_buffers")}
            own["training"] = self.training
        own["_compiled_call_impl"] = None
        view.__dict__.update(own)
        return view

    def inner(self, value: Any) -> Any:
        """What a view has in the place of an attribute: itself, unless it leads to a module."""
        if type(value) in _PLAIN:
            return value
        if isinstance(value, nn.Module):
            return self.clone(value)
        if self.detached and isinstance(value, nn.Parameter):
            return self._detached(value)
        if type(value) in (list, tuple):
            return self._rebuilt(value, value, type(value))
        if isinstance(value, dict):
            return value and self._rebuilt(
                value, value.values(), lambda parts: _with_values(value, parts)
            )
        if isinstance(value, partial):
            parts = (value.func, value.args, value.keywords)
            return self._rebuilt(value, parts, lambda new: partial(new[0], *new[1], **new[2]))
        if isinstance(value, FunctionType):  # torch.compile(self.forward) holds the method here
            value = getattr(value, "_torchdynamo_orig_callable", value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            # A method that was put on an instance would go on calling the module itself.
            return MethodType(value.__func__, self.clone(value.__self__))
        return value

    def _rebuilt(self, value: Any, parts: Any, build: Callable[[list], Any]) -> Any:
        """A container with the views of its parts; itself where none of them changes."""
        parts = list(parts)
        views = [self.inner(part) for part in parts]
        same = all(map(is_, parts, views))
        return value if same else build(views)

    def _detached(self, parameter: nn.Parameter) -> nn.Parameter:
        """The copy of a parameter; one for each, as parts can share it."""
        if id(parameter) not in self.views:
            learns = self.grads and parameter.requires_grad
            self.views[id(parameter)] = nn.Parameter(parameter.detach(), learns)
        return self.views[id(parameter)]

    def _shared(self, module: nn.Module) -> nn.Module:
        """A ScriptModule as it is, since it lives outside Python and cannot be viewed."""
        constant = self.detached and not self.grads
        learns = constant and any(p.requires_grad for p in module.parameters())
        if learns or (self.training is False and getattr(module, "training", False)):
            raise ValueError(
                "A view would change the torch.jit.ScriptModule in the network, which has one "
                "mode for all; call .eval() and .requires_grad_(False) on it before"
            )
        return module


def _with_values(old: dict, values: list) -> dict:
    """A dict of the same kind and keys."""
    new = old.copy()
    new.update(zip(old, values, strict=True))
    return new
