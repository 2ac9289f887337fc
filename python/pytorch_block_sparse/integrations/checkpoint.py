"""Reads from safetensors files which layers are block sparse, and checks them before they are read.

Shapes and numbers of blocks come from the headers, the patterns from the index tensors, which are
small. No values are read, and nothing in a file is run.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..pattern import Pattern, check_block_shape

_INDICES = ("crow_indices", "col_indices")
_FLOATS = {"F64", "F32", "F16", "BF16"}
_INT8 = "I8"
_INTEGERS = {"I32", "I64"}


class Checkpoint:
    """The headers of the files of a checkpoint.

    Args:
        files: its safetensors files; one or several shards.

    Raises:
        ValueError: no file, a file that is no safetensors, or one that is broken.
    """

    def __init__(self, files: list[str] | None) -> None:
        if not files:
            raise ValueError(
                "checkpoint: block-sparse layers are read from safetensors files, and there are "
                "none; a state_dict: load it into the patched model with load_state_dict"
            )
        self._files: dict[str, str] = {}
        self._shapes: dict[str, list[int]] = {}
        self._dtypes: dict[str, str] = {}
        for file in files:
            if Path(file).suffix != ".safetensors":
                raise ValueError(f"checkpoint: {Path(file).name}: must be a safetensors file")
            try:
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118  (it is no dict)
                        part = tensors.get_slice(key)
                        self._files[key] = file
                        self._shapes[key], self._dtypes[key] = part.get_shape(), part.get_dtype()
            except SafetensorError as error:
                raise ValueError(f"checkpoint: {Path(file).name}: {error}") from error

    @property
    def keys(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def sparse_layers(self) -> list[str]:
        """Names of the layers that have indices, each once."""
        names = {
            key.removesuffix(f".{part}")
            for key in self._files
            for part in _INDICES
            if key.endswith(f".{part}")
        }
        return sorted(names)

    def is_quantized(self, name: str) -> bool:
        """Whether the values of layer `name` are int8."""
        return self._dtypes.get(f"{name}.values") == _INT8

    def pattern(self, name: str, shape: tuple[int, int], bias: bool) -> Pattern:
        """The pattern of layer `name`, on the CPU.

        Args:
            name: of the layer, in the checkpoint.
            shape: (out_features, in_features) that the model wants.
            bias: whether the model wants a bias.

        Raises:
            ValueError: tensors that are missing, or do not fit the model or each other.
        """
        of_outputs = [*(["bias"] if bias else []), *(["scales"] if self.is_quantized(name) else [])]
        wanted = ["values", *_INDICES, *of_outputs]
        missing = [part for part in wanted if f"{name}.{part}" not in self._files]
        if missing:
            raise ValueError(f"checkpoint: {name}: lacks {', '.join(missing)}")
        try:
            self._check_dtypes(name)
            values = self._shapes[f"{name}.values"]
            if len(values) != 3:
                raise ValueError(f"values: must be [blocks, block_out, block_in], got {values}")
            nnz, block_out, block_in = values
            block_shape = check_block_shape((block_out, block_in))
            columns = self._shapes[f"{name}.col_indices"]
            if columns != [nnz]:
                raise ValueError(f"col_indices: values has {nnz} blocks, this {columns}")
            for part in of_outputs:
                if (size := self._shapes[f"{name}.{part}"]) != [shape[0]]:
                    raise ValueError(f"{part}: must be [{shape[0]}], got {size}")
            crow, col = (self._read(f"{name}.{part}") for part in _INDICES)
            with torch.device("cpu"):
                return Pattern.from_bsr(crow, col, shape, block_shape)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"checkpoint: {name}: {error}") from error

    def _check_dtypes(self, name: str) -> None:
        kinds = {"values": _FLOATS, **dict.fromkeys(_INDICES, _INTEGERS)}
        if self.is_quantized(name):
            kinds |= {"values": {_INT8}, "scales": {"F32"}}
        for part, known in kinds.items():
            dtype = self._dtypes[f"{name}.{part}"]
            if dtype not in known:
                raise ValueError(f"{part}: must be {' or '.join(sorted(known))}, got {dtype}")

    def _read(self, key: str) -> Tensor:
        with torch.device("cpu"), safe_open(self._files[key], framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(key)
            return tensor
