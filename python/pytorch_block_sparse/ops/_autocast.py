"""Autocast: the dtype is asked for at each call, and float64 is left alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._products import forward, forward_int8, forward_packed, grad_input, grad_weight


def autocast_operands(device_type: str, *operands: Tensor | None) -> list[Tensor | None]:
    if not torch.is_autocast_enabled(device_type):
        return list(operands)
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return [cast(tensor) for tensor in operands]


def _register_autocast(device_type: str) -> None:
    key = f"Autocast{device_type.upper()}"
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def register(name: str, product: Callable[..., Tensor]) -> None:
        def autocast_product(*args: Any) -> Tensor:
            # Operands lie on one device: on another one, the op itself says so.
            operands = [arg if isinstance(arg, Tensor) else None for arg in args]
            cast = autocast_operands(device_type, *operands)
            with torch._C._ExcludeDispatchKeyGuard(below):
                return product(
                    *(
                        arg if tensor is None else tensor
                        for arg, tensor in zip(args, cast, strict=True)
                    )
                )

        _autocast_library.impl(name, autocast_product, key)

    def autocast_packed(input: Tensor, packed: Tensor, *rest: Any) -> Tensor:
        # The values are in an order that depends on their dtype: the input follows them.
        if input.is_floating_point() and input.dtype != torch.float64:
            input = input.to(packed.dtype)
        with torch._C._ExcludeDispatchKeyGuard(below):
            return forward_packed(input, packed, *rest)

    def autocast_int8(
        input: Tensor,
        values: Tensor,
        scales: Tensor,
        index: Tensor,
        bias: Tensor | None,
        out_features: int,
    ) -> Tensor:
        cast_input, cast_bias = autocast_operands(device_type, input, bias)  # the scales stay
        with torch._C._ExcludeDispatchKeyGuard(below):
            return forward_int8(cast_input, values, scales, index, cast_bias, out_features)

    _autocast_library.impl("forward_packed", autocast_packed, key)
    _autocast_library.impl("forward_int8", autocast_int8, key)
    register("forward", forward)
    register("grad_input", grad_input)
    register("grad_weight", grad_weight)


_autocast_library = torch.library.Library("block_sparse", "IMPL")
_register_autocast("cpu")
_register_autocast("cuda")
