"""BlockSparseModelPatcher: swaps the linear layers of a model, without touching its source."""

import difflib
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

from ._module import DTYPES
from .linear import BlockSparseLinear
from .pattern import check_block_shape, check_density
from .reference import PseudoBlockSparseLinear

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


@dataclass(frozen=True)
class PatchedLayer:
    """One line of what :meth:`BlockSparseModelPatcher.patch_model` did."""

    name: str
    shape: tuple[int, int]
    density: float
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class _Rule:
    regex: str
    density: float = 0.5
    block_shape: tuple[int, int] = (32, 32)
    pseudo_linear: bool = False


class BlockSparseModelPatcher:
    """Replaces ``nn.Linear`` layers (and transformers' ``Conv1D``) by block-sparse ones, by name.

    Example:
        >>> from torch import nn
        >>> from pytorch_block_sparse import BlockSparseModelPatcher
        >>> model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64))
        >>> patcher = BlockSparseModelPatcher()
        >>> patcher.add_pattern(r"0|2", {"density": 0.25})
        >>> table = patcher.patch_model(model)
        layer   out x in  density  parameters   after
        0      256 x 128     0.25      33,024   8,448
        2       64 x 256     0.25      16,448   4,160
        total                          49,472  12,608
    """

    def __init__(self) -> None:
        self._rules: list[_Rule] = []

    def add_pattern(self, pattern: str, patch_info: dict[str, Any] | None = None) -> None:
        """Adds a rule: layers whose full name matches `pattern` are replaced.

        Args:
            pattern: regular expression for the whole dotted name of a layer. Where several rules
                match, the first one added wins.
            patch_info: ``density`` in (0, 1] (default 0.5), ``block_shape`` (default (32, 32)),
                ``pseudo_linear`` (default False): compute it densely, for checks.

        Raises:
            ValueError: a bad expression, an unknown key, or a value out of range.
        """
        if not isinstance(patch_info, (dict, type(None))):
            raise TypeError(f"patch_info: must be a dict, got {type(patch_info).__name__}")
        info = dict(patch_info or {})
        unknown = info.keys() - {"density", "block_shape", "pseudo_linear"}
        if unknown:
            raise ValueError(
                f"patch_info: unknown {sorted(map(str, unknown))}; known are density, block_shape "
                "and pseudo_linear"
            )
        if not isinstance(pattern, str):
            raise TypeError(f"pattern: must be a string, got {type(pattern).__name__}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern: {pattern!r} is no regular expression: {error}") from error
        rule = _Rule(pattern, **info)
        check_density(rule.density)
        check_block_shape(rule.block_shape)
        if not isinstance(rule.pseudo_linear, bool):
            raise ValueError(f"pseudo_linear: must be True or False, got {rule.pseudo_linear!r}")
        self._rules.append(rule)

    def get_patchable_layers(self, model: nn.Module) -> list[dict[str, Any]]:
        """The layers that can be replaced: dicts of ``regexp`` (for add_pattern) and ``layer``."""
        tied = _tied_parameters(model)
        return [
            {"regexp": re.escape(names[0]), "layer": layer}
            for layer, names in _linear_layers(model).items()
            if _why_not(layer, names, tied) is None
        ]

    def patch_model(self, model: nn.Module) -> list[PatchedLayer]:
        """Replaces the layers of `model` that match, in place, and prints a table of them.

        A layer keeps its device, dtype, ``requires_grad`` and train/eval mode, and the blocks of
        largest magnitude. Layers that carry hooks (the module or its tensors) or parametrizations,
        and weights that are tied to another module, are left alone with a warning.

        Returns:
            One :class:`PatchedLayer` for each replaced layer.

        Raises:
            ValueError: a rule matches no layer, or `model` itself is the linear layer (nothing is
                changed then).
        """
        if _is_linear(model):
            raise ValueError(
                f"model: is a {type(model).__name__} itself and has no parent to be replaced in; "
                "use BlockSparseLinear.from_dense"
            )
        layers = _linear_layers(model)
        plan: dict[nn.Module, _Rule] = {}
        for rule in self._rules:
            matches = [
                layer
                for layer, names in layers.items()
                if any(re.fullmatch(rule.regex, name) for name in names)
            ]
            if not matches:
                raise ValueError(
                    _no_match(rule.regex, [n for names in layers.values() for n in names])
                )
            for layer in matches:
                plan.setdefault(layer, rule)

        tied = _tied_parameters(model)
        report: list[PatchedLayer] = []
        for layer, names in layers.items():
            if layer not in plan:
                continue
            reason = _why_not(layer, names, tied)
            if reason is not None:
                warnings.warn(f"{names[0]}: left as it is, since {reason}", stacklevel=2)
                continue
            rule = plan[layer]
            sparse = BlockSparseLinear.from_dense(_as_linear(layer), rule.density, rule.block_shape)
            new = PseudoBlockSparseLinear(sparse) if rule.pseudo_linear else sparse
            report.append(
                PatchedLayer(
                    names[0],
                    (sparse.out_features, sparse.in_features),
                    sparse.density,
                    _count_parameters(layer),
                    _count_parameters(new),
                )
            )
            for name in names:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, new)
        print(format_table(report))
        return report


def format_table(report: list[PatchedLayer]) -> str:
    """The report of :meth:`BlockSparseModelPatcher.patch_model` as text."""
    rows = [("layer", "out x in", "density", "parameters", "after")]
    for entry in report:
        out_features, in_features = entry.shape
        rows.append(
            (
                entry.name,
                f"{out_features} x {in_features}",
                f"{entry.density:.3g}",
                f"{entry.parameters_before:,}",
                f"{entry.parameters_after:,}",
            )
        )
    before = sum(entry.parameters_before for entry in report)
    after = sum(entry.parameters_after for entry in report)
    rows.append(("total", "", "", f"{before:,}", f"{after:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _is_conv1d(module: nn.Module) -> bool:
    # Looked up, not imported: if transformers is not loaded, no module of it exists.
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and type(module) is transformers.Conv1D


def _is_linear(module: nn.Module) -> bool:
    # Not their subclasses: those are made to be used in another way (the output projection of
    # nn.MultiheadAttention is never called, only its weight is read).
    if parametrize.is_parametrized(module):  # its class is one made for it
        return parametrize.type_before_parametrizations(module) is nn.Linear
    return type(module) is nn.Linear or _is_conv1d(module)


def _linear_layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """The linear layers, each with all its names: a shared one has several."""
    layers: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and _is_linear(module):
            layers.setdefault(module, []).append(name)
    return layers


def _as_linear(layer: nn.Module) -> nn.Linear:
    if isinstance(layer, nn.Linear):
        return layer
    weight = cast(nn.Parameter, layer.weight)
    in_features, out_features = weight.shape  # Conv1D keeps its weight transposed
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)
    linear.bias = cast(nn.Parameter, layer.bias)
    return linear.train(layer.training)


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _tied_parameters(model: nn.Module) -> dict[str, str]:
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


def _why_not(layer: nn.Module, names: list[str], tied: dict[str, str]) -> str | None:
    """Why the layer cannot be replaced, or None."""
    for parameter in ("weight", "bias"):
        for name in names:
            if (full := f"{name}.{parameter}") in tied:
                return f"its {parameter} is tied to {tied[full]}"
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
    dtype = cast(nn.Parameter, layer.weight).dtype
    return None if dtype in DTYPES else f"its weight is {dtype}"


def _no_match(regex: str, names: list[str]) -> str:
    plain = re.sub(r"\\(.)", r"\1", regex)
    near = difflib.get_close_matches(plain, names, n=5, cutoff=0.3) or names[:5]
    listed = ", ".join(near) if near else "none"
    return (
        f"pattern: {regex!r} matches the full name of no linear layer; near names: {listed} "
        "(get_patchable_layers(model) lists all)"
    )
