"""Layers with int8 values: exact where they can be, within half a scale where not, and what they
refuse. Those of a GPU are at the end; C++ runs every kernel of the CPU (int8_test.cpp)."""

import copy
import io
import math
import warnings

import pytest
import torch
from torch import nn

from pytorch_block_sparse import (
    BlockSparseLinear,
    BlockSparseModelPatcher,
    Pattern,
    QuantizedBlockSparseLinear,
    ops,
    quantize_,
)
from pytorch_block_sparse.matrix import zero_outside_
from pytorch_block_sparse.testing import assert_close_to_float64, chosen_kernel, kernel_names
from zoo import BLOCK_SHAPES, DTYPES, block_id, dtype_id, normal, pattern_of, small_integers, zoo

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
each_block = pytest.mark.parametrize("block_shape", [*BLOCK_SHAPES, (1, 1)], ids=block_id)


def exact_layer(pattern, *, bias=True, dtype=torch.float32, device="cpu"):
    """A layer whose int8 values are its values, with scales that are powers of two.

    In each row the largest magnitude is 127 times the scale.
    """
    out_features, in_features = pattern.shape
    layer = BlockSparseLinear(
        in_features, out_features, bias=bias, pattern=pattern, dtype=dtype, device=device
    )
    block_out = pattern.block_shape[0]
    scale = torch.exp2(torch.arange(-2.0, 2.0)).repeat(pattern.grid[0] * block_out)
    scale = scale[: pattern.grid[0] * block_out].view(-1, block_out)
    with torch.no_grad():
        values = small_integers(*layer.values.shape)
        first = pattern.crow_indices[:-1].cpu()[torch.diff(pattern.crow_indices.cpu()) > 0]
        values[first.long(), :, 0] = 127.0
        rows = pattern.row_indices.long().cpu()
        layer.values.copy_(values * scale[rows][:, :, None])
        zero_outside_(layer.values, layer.pattern)
        if bias:
            layer.bias.copy_(small_integers(out_features, seed=1))
    return layer


def inputs(layer, *leading, dtype=torch.float32):
    """Small integers, and few of them where sums must stay exact in sixteen bits."""
    x = small_integers(*leading, layer.in_features, dtype=dtype, seed=2)
    return x.to(layer.values.device)


def layer_of_normals(pattern, dtype=torch.float32, **kwargs):
    layer = BlockSparseLinear(*pattern.shape[::-1], pattern=pattern, dtype=dtype, **kwargs)
    with torch.no_grad():
        layer.values.mul_(normal(*layer.values.shape, dtype=dtype).to(layer.values.device))
    return layer


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


# --- its memory -----------------------------------------------------------------------------------


def test_a_sixteenth_of_dense_float32():
    dense = nn.Linear(1024, 2048)
    served = BlockSparseLinear.from_dense(dense, density=0.25).quantize()
    tensors = [*served.parameters(), *served.buffers()]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    per_output = 4 * 2 * 2048  # scale and bias
    indices = 4 * (64 * 32 // 4 * 5 + 2 * 65 + 33)
    assert sum(sizes.values()) == 4 * dense.weight.numel() // 16 + per_output + indices
    assert indices < 0.03 * served.values.numel()


# --- moves, copies, checkpoints -------------------------------------------------------------------


def served_layer(density=0.4, seed=0, **kwargs):
    torch.manual_seed(seed)
    return BlockSparseLinear(160, 96, density=density, **kwargs).quantize()


def same(first, second):
    x = torch.randn(5, 160, dtype=next(iter([first.bias, second.bias])).dtype)
    return torch.equal(first(x), second(x))


def test_casts_change_the_bias_alone():
    served = served_layer()
    before = copy.deepcopy(served)
    for cast in (
        served.half,
        served.bfloat16,
        served.double,
        lambda: served.type(torch.float64),
        lambda: served.to(torch.float16),
        served.float,
    ):
        cast()
        assert served.values.dtype == torch.int8 and served._index.dtype == torch.int32
        assert torch.equal(served.scales, before.scales) and served.scales.dtype == torch.float32
    assert torch.equal(served.values, before.values)
    assert served.type(torch.float64).bias.dtype == torch.float64


def test_the_meta_device_and_back():
    served = served_layer()
    other = copy.deepcopy(served).to("meta")
    assert other.values.is_meta and other.scales.is_meta
    other.to_empty(device="cpu").load_state_dict(served.state_dict())
    assert same(other, served)
    on_meta = BlockSparseLinear(160, 96, density=0.4, device="meta").quantize()
    assert on_meta.dequantize().values.is_meta
    on_meta.load_state_dict(served.state_dict(), assign=True)
    assert same(on_meta, served)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_goes_through_a_file_into_a_layer_of_another_pattern(assign):
    served = served_layer()
    file = io.BytesIO()
    torch.save(nn.Sequential(served).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert list(state) == [
        f"0.{name}" for name in ("values", "scales", "bias", "crow_indices", "col_indices")
    ]
    other = served_layer(density=0.7, seed=1)
    result = nn.Sequential(other).load_state_dict(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert same(other, served) and other.pattern.equal(served.pattern)


def test_copies():
    served = served_layer()
    file = io.BytesIO()
    torch.save(served, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False), served)
    assert same(copy.deepcopy(served), served)
    assert served.share_memory().values.is_shared()


def test_it_does_not_follow_the_layer():
    layer = BlockSparseLinear(64, 64, density=0.5)
    served, x = layer.quantize(), torch.randn(2, 64)
    wanted = served(x)
    with torch.no_grad():
        layer.values.zero_()
        layer.bias.zero_()
        layer.col_indices.zero_()
    assert torch.equal(served(x), wanted)
    assert layer.quantize().dequantize().values.data_ptr() != layer.values.data_ptr()


def hostile(name, change):
    state = served_layer().state_dict()
    tensor = state[name].clone()
    state[name] = change(tensor)
    return state


def put(at, value):
    def change(tensor):
        tensor.flatten()[at] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("values", lambda t: t.float(), "values: must be torch.int8, .*got torch.float32"),
        ("values", lambda t: t.to(torch.uint8), "values: must be torch.int8"),
        ("values", lambda t: t[1:], r"values: must be \[6, 32, 32\]"),
        ("values", lambda t: t.flatten(), "values: must be"),
        ("values", lambda t: [1, 2], "values: must be a tensor, got list"),
        ("values", lambda t: t.to("meta"), "values: must be .*with numbers"),
        ("scales", lambda t: t.double(), "scales: must be torch.float32"),
        ("scales", lambda t: t[1:], r"scales: must be \[96\], got \[95\]"),
        ("scales", lambda t: t[:, None], r"scales: must be \[96\]"),
        ("scales", put(7, math.nan), "scales: must be finite and not negative, got nan for .* 7"),
        ("scales", put(95, math.inf), "scales: must be finite and not negative, got inf"),
        ("scales", put(0, -1.0), "scales: must be finite and not negative, got -1.0 for output 0"),
        ("bias", lambda t: t.to(torch.int8), "bias: must be floating point"),
        ("bias", lambda t: t[1:], "bias: must be"),
        ("col_indices", put(0, 5), "col_indices"),
        ("col_indices", put(0, -1), "col_indices"),
        ("crow_indices", put(1, 99), "crow_indices"),
        ("crow_indices", lambda t: t.float(), "crow_indices"),
    ],
)
def test_a_hostile_state_dict_changes_nothing(name, change, message):
    served, other = served_layer(seed=3), served_layer(seed=3)
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(hostile(name, change))
    assert same(other, served) and other.pattern.equal(served.pattern)


def test_a_state_dict_without_scales_is_not_loaded_in_part():
    served, other = served_layer(seed=3), served_layer(seed=3)
    state = served_layer().state_dict()
    del state["scales"]
    assert other.load_state_dict(state, strict=False).missing_keys
    assert torch.equal(other.values, served.values)
    assert torch.equal(other.scales, served.scales) and other.pattern.equal(served.pattern)
    with pytest.raises(RuntimeError, match=r'Missing.*"scales"'):
        other.load_state_dict(state)


def test_a_layer_and_its_quantized_form_do_not_load_each_other():
    layer = BlockSparseLinear(160, 96)
    with pytest.raises(RuntimeError, match=r"values: must be floating point.*int8"):
        layer.load_state_dict(served_layer().state_dict())
    with pytest.raises(RuntimeError, match=r'Missing.*"scales"'):
        served_layer().load_state_dict(layer.state_dict())


# --- what it refuses ------------------------------------------------------------------------------


def test_it_is_never_trained():
    served = served_layer()
    assert not list(served.parameters()) and not served.training
    x = torch.randn(3, 160)
    with pytest.raises(RuntimeError, match=r"input requires a gradient.*dequantize\(\)"):
        served(x.requires_grad_())
    with pytest.raises(RuntimeError, match=r"Quantized.*in training mode.*inference_mode"):
        served.train()(x.detach())
    with torch.no_grad():
        served(x)
    with pytest.raises(RuntimeError, match="never trained"):
        served.requires_grad_()
    assert served.requires_grad_(False) is served
    with pytest.raises(RuntimeError, match="no derivatives"):
        torch.func.jvp(served.eval(), (x.detach(),), (x.detach(),))
    with pytest.raises(ValueError, match="in_features=160"):
        served(torch.randn(3, 161))
    trained = served.dequantize()
    trained(x).sum().backward()
    assert trained.values.grad is not None


def test_what_cannot_be_quantized():
    with pytest.raises(TypeError, match="layer: must be a BlockSparseLinear, got Linear"):
        QuantizedBlockSparseLinear(nn.Linear(3, 3))
    layer = BlockSparseLinear(64, 64)
    layer(torch.randn(2, 64)).sum().backward()
    with pytest.raises(RuntimeError, match="values: has a gradient pending, and a quantized"):
        layer.quantize()
    layer.zero_grad()
    layer.quantize()
    for value, dtype in [(math.nan, None), (-math.inf, None), (1e300, torch.float64)]:
        layer = BlockSparseLinear(64, 64, dtype=dtype)
        layer.values.data[1, 3, 4] = value
        with pytest.raises(ValueError, match=r"values: must be finite.*block 1"):
            layer.quantize()
    with pytest.raises(TypeError, match="dtype: must be one of"):
        served_layer().dequantize(torch.int8)
    with pytest.raises(TypeError, match="dtype: must be one of"):
        served_layer().explain(3, torch.int8)


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


# --- models ---------------------------------------------------------------------------------------


def patched_model():
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Sequential(nn.Linear(128, 64)), nn.Linear(64, 8)
    )
    patcher = BlockSparseModelPatcher()
    patcher.add_pattern(r"0|2\.0", {"density": 0.5})
    patcher.patch_model(model)
    return model.eval()


def test_quantize_replaces_the_block_sparse_layers():
    model = patched_model()
    x = torch.randn(5, 64)
    with torch.inference_mode():
        wanted = model(x)
        assert quantize_(model) == ["0", "2.0"]
        assert isinstance(model[0], QuantizedBlockSparseLinear) and type(model[3]) is nn.Linear
        assert torch.allclose(model(x), wanted, atol=0.02) and not torch.equal(model(x), wanted)
    assert quantize_(model) == []


def test_a_shared_layer_stays_shared():
    layer = BlockSparseLinear(64, 64)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    assert quantize_(model) == ["a"]
    assert model["a"] is model["b"][0]


def test_what_quantize_refuses_changes_nothing():
    with pytest.raises(ValueError, match=r"model: is a BlockSparseLinear itself.*quantize\(\)"):
        quantize_(BlockSparseLinear(64, 64))
    model = patched_model()
    model[2][0].values.data[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"2\.0: values: must be finite"):
        quantize_(model)
    model[2][0].values.data.zero_()
    model[2][0].bias.grad = torch.zeros(64)
    with pytest.raises(RuntimeError, match=r"2\.0: bias: has a gradient pending"):
        quantize_(model)
    assert type(model[0]) is BlockSparseLinear


def test_a_layer_with_hooks_is_left_alone():
    model = patched_model()
    model[0].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="0: left as it is, since it carries hooks"):
        assert quantize_(model) == ["2.0"]


def test_the_state_dict_of_a_quantized_model():
    model, other = patched_model(), patched_model()
    quantize_(model)
    quantize_(other)
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 64)
    with torch.inference_mode():
        assert torch.equal(other(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))


def test_quantize_of_torchao_takes_the_dense_layers_and_leaves_these():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        model = patched_model()
        x = torch.randn(3, 64)
        with torch.inference_mode():
            wanted = model(x)
            quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
            assert type(model[0]) is BlockSparseLinear and type(model[0].values) is nn.Parameter
            assert type(model[3].weight) is not nn.Parameter
            assert quantize_(model) == ["0", "2.0"]
            assert torch.allclose(model(x), wanted, atol=0.05)


# --- on a GPU -------------------------------------------------------------------------------------

CUDA_BLOCKS = [*BLOCK_SHAPES, (64, 64), (128, 64), (32, 16), (16, 32)]


@pytest.mark.cuda
@each_dtype
@pytest.mark.parametrize("block_shape", CUDA_BLOCKS, ids=block_id)
def test_on_a_gpu_it_is_exact(block_shape, dtype):
    for kind in ("random", "empty_row", "skewed", "full", "one_block", "no_block"):
        pattern = pattern_of(kind, (328, 456), block_shape)
        layer = exact_layer(pattern, dtype=torch.float64)
        served = layer.quantize().to(dtype)
        on_gpu = copy.deepcopy(served).to("cuda")
        for tokens in (0, 1, 3, 8, 9, 16, 33, 64, 65, 200):
            x = inputs(layer, tokens, dtype=torch.float64)
            y = on_gpu(x.to("cuda", dtype))
            assert torch.equal(y.cpu(), layer(x).detach().to(dtype)), (kind, tokens)


@pytest.mark.cuda
@each_dtype
def test_on_a_gpu_each_kernel_that_takes_it(dtype, force_kernel):
    layer = exact_layer(pattern_of("random", (256, 320), (32, 32)), dtype=torch.float64)
    served = layer.quantize().to(dtype).to("cuda")
    taken = set()
    for kernel in kernel_names("cuda"):
        for tokens in (3, 40, 130):
            if f"{kernel}: refuses" in served.explain(tokens):
                continue
            force_kernel(kernel)
            x = inputs(layer, tokens, dtype=torch.float64)
            assert torch.equal(served(x.to("cuda", dtype)).cpu(), layer(x).detach().to(dtype))
            force_kernel("")
            taken.add(kernel)
    assert taken >= {"cuda_tiled", "cuda_reference"}
    assert ("cuda_skinny" in taken) == (dtype != torch.float64)


@pytest.mark.cuda
@each_dtype
def test_on_a_gpu_it_is_as_close_as_torch(dtype):
    for tokens in (1, 7, 33, 200):
        layer = layer_of_normals(pattern_of("random", (512, 768), (32, 32)), dtype)
        served = layer.quantize()
        x = normal(tokens, 768, dtype=dtype)
        with torch.inference_mode():
            exact = served.dequantize(torch.float64)(x.double())
            dense = served.dequantize(dtype).to_dense().to("cuda")
            y = copy.deepcopy(served).to("cuda")(x.to("cuda"))
            assert_close_to_float64(y.cpu(), exact, dense(x.to("cuda")).cpu())


@pytest.mark.cuda
def test_on_a_gpu_few_tokens_take_the_kernel_that_reads_weights_once():
    served = served_layer(dtype=torch.bfloat16).to("cuda")
    assert chosen_kernel(served.explain(1))[0] == "cuda_skinny"
    assert chosen_kernel(served.explain(65))[0] == "cuda_tiled"
    assert served.values.device.type == "cuda"


@pytest.mark.cuda
def test_in_a_cuda_graph():
    served = served_layer(dtype=torch.bfloat16).to("cuda")
    x = torch.randn(4, 160, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        served(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = served(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, served(x))
