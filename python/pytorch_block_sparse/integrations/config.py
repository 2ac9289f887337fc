"""BlockSparseConfig: what ``config.json`` of a transformers model says of its block-sparse layers.

It names the layers and their block shape. How many blocks they have stands in the checkpoint alone,
so that a pattern that changed, or was compacted, cannot make it stale.
"""

import warnings
from typing import Any

from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._module import PatternModule
from ..patch import BlockSparseModelPatcher
from ..pattern import check_block_shape
from ..prepacked import PrepackedLinear

METHOD = "block_sparse"
FORMAT = 1  # of what save_pretrained writes
TAGS = ["block-sparse", "pytorch_block_sparse"]


class BlockSparseConfig(QuantizationConfigMixin):
    """Makes a dense checkpoint block sparse while ``from_pretrained`` loads it.

    Args:
        rules: for each regular expression of layer names, the options of
            :meth:`BlockSparseModelPatcher.add_pattern`: ``density`` and ``block_shape``.
        layers: block shape of each layer that is block sparse; for ``config.json``.
        format: version of the checkpoint's form; for ``config.json``.
        quant_method: always "block_sparse": under it transformers finds this class.

    Raises:
        ValueError: an unknown key, a rule or a layer that makes no sense, a format of the future.

    Example:
        >>> from pytorch_block_sparse.integrations import BlockSparseConfig
        >>> config = BlockSparseConfig({r"encoder\\..*\\.dense": {"density": 0.25}})
    """

    def __init__(
        self,
        rules: dict[str, dict[str, Any]] | None = None,
        *,
        layers: dict[str, tuple[int, int]] | None = None,
        format: int = FORMAT,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(
                f"quantization_config: unknown {sorted(unknown)}; known are rules, layers, format"
            )
        if quant_method != METHOD:
            raise ValueError(f"quant_method: must be {METHOD!r}, got {quant_method!r}")
        if isinstance(format, bool) or not isinstance(format, int) or not 1 <= format <= FORMAT:
            raise ValueError(
                f"format: this version of pytorch_block_sparse reads up to {FORMAT}, got {format!r}"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format
        self.rules = _check_dict("rules", rules)
        self.layers = {
            name: _check_layer(name, shape) for name, shape in _check_dict("layers", layers).items()
        }
        self.patcher()

    def patcher(self) -> BlockSparseModelPatcher:
        """The rules, ready to be applied."""
        patcher = BlockSparseModelPatcher()
        for pattern, options in self.rules.items():
            if isinstance(options, dict) and "pseudo_linear" in options:
                raise ValueError("rules: pseudo_linear is for checks, and in no checkpoint")
            patcher.add_pattern(pattern, options)
        return patcher

    def to_dict(self) -> dict[str, Any]:
        """What goes into ``config.json``."""
        content: dict[str, Any] = {"quant_method": self.quant_method, "format": self.format}
        if self.rules:
            content["rules"] = {pattern: dict(options) for pattern, options in self.rules.items()}
        return {**content, "layers": {name: list(shape) for name, shape in self.layers.items()}}


def write_config(model: nn.Module) -> None:
    """:func:`record_layers`, where transformers is loaded."""
    from transformers.modeling_utils import PreTrainedModel  # it registers the class above

    written = set()
    for _, module in model.named_modules():
        # A model and the base model in it share one config: names of the outer one, which is first.
        if not isinstance(module, PreTrainedModel) or id(module.config) in written:
            continue
        written.add(id(module.config))
        layers = {
            name: layer.block_shape
            for name, layer in module.named_modules(remove_duplicate=False)
            if isinstance(layer, (PatternModule, PrepackedLinear))
        }
        method = _method(module.config)
        if layers and method not in (None, METHOD):
            warnings.warn(
                f"model: is quantized by {method!r} already, and a checkpoint has one method only: "
                "what save_pretrained writes of it cannot be loaded",
                stacklevel=4,
            )
        elif layers:
            module.config.quantization_config = BlockSparseConfig(layers=layers)
            module.add_model_tags(TAGS)
        elif method == METHOD:
            del module.config.quantization_config


def _method(config: Any) -> str | None:
    content = getattr(config, "quantization_config", None) or {}
    if isinstance(content, dict):
        return content.get("quant_method")
    return getattr(content, "quant_method", None)


def _check_dict(name: str, value: Any) -> dict[str, Any]:
    value = {} if value is None else value
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name}: must be a dict with names as keys, got {value!r:.80}")
    return value


def _check_layer(name: str, shape: Any) -> tuple[int, int]:
    try:
        return check_block_shape(shape)
    except ValueError as error:
        raise ValueError(f"layers: {name}: {error}") from error
