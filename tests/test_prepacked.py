"""PrepackedLinear: the same numbers as the layer, one copy of the values, and what it refuses."""

import copy
import io

import pytest
import torch
from torch import nn

from pytorch_block_sparse import BlockSparseLinear, Pattern, PrepackedLinear, ops
from pytorch_block_sparse.optim import update_pattern_
from pytorch_block_sparse.pattern import split_index
from zoo import BLOCK_SHAPES, DTYPES, block_id, dtype_id, small_integers, zoo

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


def integer_layer(out_features=96, in_features=160, *, dtype=torch.float32, **kwargs):
    """A layer whose products are exact in any order."""
    layer = BlockSparseLinear(in_features, out_features, dtype=dtype, **kwargs)
    with torch.no_grad():
        layer.values.copy_(small_integers(*layer.values.shape, dtype=dtype))
        if layer.bias is not None:
            layer.bias.copy_(small_integers(out_features, dtype=dtype, seed=1))
    return layer


def inputs(layer, *leading):
    size = (*leading, layer.in_features)
    return small_integers(*size, dtype=next(iter(layer.state_dict().values())).dtype, seed=2)


@torch.inference_mode()
def same(served, layer, *leading):
    x = inputs(layer, *(leading or (5,)))
    return torch.equal(served(x), layer(x))


# --- what it computes -----------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("block_shape", [*BLOCK_SHAPES, (16, 7), (1, 1)], ids=block_id)
def test_it_computes_what_the_layer_does(block_shape, dtype):
    for name, pattern in zoo(block_shape):
        layer = integer_layer(*pattern.shape, dtype=dtype, pattern=pattern)
        served = layer.prepack()
        for leading in [(), (0,), (1,), (3,), (16,), (2, 33)]:
            assert same(served, layer, *leading), (name, leading)


def test_one_wrong_value_shows():
    layer = integer_layer()
    served = layer.prepack()
    served._packed[0, 0] += 1
    assert not same(served, layer)


def test_without_bias_and_under_compile():
    layer = integer_layer(bias=False, density=0.5)
    served = layer.prepack()
    assert same(served, layer)
    assert same(torch.compile(served, fullgraph=True, dynamic=True), layer)


def test_vmap():
    layer = integer_layer()
    x = inputs(layer, 3, 5)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(layer.prepack())(x), layer(x))


def test_autocast_casts_the_input_to_the_dtype_of_the_values():
    layer = integer_layer(dtype=torch.bfloat16)
    served, x = layer.prepack(), inputs(layer, 5)
    with torch.inference_mode():
        wanted = layer(x)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(served(x.float()), wanted)


def test_explain_says_that_the_values_are_packed():
    text = integer_layer().prepack().explain(tokens=2)
    assert " packed" in text and "cpu_panel: chosen" in text


# --- one copy, and back ---------------------------------------------------------------------------


def test_it_holds_the_values_once():
    layer = integer_layer(512, 512, density=0.25)
    served = layer.prepack()
    values = layer.values.numel() * 4
    tensors = [*served.parameters(), *served.buffers()]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert values <= sum(sizes.values()) < 1.1 * values
    assert served._packed.data_ptr() != layer.values.data_ptr()


@each_dtype
@pytest.mark.parametrize("block_shape", BLOCK_SHAPES, ids=block_id)
def test_unpack_gives_the_layer(block_shape, dtype):
    layer = integer_layer(dtype=dtype, block_shape=block_shape, density=0.4)
    back = layer.prepack().unpack()
    assert torch.equal(back.values, layer.values) and torch.equal(back.bias, layer.bias)
    assert back.pattern.equal(layer.pattern)
    assert back._index.data_ptr() != layer._index.data_ptr()
    x = inputs(layer, 4)
    back(x).sum().backward()
    assert back.values.grad is not None and back.bias.grad is not None


def test_the_state_dict_is_that_of_the_layer():
    layer = integer_layer(density=0.4)
    state, wanted = layer.prepack().state_dict(), layer.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    other = BlockSparseLinear(160, 96, density=0.7)
    other.load_state_dict(state)
    assert same(other, layer)


@pytest.mark.parametrize("assign", [False, True])
def test_it_loads_the_state_dict_of_a_layer(assign):
    layer = integer_layer(density=0.4)
    served = BlockSparseLinear(160, 96, density=0.7).prepack()
    result = nn.Sequential(served).load_state_dict(nn.Sequential(layer).state_dict(), assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert same(served, layer) and served.pattern.equal(layer.pattern)


def test_a_state_dict_that_does_not_fit_changes_nothing():
    layer = integer_layer()
    served = layer.prepack()
    state = BlockSparseLinear(160, 128).state_dict()
    with pytest.raises(RuntimeError, match="crow_indices"):
        served.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing.*"bias"'):
        served.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "bias"})
    assert same(served, layer)


def test_casts_and_copies():
    layer = integer_layer()
    served = layer.prepack()
    assert same(copy.deepcopy(served).bfloat16(), copy.deepcopy(layer).bfloat16())
    file = io.BytesIO()
    torch.save(served, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False), layer)
    assert served.to(torch.float64)._packed.dtype == torch.float64
    assert served._index.dtype == torch.int32
    assert same(served, layer.double())
    assert served.share_memory()._packed.is_shared()


def test_in_a_model_in_training_mode_it_still_serves():
    layer = integer_layer()
    model = nn.Sequential(layer.prepack()).train()
    assert same(model, layer)


# --- what it refuses ------------------------------------------------------------------------------


def test_it_is_never_trained():
    served = integer_layer().prepack()
    assert not list(served.parameters()) and not served.training
    x = inputs(served, 3)
    served(x)
    with pytest.raises(RuntimeError, match=r"input requires a gradient.*unpack\(\)"):
        served(x.requires_grad_())
    with torch.no_grad():
        served(x)
    with pytest.raises(RuntimeError, match=r"in training mode.*inference_mode"):
        served.train()(x.detach())
    with pytest.raises(RuntimeError, match="never trained"):
        served.requires_grad_()
    assert served.requires_grad_(False) is served
    with pytest.raises(RuntimeError, match="no derivatives"):
        torch.func.jvp(served.eval(), (x.detach(),), (x.detach(),))


def test_the_op_has_no_gradients():
    layer = integer_layer()
    served, x = layer.prepack(), inputs(layer, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="forward_packed: has no gradients"):
        ops.forward_packed(x, served._packed, served._index, None, 96, 32, 32)


@pytest.mark.parametrize("name", ["values", "bias"])
def test_a_pending_gradient_is_an_error(name):
    layer = integer_layer()
    getattr(layer, name).grad = torch.zeros_like(getattr(layer, name))
    with pytest.raises(RuntimeError, match=rf"{name}: has a gradient pending.*zero_grad"):
        layer.prepack()
    layer.zero_grad()
    layer.prepack()


def test_a_pattern_that_changed_is_an_error_everywhere():
    pattern = Pattern.from_blocks([(0, 0), (1, 1)], (64, 64))
    layer = BlockSparseLinear(64, 64, pattern=pattern)
    served = layer.prepack()
    kept = copy.deepcopy(served)
    update_pattern_(layer, drop=[(0, 0)], grow=[(1, 0)])
    x = torch.randn(2, 64)
    for call in (
        lambda: served(x),
        served.unpack,
        served.state_dict,
        served.double,
        lambda: copy.deepcopy(served),
    ):
        with pytest.raises(RuntimeError, match=r"changed in place after prepack\(\)"):
            call()
    kept(x)
    assert layer.prepack()(x).shape == (2, 64)


def test_a_layer_of_inference_mode_shares_nothing_that_torch_does_not_watch():
    with torch.inference_mode():
        layer = integer_layer()
        served = layer.prepack()
        layer._index.zero_()
        assert served._index.any()


def test_where_it_cannot_be():
    with pytest.raises(TypeError, match="layer: must be a BlockSparseLinear, got Linear"):
        PrepackedLinear(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="layer: is on meta"):
        BlockSparseLinear(64, 64, device="meta").prepack()
    served = integer_layer().prepack()
    with pytest.raises(ValueError, match="layer: is on meta"):
        served.to("meta")
    assert served._packed.device.type == "cpu"


@pytest.mark.parametrize(
    ("packed", "block", "message"),
    [
        (torch.zeros(2, 32, 32), (32, 32), "packed: must be .*32 . 32"),
        (torch.zeros(2, 1024), (32, 16), "packed: must be"),
        (torch.zeros(2, 1024), (0, 32), "block_out: a block must have"),
        (torch.zeros(2, 1024, dtype=torch.int32), (32, 32), "packed: dtype"),
    ],
)
def test_packed_values_that_do_not_fit(packed, block, message):
    with pytest.raises(ValueError, match=message):
        ops.unpack(packed, *block)


def test_the_index_of_another_pattern_is_an_error():
    layer = integer_layer(64, 64, density=0.5)
    other = Pattern.full((64, 64))
    with pytest.raises(ValueError, match="index: has"):
        ops.forward_packed(
            torch.zeros(2, 64), layer.prepack()._packed, other.index, None, 64, 32, 32
        )
    assert split_index(layer._index, (2, 2), 2).crow_indices[-1] == 2
