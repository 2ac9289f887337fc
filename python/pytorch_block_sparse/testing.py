"""Helpers for tests of the products: what is right, and how far from it an answer may be."""

import re

import torch
from torch import Tensor

from .matrix import BlockSparseMatrix
from .pattern import Pattern


def kernel_names(device: torch.device | str = "cpu") -> list[str]:
    """The kernels of a device, in the order in which dispatch tries them."""
    values = torch.empty((1, 1, 1), device=device)
    text = torch.ops.block_sparse.explain(values, "forward", 1, 1, 1, False)
    return re.findall(r"^  (\w+): ", text, flags=re.MULTILINE)


def chosen_kernel(explanation: str) -> tuple[str, int]:
    """Name and workspace bytes of the chosen kernel in what ``explain`` says."""
    match = re.search(r"^  (\w+): chosen, workspace (\d+) bytes", explanation, flags=re.MULTILINE)
    if match is None:
        raise ValueError(f"explanation: no kernel was chosen in {explanation!r}")
    return match[1], int(match[2])


def dense_forward(x: Tensor, values: Tensor, pattern: Pattern, bias: Tensor | None) -> Tensor:
    """``y = x Wt + bias`` by the dense matrix, in the dtype of the operands."""
    return torch.nn.functional.linear(x, BlockSparseMatrix(values, pattern).to_dense(), bias)


def dense_grad_input(dy: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
    """``dx = dy W`` by the dense matrix."""
    return dy @ BlockSparseMatrix(values, pattern).to_dense()


def dense_grad_weight(dy: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
    """``dW = dyt x`` by the dense matrix, sampled at the pattern; zero outside the matrix."""
    rows = dy.reshape(-1, pattern.shape[0])
    dense = rows.t() @ x.reshape(-1, pattern.shape[1])
    return BlockSparseMatrix.from_dense(dense, pattern=pattern).values


def assert_close_to_float64(out: Tensor, ref64: Tensor, torch_out: Tensor) -> None:
    """Raises AssertionError unless `out` is nearly as close to the truth as torch's own answer.

    The largest error may be twice that of torch in the same dtype, plus the roundings that no
    answer avoids: one of the largest element in its dtype, and those of the float64 sum.

    Args:
        out: the answer.
        ref64: the same in float64.
        torch_out: torch's answer in the dtype of `out`.
    """
    if out.shape != ref64.shape or out.dtype != torch_out.dtype:
        raise AssertionError(
            f"out: is {out.dtype} {list(out.shape)}, wanted {torch_out.dtype} {list(ref64.shape)}"
        )
    if ref64.numel() == 0:
        return
    largest = ref64.abs().max().item()
    rounding = (torch.finfo(out.dtype).eps / 2 + 4 * torch.finfo(torch.float64).eps) * largest
    allowed = 2 * (torch_out.double() - ref64).abs().max().item() + rounding
    error = (out.double() - ref64).abs()
    if not error.max().item() <= allowed:  # "not <=": NaN fails too
        where = tuple(
            int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape)
        )
        raise AssertionError(
            f"out: error {error.max().item():.3g} at {where} is over the allowed {allowed:.3g}; "
            f"{int((~(error <= allowed)).sum())} of {error.numel()} elements are wrong; "
            f"got {out[where].item()}, wanted {ref64[where].item()}"
        )
