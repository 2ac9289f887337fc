"""The library at home in others: transformers (checkpoints, Trainer, model cards) and PEFT.

``import pytorch_block_sparse`` alone registers what they need to know, whether they are imported
before or after, and imports none of them. The names here are imported when they are asked for.
"""

import sys
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

from ..linear import BlockSparseLinear
from ._after_import import after_import

if TYPE_CHECKING:
    from .card import model_card
    from .config import BlockSparseConfig
    from .lora import BlockSparseLora
    from .trainer import BlockSparsityCallback

__all__ = [
    "BlockSparseConfig",
    "BlockSparseLora",
    "BlockSparsityCallback",
    "model_card",
    "record_layers",
]

_HOMES = {
    "BlockSparseConfig": ".config",
    "BlockSparseLora": ".lora",
    "BlockSparsityCallback": ".trainer",
    "model_card": ".card",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name], __name__), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{name}: needs {error.name} (pip install 'pytorch_block_sparse[transformers,peft]')"
        ) from error


def record_layers(model: nn.Module) -> None:
    """Writes into the config of a transformers model which of its layers are block sparse.

    ``patch_model`` and ``from_pretrained`` do it; call it after you have put in layers yourself, so
    that ``save_pretrained`` writes a checkpoint that ``from_pretrained`` reads. Models that are no
    ``PreTrainedModel`` are left as they are.
    """
    if "transformers.modeling_utils" in sys.modules:  # else it is none
        from .config import write_config

        write_config(model)


def register() -> None:
    """Tells transformers and PEFT about block-sparse layers, as soon as each of them is there."""
    # Not transformers.quantizers, which it imports itself: here all of it can be imported.
    after_import("transformers.modeling_utils", _register_transformers)
    after_import("peft.tuners.lora.config", _register_lora)


def _register_transformers(modeling: ModuleType) -> None:
    _register_quantizer()
    _register_card(modeling.PreTrainedModel)


def _register_quantizer() -> None:
    from transformers.quantizers import auto

    from .config import METHOD, BlockSparseConfig

    # The quantizer when it is needed: it may be its own import that brought transformers in.
    def quantizer(config: BlockSparseConfig, **options: Any) -> Any:
        from .quantizer import BlockSparseQuantizer

        return BlockSparseQuantizer(config, **options)

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = BlockSparseConfig
    auto.AUTO_QUANTIZER_MAPPING[METHOD] = quantizer  # type: ignore[assignment]


def _register_card(model_class: Any) -> None:
    # All ways to push go through here; the folder has its card by now.
    plain = model_class._upload_modified_files

    @wraps(plain)
    def _upload_modified_files(
        self: Any, working_dir: Any, repo_id: str, *args: Any, **options: Any
    ) -> Any:
        from .config import METHOD, method_of

        card = Path(working_dir) / "README.md"
        if method_of(self.config) == METHOD and card.is_file():
            from .card import name_the_import

            name_the_import(self, card, repo_id)
        return plain(self, working_dir, repo_id, *args, **options)

    model_class._upload_modified_files = _upload_modified_files


def _register_lora(config: ModuleType) -> None:
    # PEFT asks each LoraConfig for layers that it does not know, also one read from a checkpoint.
    plain = config.LoraConfig.__post_init__

    @wraps(plain)
    def __post_init__(self: Any) -> None:
        from .lora import BlockSparseLora

        plain(self)
        self._register_custom_module({BlockSparseLinear: BlockSparseLora})

    config.LoraConfig.__post_init__ = __post_init__
