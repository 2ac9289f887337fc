"""Which layers of a model a block-sparse one can take the place of, and why others cannot.

What the patcher and the loader of checkpoints share. It knows no densities and no patterns.
"""

import sys
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from ._module import DTYPES

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def is_conv1d(module: nn.Module) -> bool:
    """True for the ``Conv1D`` of transformers, a linear layer that keeps its weight transposed."""
    # Looked up, not imported: if transformers is not loaded, no module of it exists.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and type(module) is transformers.Conv1D


def is_linear(module: nn.Module) -> bool:
    """True for ``nn.Linear`` and ``Conv1D``."""
    # Not their subclasses: those are made to be used in another way (the output projection of
    # nn.MultiheadAttention is never called, only its weight is read).
    if parametrize.is_parametrized(module):  # its class is one made for it
        return parametrize.type_before_parametrizations(module) is nn.Linear
    return type(module) is nn.Linear or is_conv1d(module)


def linear_layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The linear layers, each with all its names: a shared one has several."""
    layers: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and is_linear(module):
            layers.setdefault(module, []).append(name)
    return layers


def as_linear(layer: nn.Module) -> nn.Linear:
    """The layer as ``nn.Linear``; shares memory with it."""
    if isinstance(layer, nn.Linear):
        return layer
    weight = cast(nn.Parameter, layer.weight)
    in_features, out_features = weight.shape  # Conv1D keeps its weight transposed
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    linear.bias = cast(nn.Parameter, layer.bias)
    return linear.train(layer.training)


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Full names of tied parameters, each with the name of one that it is tied to."""
    owners: dict[nn.Parameter, dict[nn.Module, list[str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{prefix}.{name}" if prefix else name
                owners.setdefault(parameter, {}).setdefault(module, []).append(full)
    tied: dict[str, str] = {}
    for modules in owners.values():
        for module, names in modules.items():
            others = [other[0] for owner, other in modules.items() if owner is not module]
            tied.update({name: others[0] for name in names if others})

    # transformers declares ties that need not be there yet (a model on the meta device).
    for prefix, module in model.named_modules():
        declared = getattr(module, "all_tied_weights_keys", None)
        if declared is None:
            declared = getattr(module, "_tied_weights_keys", None) or {}
        dot = f"{prefix}." if prefix else ""
        pairs = declared.items() if isinstance(declared, dict) else ((k, k) for k in declared)
        for target, source in pairs:
            tied.setdefault(dot + target, dot + source)
            tied.setdefault(dot + source, dot + target)
    return tied


def why_not(layer: nn.Module, names: list[str], tied: dict[str, str]) -> str | None:
    """Why the layer cannot be replaced, or None."""
    for parameter in ("weight", "bias"):
        for name in names:
            if (full := f"{name}.{parameter}") in tied:
                return f"its {parameter} is tied to {tied[full]}"
    if (reason := carries(layer)) is not None:
        return reason
    dtype = cast(nn.Parameter, layer.weight).dtype
    return None if dtype in DTYPES else f"its weight is {dtype}"


def carries(layer: nn.Module) -> str | None:
    """What the layer carries that another in its place would lose, as a reason; or None."""
    if parametrize.is_parametrized(layer):
        return "it has parametrizations"
    for hooks in _HOOKS:
        if getattr(layer, hooks, None):
            return f"it carries hooks ({hooks.strip('_')})"
    for name, tensor in layer.named_parameters(recurse=False):
        for hooks in _TENSOR_HOOKS:
            if getattr(tensor, hooks, None):
                return f"its {name} carries hooks ({hooks.strip('_')})"
    if hasattr(layer, "_hf_hook"):
        return "it carries a hook of accelerate"
    return None


def replace(model: nn.Module, names: list[str], new: nn.Module) -> None:
    """Puts `new` where `names` are."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
