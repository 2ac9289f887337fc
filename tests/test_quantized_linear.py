"""QuantizedBlockSparseLinear as a module: its memory, moves, copies and checkpoints, and what it
refuses."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from pytorch_block_sparse import BlockSparseLinear, QuantizedBlockSparseLinear
from quantized_helpers import served_layer


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


def same(first, second):
    x = torch.randn(5, 160, dtype=first.bias.dtype)
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
