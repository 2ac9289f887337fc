"""BlockSparseQuantizer: what transformers calls while ``from_pretrained`` loads a model.

A checkpoint that is block sparse gets its layers before the weights are read; one that is dense is
made sparse layer by layer while they are. Afterwards the model is an ordinary one: nothing here is
a quantization, transformers just calls it so.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from .._module import PatternModule
from .._patchable import as_linear, linear_layers, replace, tied_parameters, why_not
from .._progress import progress
from ..linear import BlockSparseLinear
from ..matrix import zero_outside_
from ..patch import Planned
from ..quantized import QuantizedBlockSparseLinear, check_scales
from . import record_layers
from ._names import Names
from .checkpoint import Checkpoint
from .config import BlockSparseConfig


class BlockSparseQuantizer(HfQuantizer):
    """Registered for checkpoints whose config names the method "block_sparse"."""

    quantization_config: BlockSparseConfig

    def __init__(self, quantization_config: BlockSparseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._planned: dict[str, Planned] = {}
        self._unsure_biases: list[BlockSparseLinear] = []

    def validate_environment(
        self, *args: Any, device_map: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Before anything is made: what cannot be done at all."""
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(
                "block-sparse checkpoints need transformers 5 or newer, and this is "
                f"{transformers.__version__}"
            )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map: block-sparse layers cannot be offloaded to the disk")
        if not self.pre_quantized and not self.quantization_config.rules:
            raise ValueError(
                "quantization_config: has no rules, and the checkpoint is dense; name the layers "
                'that become sparse: BlockSparseConfig({r"regular expression": {"density": 0.25}})'
            )

    def is_serializable(self) -> bool:
        """True: ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: in full, without an adapter."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True, in ``generate`` too."""
        return True

    # --- before the weights are read --------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self._make_room(model, Checkpoint(checkpoint_files))
        else:
            planned = self.quantization_config.patcher().plan(model)
            self._planned = {f"{name}.weight": item for item in planned for name in item.names}

    def _make_room(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        """Puts in a layer, on the meta device, for each one that is sparse in the checkpoint."""
        names, tied = Names(model), tied_parameters(model)
        layers = {name: (m, all_) for m, all_ in linear_layers(model).items() for name in all_}
        done = set()
        for name in progress(checkpoint.sparse_layers(), "Reading patterns"):
            target = names.in_model(name)
            if target is None:  # of a head that this model does not have
                continue
            if target not in layers:
                kind = type(model.get_submodule(target)).__name__
                raise ValueError(f"checkpoint: {name}: is block sparse, but {target} is {kind}")
            layer, all_names = layers[target]
            if (reason := why_not(layer, all_names, tied)) is not None:
                raise ValueError(f"checkpoint: {name}: is block sparse, but in the model {reason}")
            replace(model, all_names, _on_meta(as_linear(layer), checkpoint, name))
            done.update(all_names)
        for name in self.quantization_config.layers:
            target = names.in_model(name)
            if target is None or target in done:
                continue
            if not names.any_in_model(checkpoint.keys, f"{target}.weight"):  # it may be dense now
                raise ValueError(f"checkpoint: {name}: lacks values, crow_indices, col_indices")

    # --- while a dense checkpoint is read ---------------------------------------------------------

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """True for the dense weights that become sparse."""
        return param_name in self._planned

    def get_quantize_ops(self) -> ConversionOps:
        """Called once for each of them."""
        return _Sparsify(self)

    def sparsify(self, model: nn.Module, key: str, weight: Tensor) -> None:
        """Puts the sparse layer in, made of the dense `weight` that was just read."""
        layer, names, rule = self._planned[key]
        dense = layer.weight
        assert isinstance(dense, Tensor)
        if weight.shape != dense.shape:
            raise ValueError(f"{key}: must be {list(dense.shape)}, got {list(weight.shape)}")
        layer.weight = nn.Parameter(weight)
        bias = layer.bias
        unsure = isinstance(bias, Tensor) and bias.is_meta  # it is read later, if at all
        if isinstance(bias, Tensor) and unsure:
            layer.bias = nn.Parameter(torch.zeros_like(bias, device=weight.device))
        sparse = rule.apply(layer)
        assert isinstance(sparse, BlockSparseLinear)
        if unsure:
            self._unsure_biases.append(sparse)
        replace(model, names, sparse)
        self._forget(names)

    def _forget(self, names: list[str]) -> None:
        for name in names:
            del self._planned[f"{name}.weight"]

    # --- once everything is read ------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for key in list(self._planned):
            if key in self._planned:  # was not in the checkpoint: transformers has drawn it
                self.sparsify(model, key, model.get_parameter(key).detach())
        with torch.no_grad():
            for layer in self._unsure_biases:
                if layer.bias is not None and not getattr(layer.bias, "_is_hf_initialized", False):
                    layer.bias.zero_()
            for name, module in model.named_modules():
                if isinstance(module, PatternModule):
                    _finish(name, module)
                if isinstance(module, BlockSparseLinear) and module.values.dtype != model.dtype:
                    module.register_forward_pre_hook(_cast_input)
        record_layers(model)
        _make_ordinary(model)


class _Sparsify(ConversionOps):
    """Takes dense weights out of what is loaded, and has them made sparse."""

    def __init__(self, quantizer: BlockSparseQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        rest = {}
        for key, tensors in input_dict.items():
            if not self.quantizer.param_needs_quantization(model, key):
                rest[key] = tensors
                continue
            self.quantizer.sparsify(
                model, key, tensors[0] if isinstance(tensors, list) else tensors
            )
            if missing_keys is not None:
                missing_keys.discard(key)
        return rest


def _on_meta(dense: nn.Linear, checkpoint: Checkpoint, name: str) -> PatternModule:
    shape = (dense.out_features, dense.in_features)
    pattern = checkpoint.pattern(name, shape, bias=dense.bias is not None)
    layer = BlockSparseLinear(
        dense.in_features,
        dense.out_features,
        bias=dense.bias is not None,
        pattern=pattern,
        device="meta",
        dtype=dense.weight.dtype,
    )
    return layer.quantize() if checkpoint.is_quantized(name) else layer.train(dense.training)


def _finish(name: str, layer: PatternModule) -> None:
    """Makes what is in no checkpoint: the packed index, and zeros outside the matrix."""
    if layer.values.is_meta or layer.crow_indices.is_meta:  # offloaded: accelerate brings them
        return
    try:
        pattern = layer._pattern_from_bsr(layer.crow_indices, layer.col_indices)
        if pattern.nnz != layer.block_count:
            raise ValueError(f"values has {layer.block_count} blocks, the indices {pattern.nnz}")
        if isinstance(layer, QuantizedBlockSparseLinear):
            check_scales(layer.scales)
    except ValueError as error:
        raise ValueError(f"checkpoint: {name}: {error}") from error
    layer._set_pattern(pattern)
    zero_outside_(layer.values, pattern)


def _cast_input(layer: BlockSparseLinear, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For layers that a model keeps in float32 and casts to itself only if ``weight`` is a tensor.

    T5 in float16 does, with ``wo``.
    """
    return (args[0].to(layer.values.dtype), *args[1:])


def _make_ordinary(model: PreTrainedModel) -> None:
    """Takes the marks of a quantized model off: Trainer, half() and others refuse those."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.is_quantized = False  # type: ignore[assignment]
    # With it save_pretrained would forget the state_dict that a caller gives.
    for attribute in ("hf_quantizer", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
