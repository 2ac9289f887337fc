"""transformers with int8 layers: save_pretrained, from_pretrained, the same model again."""

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from hf_helpers import bert, gpt2, llama, logits, make, patch, t5
from pytorch_block_sparse import QuantizedBlockSparseLinear, quantize_

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(family, folder, dtype=torch.float32):
    model = make(family)
    patch(model, 0.5)
    quantize_(model.to(dtype))
    model.save_pretrained(folder)
    return model


def quantized(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedBlockSparseLinear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [bert, gpt2, llama, t5], ids=lambda family: family.__name__)
def test_saved_and_loaded(family, dtype, tmp_path):
    model = saved(family, tmp_path, dtype)
    again = type(model).from_pretrained(tmp_path, dtype=dtype)
    layers, wanted = quantized(again), quantized(model)
    assert list(layers) == list(wanted) and len(layers) > 7
    for name, layer in layers.items():
        assert layer.values.dtype == torch.int8 and torch.equal(layer.values, wanted[name].values)
        assert torch.equal(layer.scales, wanted[name].scales), name
        assert layer.pattern.equal(wanted[name].pattern)
    if dtype == torch.float32:  # a cast of the model casts buffers that from_pretrained does not
        assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    third = type(model).from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(logits(third), logits(again))


def drop(tensors, key):
    del tensors[key]


def negative(tensors, key):
    tensors[key][3] = -1


def not_a_number(tensors, key):
    tensors[key][3] = float("nan")


def half(tensors, key):
    tensors[key] = tensors[key].half()


def short(tensors, key):
    tensors[key] = tensors[key][:-1].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "lacks scales"),
        (negative, "scales: must be finite and not negative, got -1.0"),
        (not_a_number, "scales: must be finite and not negative, got nan"),
        (half, "scales: must be F32, got F16"),
        (short, r"scales: must be \[\d+\]"),
    ],
)
def test_scales_that_are_wrong(change, message, tmp_path):
    model = saved(bert, tmp_path)
    name = next(iter(quantized(model)))
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors, f"{name}.scales")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"checkpoint: {name}: {message}"):
        type(model).from_pretrained(tmp_path)
