"""What passes through a layer: its inputs, and the gradient of blocks that it does not have.

Hooks that live for a batch or a few; they change nothing that the layer computes. Compiled code
does not call hooks that came after it: while one is there it runs eagerly, and is not compiled
again.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..linear import BlockSparseLinear
from .update import indices_of


def all_reduce_(tensor: Tensor, group: Any = None) -> Tensor:
    """Sums `tensor` over all ranks, in place; alone in the world it is left as it is."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


class _Eager:
    """Makes compiled code run eagerly while someone holds on; one for the process."""

    holders = 0
    stance: Any = None

    @classmethod
    def hold(cls) -> None:
        cls.holders += 1
        if cls.stance is None and "torch._dynamo" in sys.modules:  # else nothing is compiled
            cls.stance = torch.compiler.set_stance("force_eager")

    @classmethod
    def release(cls) -> None:
        cls.holders -= 1
        if cls.holders == 0 and cls.stance is not None:
            cls.stance.__exit__(None, None, None)
            cls.stance = None


class InputSquares:
    """Sum of squares of each input feature of a layer, over the tokens that pass.

    Args:
        layer: the layer to watch.
        products: also sum x xt inside each block column: ``[block_cols, block_in, block_in]``.
    """

    def __init__(self, layer: BlockSparseLinear, *, products: bool = False) -> None:
        self.layer = layer
        device = layer.values.device
        cols, width = layer.pattern.grid[1], layer.block_shape[1]
        shape = (cols, width, width) if products else (cols, width)
        self.sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, input: Tensor) -> None:
        """Counts the tokens of `input`, ``[..., in_features]``."""
        squares, tokens = self.of(input)
        self.sum += squares
        self.tokens += tokens

    def of(self, input: Tensor) -> tuple[Tensor, int]:
        """What :meth:`add` adds to the sum, and the number of tokens."""
        x = input.detach().reshape(-1, self.layer.in_features)
        missing = (0, self.sum.shape[0] * self.sum.shape[1] - x.shape[1])
        if self.sum.dim() == 3:
            wide = nn.functional.pad(x.float(), missing).view(len(x), *self.sum.shape[:2])
            return torch.einsum("tci,tcj->cij", wide, wide), len(x)
        return nn.functional.pad(_squares(x), missing).view(self.sum.shape), len(x)

    def seen(self, group: Any = None) -> int:
        """How many tokens passed, on all ranks."""
        return int(all_reduce_(self.tokens.clone(), group))

    def mean(self, group: Any = None) -> Tensor:
        """float64, the mean over the tokens of all ranks; 0 where none was seen."""
        return all_reduce_(self.sum.clone(), group) / all_reduce_(self.tokens.clone(), group).clamp(
            min=1
        )


def _squares(x: Tensor) -> Tensor:
    """Sum of squares of each column, in float32."""
    if x.is_cuda and x.dtype != torch.float64:  # reads x once and writes no squares
        return torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()
    return x.float().square().sum(0)  # on a CPU this is faster


@contextmanager
def watch_inputs(observers: list[InputSquares]) -> Iterator[None]:
    """Inside, each forward of the layers is counted by their observers."""

    def hook(observer: InputSquares) -> Any:
        return lambda module, args: observer.add(args[0])

    handles = [o.layer.register_forward_pre_hook(hook(o)) for o in observers]
    _Eager.hold()
    try:
        yield
    finally:
        _Eager.release()
        for handle in handles:
            handle.remove()


class GradientWatcher:
    """Base: sees the input and the gradient of the output of a layer in each backward.

    What it gathers sums over the backward passes until :meth:`remove`. A pass whose gradient is not
    finite (a step that a GradScaler skips) is not counted.
    """

    sum: Tensor

    def __init__(self, layer: BlockSparseLinear) -> None:
        self.layer = layer
        self.passes = torch.zeros((), dtype=torch.float64, device=layer.values.device)
        self._handle = layer.register_forward_hook(self._after_forward)
        _Eager.hold()

    def _after_forward(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            input = args[0].detach()
            output.register_hook(lambda gradient: self._after_backward(input, gradient))

    @torch.no_grad()
    def _after_backward(self, input: Tensor, gradient: Tensor) -> None:
        # The sum is finite if all are, and needs no array of booleans.
        self._add(input, gradient, gradient.sum(dtype=self.sum.dtype).isfinite())

    def _add(self, input: Tensor, gradient: Tensor, finite: Tensor) -> None:
        """Adds the pass to `sum`, if it is finite."""
        self.sum += torch.where(finite, self._gather(input, gradient), 0)
        self.passes += finite

    def _gather(self, input: Tensor, gradient: Tensor) -> Tensor:
        """What a pass adds to `sum`."""
        raise NotImplementedError

    def remove(self) -> None:
        """Takes the hook off the layer. To be called once."""
        self._handle.remove()
        _Eager.release()


def seen_by(watchers: Mapping[str, GradientWatcher], group: Any = None) -> dict[str, bool]:
    """Which of the watchers saw a finite gradient, on any rank. Waits for the device, once."""
    if not watchers:
        return {}
    device = next(iter(watchers.values())).passes.device
    passes = torch.stack([watcher.passes.to(device) for watcher in watchers.values()])
    seen = (all_reduce_(passes, group) > 0).tolist()
    return dict(zip(watchers, seen, strict=True))


class CandidateGradients(GradientWatcher):
    """The gradient of blocks that a layer lacks, as if they were there with weight 0.

    It is exact and costs the existing product `grad_weight` on the pattern of the candidates; no
    dense gradient is made.

    Args:
        layer: the layer to watch.
        ids: int64 ``[n]``, ascending ids of the candidate blocks.
    """

    def __init__(self, layer: BlockSparseLinear, ids: Tensor) -> None:
        self.ids = ids
        self.inputs = InputSquares(layer)
        dtype = torch.promote_types(layer.values.dtype, torch.float32)
        self.sum = torch.zeros((len(ids), *layer.block_shape), dtype=dtype, device=ids.device)
        # Without a plan: for the one product that comes it takes longer than it saves.
        self._index = indices_of(ids, layer.pattern)[2]
        super().__init__(layer)

    def _add(self, input: Tensor, gradient: Tensor, finite: Tensor) -> None:
        squares, tokens = self.inputs.of(input)
        finite = finite & squares.sum().isfinite()
        self.inputs.sum += torch.where(finite, squares, 0)
        self.inputs.tokens += finite * tokens
        super()._add(input, gradient, finite)

    def _gather(self, input: Tensor, gradient: Tensor) -> Tensor:
        x = input.to(gradient.dtype)
        return ops.grad_weight(gradient, x, self._index, *self.sum.shape)

    def norms(self, *, per_input_rms: bool = False, group: Any = None) -> Tensor:
        """``[n]``: the 2-norm of the gradient of each candidate, summed over all ranks first.

        With `per_input_rms` each column is divided by the root mean square of its input feature,
        so that a few large features do not draw every block to them.
        """
        total = all_reduce_(self.sum.clone(), group)
        if per_input_rms:
            rms = self.inputs.mean(group).sqrt().to(total.dtype)
            floor = (0.01 * rms.mean()).clamp(min=torch.finfo(rms.dtype).tiny)  # nearly dead ones
            cols = self.ids % max(1, self.layer.pattern.grid[1])
            total = total / rms.maximum(floor)[cols][:, None, :]
        return torch.linalg.vector_norm(total, dim=(1, 2))


class PooledGradients(GradientWatcher):
    """An upper bound of the gradient's norm, for every block of the grid, present or not.

    |dW_B| <= sum over the tokens of |dy_B| |x_B|: the norms are taken over each block's outputs and
    inputs, and their product costs 1 / (block_out * block_in) of a dense gradient.
    """

    def __init__(self, layer: BlockSparseLinear) -> None:
        self.sum = torch.zeros(layer.pattern.grid, device=layer.values.device)
        super().__init__(layer)

    def _gather(self, input: Tensor, gradient: Tensor) -> Tensor:
        block_out, block_in = self.layer.block_shape
        return _norms(gradient, block_out).t() @ _norms(input, block_in)

    def bounds(self, group: Any = None) -> Tensor:
        """float32 ``[block_rows, block_cols]``, over all ranks."""
        return all_reduce_(self.sum.clone(), group)


def _norms(tensor: Tensor, width: int) -> Tensor:
    """``[tokens, blocks]``: the 2-norm of each token's features, `width` at a time."""
    rows = tensor.reshape(-1, tensor.shape[-1]).float()
    rows = nn.functional.pad(rows, (0, -rows.shape[1] % width))
    return torch.linalg.vector_norm(rows.view(len(rows), -1, width), dim=2)
