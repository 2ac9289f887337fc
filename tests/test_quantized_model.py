"""quantize_(model): which layers it replaces, which it leaves alone, and what it refuses."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from pytorch_block_sparse import (
    BlockSparseLinear,
    BlockSparseModelPatcher,
    QuantizedBlockSparseLinear,
    quantize_,
)


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
