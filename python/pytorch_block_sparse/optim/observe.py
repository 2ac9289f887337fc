"""What passes through a layer: its inputs, and the gradient of blocks that it does not have.

Hooks that live for a batch or a few; they change nothing that the layer computes. Compiled code
does not call hooks that came after it: while one is there all compiled code of the process runs
eagerly, also that of other models (torch has no switch for one), and is not compiled again.
"""

import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..linear import BlockSparseLinear
from .hooks import WeakHook
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

    def before_forward(self, module: nn.Module, args: tuple[Tensor]) -> None:
        """The hook of the layer."""
        self.add(args[0])

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
    handles = [o.layer.register_forward_pre_hook(WeakHook(o.before_forward)) for o in observers]
    _Eager.hold()
    try:
        yield
    finally:
        _Eager.release()
        for handle in handles:
            handle.remove()


def _let_go(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    _Eager.release()


class GradientWatcher:
    """Base: sees the input and the gradient of the output of a layer in each backward.

    What it gathers sums over the backward passes until :meth:`remove`, or until it is dropped. A
    pass whose gradient is not finite is not counted.

    Args:
        layer: the layer to watch.
        of_step: what is gathered belongs to a step of the optimizer: where the layer's gradient has
            been cleared it is forgotten. So a step that a GradScaler skips leaves nothing.
    """

    sum: Tensor

    def __init__(self, layer: BlockSparseLinear, *, of_step: bool = False) -> None:
        self.layer = layer
        self._landed = False  # in the layer's gradient, since that was last looked at
        self._start()
        handles: list[Any] = [layer.register_forward_hook(WeakHook(self._after_forward))]
        if of_step and layer.values.requires_grad:
            hook = WeakHook(self._after_landing)
            handles.append(layer.values.register_post_accumulate_grad_hook(hook))
        self._handles = weakref.finalize(self, _let_go, handles)
        _Eager.hold()

    def _start(self) -> None:
        """Nothing has been gathered yet; where the layer is."""
        self.passes = torch.zeros((), dtype=torch.float64, device=self.layer.values.device)

    def _after_forward(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if output.requires_grad:
            if self.passes.device != self.layer.values.device:  # the layer has moved since
                self._start()
            self.forget_if_cleared()
            input = args[0].detach()
            output.register_hook(lambda gradient: self._after_backward(input, gradient))

    def _after_landing(self, values: Tensor) -> None:
        self._landed = True

    @torch.no_grad()
    def forget_if_cleared(self, *, zeros: bool = True) -> None:
        """Forgets what had come into a gradient that is None now, or zero. Waits for no device.

        Args:
            zeros: whether zeros mean that it was cleared; they may be what it is.
        """
        gradient = self.layer.values.grad
        if self._landed and (zeros or gradient is None):
            self._landed = False
            for tensor in self._gathered():
                if gradient is None:
                    tensor.zero_()
                else:  # not a product: what overflowed would become NaN
                    tensor.masked_fill_(~gradient.any(), 0)

    def _gathered(self) -> list[Tensor]:
        """All that sums over the passes."""
        return [self.passes, self.sum]

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
        """Takes the hooks off the layer."""
        self._handles()


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
        layer, of_step: see :class:`GradientWatcher`.
        ids: int64 ``[n]``, ascending ids of the candidate blocks.
    """

    def __init__(self, layer: BlockSparseLinear, ids: Tensor, *, of_step: bool = False) -> None:
        self.ids = ids
        super().__init__(layer, of_step=of_step)

    def _start(self) -> None:
        super()._start()
        values = self.layer.values
        self.ids = self.ids.to(values.device)
        self.inputs = InputSquares(self.layer)
        dtype = torch.promote_types(values.dtype, torch.float32)
        shape = (len(self.ids), *self.layer.block_shape)
        self.sum = torch.zeros(shape, dtype=dtype, device=values.device)
        # Without a plan: for the one product that comes it takes longer than it saves.
        self._index = indices_of(self.ids, self.layer.pattern)[2]

    def _gathered(self) -> list[Tensor]:
        return [*super()._gathered(), self.inputs.sum, self.inputs.tokens]

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

    def _start(self) -> None:
        super()._start()
        self.sum = torch.zeros(self.layer.pattern.grid, device=self.layer.values.device)

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
