"""BlockSparseLora: LoRA of PEFT on a block-sparse layer, which stays frozen.

The adapter is dense and of low rank: y = layer(x) + B A x * scaling. It is not merged: B A has
values outside of the pattern.
"""

from typing import Any, NoReturn, cast

import torch
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import Linear, LoraVariant
from torch import nn

from ..linear import BlockSparseLinear

# Others start from the dense weight, or change it.
_INITS = (True, False, "gaussian", "eva")


class BlockSparseLora(Linear):
    """What PEFT puts in the place of a block-sparse layer; every ``LoraConfig`` knows of it."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        if config.init_lora_weights not in _INITS:
            raise ValueError(
                f"init_lora_weights: on a block-sparse layer one of {_INITS}, got "
                f"{config.init_lora_weights!r}, which reads a dense weight"
            )
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        """Plain LoRA only: the variants read the dense weight."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        layer = cast(BlockSparseLinear, module)
        return layer.in_features, layer.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Always an error: it would drop what the adapter has learnt outside of the pattern."""
        raise RuntimeError(
            "merge: the layer is block sparse, and an adapter has values outside of its pattern, "
            "which would be lost; serve the model with its adapter, take the adapter off "
            "(model.unload()), or merge into a dense layer (layer.to_dense())"
        )

    def unmerge(self) -> None:
        """Nothing to do, since nothing is ever merged."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: it is plain LoRA."""
        return True

    def __repr__(self) -> str:
        return "block_sparse." + torch.nn.Module.__repr__(self)
