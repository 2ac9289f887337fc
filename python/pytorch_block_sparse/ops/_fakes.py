"""Fakes: the shapes of the ops' results, without the numbers.

They check what would give a tensor of the wrong kind; sizes are checked when the op runs.
"""

import torch
from torch import Tensor

from ..pattern import index_size


def _check_fake(index: Tensor, **operands: Tensor | None) -> None:
    given = {name: tensor for name, tensor in operands.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.dtype != first.dtype:
            raise ValueError(f"{name}: dtype is {tensor.dtype}, but {first_name} has {first.dtype}")
    for name, tensor in {**given, "index": index}.items():
        if tensor.device != first.device:
            raise ValueError(f"{name}: is on {tensor.device}, but {first_name} on {first.device}")


@torch.library.register_fake("block_sparse::forward")
def _forward_fake(
    input: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    _check_fake(index, input=input, values=values, bias=bias)
    return input.new_empty((*input.shape[:-1], out_features))


@torch.library.register_fake("block_sparse::forward_packed")
def _forward_packed_fake(
    input: Tensor,
    packed: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out_features: int,
    block_out: int,
    block_in: int,
) -> Tensor:
    _check_fake(index, input=input, packed=packed, bias=bias)
    return input.new_empty((*input.shape[:-1], out_features))


@torch.library.register_fake("block_sparse::forward_int8")
def _forward_int8_fake(
    input: Tensor,
    values: Tensor,
    scales: Tensor,
    index: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    for name, tensor, dtype in (("values", values, torch.int8), ("scales", scales, torch.float32)):
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: must be {dtype}, got {tensor.dtype}")
        if tensor.device != input.device:
            raise ValueError(f"{name}: is on {tensor.device}, but input on {input.device}")
    _check_fake(index, input=input, bias=bias)
    return input.new_empty((*input.shape[:-1], out_features))


@torch.library.register_fake("block_sparse::pack")
def _pack_fake(values: Tensor) -> Tensor:
    if values.dim() != 3:
        raise ValueError(f"values: must be [nnz, block_out, block_in], got {list(values.shape)}")
    return values.new_empty((values.shape[0], values.shape[1] * values.shape[2]))


@torch.library.register_fake("block_sparse::unpack")
def _unpack_fake(packed: Tensor, block_out: int, block_in: int) -> Tensor:
    if packed.dim() != 2:
        raise ValueError(f"packed: must be [nnz, block_out * block_in], got {list(packed.shape)}")
    return packed.new_empty((packed.shape[0], block_out, block_in))


@torch.library.register_fake("block_sparse::zero_blocks_")
def _zero_blocks_fake(values: list[Tensor], blocks: list[Tensor]) -> None:
    for tensor in [*values, *blocks]:
        if tensor.device != values[0].device:
            raise ValueError(f"values, blocks: are on {values[0].device} and {tensor.device}")


@torch.library.register_fake("block_sparse::block_dots")
def _block_dots_fake(
    values: list[Tensor], others: list[Tensor], blocks: list[Tensor], instead: list[Tensor]
) -> Tensor:
    for tensor in [*values, *others, *blocks, *instead]:
        if tensor.device != values[0].device:
            raise ValueError(f"values: are on {values[0].device}, but others on {tensor.device}")
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    return values[0].new_empty(sum(tensor.shape[0] for tensor in values), dtype=dtype)


@torch.library.register_fake("block_sparse::grad_input")
def _grad_input_fake(
    grad_output: Tensor, values: Tensor, index: Tensor, in_features: int
) -> Tensor:
    _check_fake(index, grad_output=grad_output, values=values)
    return grad_output.new_empty((*grad_output.shape[:-1], in_features))


@torch.library.register_fake("block_sparse::grad_weight")
def _grad_weight_fake(
    grad_output: Tensor, input: Tensor, index: Tensor, nnz: int, block_out: int, block_in: int
) -> Tensor:
    _check_fake(index, grad_output=grad_output, input=input)
    return input.new_empty((nnz, block_out, block_in))


@torch.library.register_fake("block_sparse::index_from_bsr")
def _index_from_bsr_fake(crow_indices: Tensor, col_indices: Tensor, block_cols: int) -> Tensor:
    if col_indices.device != crow_indices.device:
        raise ValueError(
            f"col_indices: is on {col_indices.device}, but crow_indices on {crow_indices.device}"
        )
    size = index_size((crow_indices.numel() - 1, block_cols), col_indices.numel())
    return crow_indices.new_empty(size)


@torch.library.register_fake("block_sparse::with_walks")
def _with_walks_fake(
    index: Tensor, block_rows: int, block_cols: int, nnz: int, block_out: int, block_in: int
) -> Tensor:
    if index.device.type == "cpu":
        return index.new_empty(index.numel())
    return index.new_empty(torch.library.get_ctx().new_dynamic_size(min=2))


@torch.library.register_fake("block_sparse::index_from_mask")
def _index_from_mask_fake(mask: Tensor) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size(min=2)  # depends on the mask's numbers
    return mask.new_empty(size, dtype=torch.int32)


@torch.library.register_fake("block_sparse::index_from_blocks")
def _index_from_blocks_fake(blocks: Tensor, block_rows: int, block_cols: int) -> Tensor:
    if blocks.dim() != 2:
        raise ValueError(f"blocks: must be [n, 2], got {list(blocks.shape)}")
    size = index_size((block_rows, block_cols), blocks.shape[0])
    return blocks.new_empty(size, dtype=torch.int32)


@torch.library.register_fake("block_sparse::index_random")
def _index_random_fake(
    block_rows: int, block_cols: int, nnz: int, seed: int, balanced: bool
) -> Tensor:
    return torch.empty(index_size((block_rows, block_cols), nnz), dtype=torch.int32, device="cpu")


@torch.library.register_fake("block_sparse::index_banded")
def _index_banded_fake(block_rows: int, block_cols: int, bandwidth: int) -> Tensor:
    diagonal = [r * block_cols // block_rows for r in range(block_rows)]
    nnz = sum(min(block_cols, d + bandwidth + 1) - max(0, d - bandwidth) for d in diagonal)
    return torch.empty(index_size((block_rows, block_cols), nnz), dtype=torch.int32, device="cpu")
