"""The product with int8 values: exact where it can be, within half a scale where not, and the
operands that its op refuses. C++ runs every kernel of the CPU (int8_test.cpp)."""

import copy

import pytest
import torch

from pytorch_block_sparse import BlockSparseLinear, Pattern, ops
from pytorch_block_sparse.testing import assert_close_to_float64, chosen_kernel, kernel_names
from quantized_helpers import each_dtype, exact_layer, inputs, layer_of_normals
from zoo import BLOCK_SHAPES, block_id, normal, pattern_of, zoo

each_block = pytest.mark.parametrize("block_shape", [*BLOCK_SHAPES, (1, 1)], ids=block_id)

# --- what it computes -----------------------------------------------------------------------------


@each_block
def test_values_that_int8_holds_stay_as_they_are(block_shape):
    for name, pattern in zoo(block_shape):
        layer = exact_layer(pattern)
        back = layer.quantize().dequantize()
        assert torch.equal(back.values, layer.values), name
        assert torch.equal(back.bias, layer.bias) and back.pattern.equal(pattern)


@each_dtype
@each_block
def test_the_product_is_that_of_the_layer_it_stands_for(block_shape, dtype):
    for name, pattern in zoo(block_shape):
        layer = exact_layer(pattern, dtype=torch.float64)
        served = layer.quantize().to(dtype)
        for leading in [(), (0,), (1,), (3,), (16,), (2, 70)]:
            x = inputs(layer, *leading, dtype=torch.float64)
            with torch.inference_mode():
                assert torch.equal(served(x.to(dtype)), layer(x).to(dtype)), (name, leading)


@pytest.mark.parametrize("kernel", kernel_names())
@each_dtype
def test_each_kernel_that_takes_it(kernel, dtype, force_kernel):
    layer = exact_layer(pattern_of("random", (200, 150), (32, 32)), dtype=torch.float64)
    served = layer.quantize().to(dtype)
    for tokens in (3, 130):
        if f"{kernel}: refuses" in served.explain(tokens, dtype):
            continue
        force_kernel(kernel)
        assert chosen_kernel(served.explain(tokens))[0] == kernel
        x = inputs(layer, tokens, dtype=torch.float64)
        assert torch.equal(served(x.to(dtype)), layer(x).to(dtype))


def test_one_wrong_value_or_scale_shows():
    layer = exact_layer(pattern_of("random", (96, 64), (32, 32)))
    x = inputs(layer, 3)
    for name in ("values", "scales"):
        served = layer.quantize()
        getattr(served, name).flatten()[-1] += 1
        assert not torch.equal(served(x), layer(x).detach()), name


def test_without_bias_under_compile_and_vmap():
    layer = exact_layer(pattern_of("random", (96, 64), (32, 32)), bias=False)
    served, x = layer.quantize(), inputs(layer, 3, 5)
    with torch.no_grad():
        wanted = layer(x)
        assert torch.equal(torch.compile(served, fullgraph=True, dynamic=True)(x), wanted)
        assert torch.equal(torch.func.vmap(served)(x), wanted)
        exported = torch.export.export(served, (x,)).module()
        assert torch.equal(exported(x), wanted)


def test_autocast_casts_input_and_bias_and_not_the_scales():
    layer = exact_layer(pattern_of("random", (96, 64), (32, 32)), dtype=torch.bfloat16)
    served, x = layer.quantize().float(), inputs(layer, 5, dtype=torch.bfloat16)
    served.scales.mul_(1 + 2**-12)  # lost in bfloat16, not in a sum of it
    wanted = layer.quantize().double().dequantize()(x.double())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        y = served(x.float())
    assert y.dtype == torch.bfloat16
    assert (y.double() - wanted).abs().max() <= wanted.abs().max() * 2**-8


# --- how far off it is ----------------------------------------------------------------------------


@each_dtype
@each_block
def test_a_value_is_off_by_half_a_scale_at_most(block_shape, dtype):
    for name, pattern in zoo(block_shape):
        layer = layer_of_normals(pattern, dtype)
        served = layer.quantize()
        assert not (served.values == -128).any()
        weight = layer.weight.to_dense().double()
        quantized = served.dequantize(torch.float64).weight.to_dense()
        half = served.scales.double()[:, None] / 2
        assert bool(((weight - quantized).abs() <= half * (1 + 1e-12)).all()), name
        largest = weight.abs().amax(dim=1) if weight.numel() else weight.sum(1)
        assert torch.allclose(served.scales.double() * 127, largest.clamp(min=2e-36), rtol=1e-6)


def test_a_scale_that_is_too_small_breaks_the_bound():
    """The test of the test above."""
    layer = layer_of_normals(pattern_of("full", (96, 64), (32, 32)))
    served = layer.quantize()
    served.scales[40] *= 0.99
    error = (layer.weight.to_dense() - served.weight.to_dense()).abs()
    assert bool((error > served.scales[:, None] * 0.5001)[40].any())


@each_dtype
def test_the_product_is_within_the_bound_of_the_values(dtype):
    """|y - x Wt| <= sum of |x| s/2 over what a row sees, and rounding as torch's."""
    pattern = pattern_of("random", (160, 230), (32, 32))
    layer = layer_of_normals(pattern, dtype)
    served = layer.quantize()
    x = normal(7, 230, dtype=dtype)
    ones = BlockSparseLinear(230, 160, bias=False, pattern=pattern, dtype=torch.float64)
    with torch.inference_mode():
        y = served(x)
        exact = copy.deepcopy(layer).double()(x.double())
        ones.values.fill_(1)
        bound = ones(x.double().abs()) * served.scales.double() / 2
        back = served.dequantize(torch.float64)
        rounded = served.dequantize(dtype).to_dense()
        assert_close_to_float64(y, back(x.double()), rounded(x))
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert bool(((y.double() - exact).abs() <= bound + rounding).all())


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-39, 1e-30, 1e30, 3e38])
def test_rows_of_any_magnitude(magnitude):
    layer = BlockSparseLinear(32, 32, density=1.0)
    with torch.no_grad():
        layer.values.fill_(magnitude)
    served = layer.quantize()
    error = (served.dequantize(torch.float64).values - layer.values.double()).abs()
    assert bool((error <= served.scales.double().max() / 2).all())
    assert served.scales.isfinite().all() and bool((served.scales > 0).all())


# --- operands -------------------------------------------------------------------------------------


PATTERN = Pattern.full((64, 96), (32, 32))
OPERANDS = {
    "input": torch.ones(5, 96),
    "values": torch.ones(6, 32, 32, dtype=torch.int8),
    "scales": torch.ones(64),
    "index": PATTERN.index,
    "bias": torch.ones(64),
    "out_features": 64,
}


@pytest.mark.parametrize(
    ("operand", "value", "message"),
    [
        ("values", torch.ones(6, 32, 32), "values: must be int8 .*got Float"),
        ("values", torch.ones(6, 1024, dtype=torch.int8), r"values: must be \[nnz"),
        ("values", torch.ones(5, 32, 32, dtype=torch.int8), "index: has"),
        ("scales", torch.ones(64, dtype=torch.float64), r"scales: must be float32 \[64\]"),
        ("scales", torch.ones(63), r"scales: must have shape \[64\]"),
        ("scales", torch.ones(64, 1), r"scales: must have shape \[64\]"),
        ("bias", torch.ones(64, dtype=torch.float16), "bias: dtype is f16, but input has f32"),
        ("bias", torch.ones(65), r"bias: must have shape \[64\]"),
        ("input", torch.ones(5, 96, dtype=torch.int8), "input: dtype must be float64"),
        ("out_features", 96, "scales: must have shape|index: has"),
        ("index", PATTERN.index[:-1], "index: has"),
    ],
)
def test_operands_that_do_not_fit(operand, value, message):
    with pytest.raises(ValueError, match=message):
        ops.forward_int8(*{**OPERANDS, operand: value}.values())


def test_operands_of_any_strides():
    layer = exact_layer(pattern_of("random", (96, 64), (32, 32)))
    served, x = layer.quantize(), inputs(layer, 6)
    strided = torch.stack([served.scales, served.scales], 1)[:, 0]
    values = served.values.repeat_interleave(2, 2)[:, :, ::2]
    y = ops.forward_int8(x.T.contiguous().T, values, strided, served._index, served.bias, 96)
    assert torch.equal(y, layer(x).detach())


def test_the_op_has_no_gradients():
    operands = {**OPERANDS, "input": torch.ones(5, 96, requires_grad=True)}
    with pytest.raises(RuntimeError, match="forward_int8: has no gradients"):
        ops.forward_int8(*operands.values())


def test_explain_needs_the_dtype_of_the_input():
    explain = torch.ops.block_sparse.explain
    values = OPERANDS["values"]
    with pytest.raises(ValueError, match="values: are int8"):
        explain(values, "forward", 1, 64, 96, False)
    text = explain(values, "grad_input", 1, 64, 96, False, input=torch.ones(0))
    assert text.count("reads int8 values in forward only") == len(kernel_names())
