"""BlockSparseModelPatcher: swaps the linear layers of a model, without touching its source."""

import difflib
import re
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ._patchable import as_linear, is_linear, linear_layers, replace, tied_parameters, why_not
from ._progress import progress
from ._table import format_rows
from .integrations import record_layers
from .linear import BlockSparseLinear
from .pattern import check_block_shape, check_density
from .reference import PseudoBlockSparseLinear


@dataclass(frozen=True)
class PatchedLayer:
    """One line of what :meth:`BlockSparseModelPatcher.patch_model` did."""

    name: str
    shape: tuple[int, int]
    density: float
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class Rule:
    """What becomes of the layers whose name matches."""

    regex: str
    density: float = 0.5
    block_shape: tuple[int, int] = (32, 32)
    pseudo_linear: bool = False

    def apply(self, layer: nn.Module) -> BlockSparseLinear | PseudoBlockSparseLinear:
        """The layer that takes the place of `layer`."""
        sparse = BlockSparseLinear.from_dense(as_linear(layer), self.density, self.block_shape)
        return PseudoBlockSparseLinear(sparse) if self.pseudo_linear else sparse


class Planned(NamedTuple):
    """A layer that will be replaced, all its names, and the rule that says by what."""

    layer: nn.Module
    names: list[str]
    rule: Rule


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
        self._rules: list[Rule] = []

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
        rule = Rule(pattern, **info)
        check_density(rule.density)
        check_block_shape(rule.block_shape)
        if not isinstance(rule.pseudo_linear, bool):
            raise ValueError(f"pseudo_linear: must be True or False, got {rule.pseudo_linear!r}")
        self._rules.append(rule)

    def get_patchable_layers(self, model: nn.Module) -> list[dict[str, Any]]:
        """The layers that can be replaced: dicts of ``regexp`` (for add_pattern) and ``layer``."""
        tied = tied_parameters(model)
        return [
            {"regexp": re.escape(names[0]), "layer": layer}
            for layer, names in linear_layers(model).items()
            if why_not(layer, names, tied) is None
        ]

    def plan(self, model: nn.Module) -> "list[Planned]":
        """What :meth:`patch_model` would replace. Changes nothing, warns and raises as it does."""
        if is_linear(model):
            raise ValueError(
                f"model: is a {type(model).__name__} itself and has no parent to be replaced in; "
                "use BlockSparseLinear.from_dense"
            )
        layers = linear_layers(model)
        rules: dict[nn.Module, Rule] = {}
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
                rules.setdefault(layer, rule)

        tied = tied_parameters(model)
        planned = []
        for layer, names in layers.items():
            if layer not in rules:
                continue
            reason = why_not(layer, names, tied)
            if reason is None:
                planned.append(Planned(layer, names, rules[layer]))
            else:
                warnings.warn(f"{names[0]}: left as it is, since {reason}", stacklevel=3)
        return planned

    def patch_model(self, model: nn.Module) -> list[PatchedLayer]:
        """Replaces the layers of `model` that match, in place, and prints a table of them.

        A layer keeps its device, dtype, ``requires_grad`` and train/eval mode, and the blocks of
        largest magnitude. Layers that carry hooks (the module or its tensors) or parametrizations,
        and weights that are tied to another module, are left alone with a warning. A model of
        transformers has it written into its config (:func:`integrations.record_layers`).

        Returns:
            One :class:`PatchedLayer` for each replaced layer.

        Raises:
            ValueError: a rule matches no layer, or `model` itself is the linear layer (nothing is
                changed then).
        """
        report: list[PatchedLayer] = []
        for layer, names, rule in progress(self.plan(model), "Patching"):
            new = rule.apply(layer)
            report.append(
                PatchedLayer(
                    names[0],
                    (new.out_features, new.in_features),
                    new.density,
                    _count_parameters(layer),
                    _count_parameters(new),
                )
            )
            replace(model, names, new)
        record_layers(model)
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
    return format_rows(rows)


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _no_match(regex: str, names: list[str]) -> str:
    plain = re.sub(r"\\(.)", r"\1", regex)
    near = difflib.get_close_matches(plain, names, n=5, cutoff=0.3) or names[:5]
    listed = ", ".join(near) if near else "none"
    return (
        f"pattern: {regex!r} matches the full name of no linear layer; near names: {listed} "
        "(get_patchable_layers(model) lists all)"
    )
