"""Guards optimizers after a checkpoint with another number of blocks was loaded.

The Parameter object stays, so an optimizer that was made before goes on training it; but moments
that it holds already have the old shape. torch's plain optimizers then raise without saying what
happened, and its fused ones write out of bounds. Here the step raises, and says what to do.
"""

import weakref
from typing import Any, cast

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

# Modules, not their Parameters: torch.utils.swap_tensors refuses tensors that have weak references.
_resized: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_hooks: list[Any] = []


def refuse_old_state(module: nn.Module) -> None:
    """Makes the step of an optimizer that holds moments of an old shape of `values` an error."""
    _resized.add(module)
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_check_state))


def _check_state(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for module in list(_resized):
        values = cast(Tensor, module.values)
        if values not in optimizer.state:
            continue
        for name, moment in optimizer.state[values].items():
            if isinstance(moment, Tensor) and moment.dim() == 3 and len(moment) != len(values):
                raise RuntimeError(
                    f"optimizer: holds {name} {list(moment.shape)} for values that are now "
                    f"{list(values.shape)}, since load_state_dict brought another number of "
                    "blocks; load the optimizer's state too, or drop it: "
                    "optimizer.state.pop(layer.values)"
                )
        _resized.discard(module)  # its state fits, and will
