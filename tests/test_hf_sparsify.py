"""A dense checkpoint that becomes block sparse while from_pretrained loads it."""

import contextlib
import gc
import warnings
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from hf_helpers import FAMILIES, bert, families, gpt2, llama, logits, make, patch, sparse_layers  # noqa: E402
from pytorch_block_sparse import BlockSparseLinear, BlockSparseModelPatcher  # noqa: E402
from pytorch_block_sparse.integrations import BlockSparseConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def rules(model, density=0.5):
    """All layers that can be patched, by name."""
    options = {"density": density, "block_shape": (16, 16)}
    layers = BlockSparseModelPatcher().get_patchable_layers(model)
    return {entry["regexp"]: options for entry in layers}


def sparsified(model, folder, config=None, **options):
    """`model` saved dense, and loaded sparse."""
    config = BlockSparseConfig(rules(model)) if config is None else config
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return type(model).from_pretrained(folder, quantization_config=config, **options)


@families
def test_gives_what_patching_gives(family, tmp_path):
    model = make(family)
    loaded = sparsified(model, tmp_path)
    patch(model, 0.5)
    ours, theirs = sparse_layers(loaded), sparse_layers(model)
    assert ours.keys() == theirs.keys() and len(ours) == FAMILIES[family]
    for name, layer in ours.items():
        assert layer.pattern.equal(theirs[name].pattern), name
        assert torch.equal(layer.values, theirs[name].values), name
        assert not layer.values.is_meta and layer.values.requires_grad
    assert torch.equal(logits(loaded), logits(model))


@families
def test_then_saves_and_loads_as_any_sparse_model(family, tmp_path):
    loaded = sparsified(make(family), tmp_path / "dense", dtype=torch.bfloat16)
    assert not getattr(loaded, "is_quantized", False)
    assert not loaded.config.quantization_config.rules
    loaded.save_pretrained(tmp_path / "sparse")
    again = type(loaded).from_pretrained(tmp_path / "sparse", dtype=torch.bfloat16)
    assert len(sparse_layers(again)) == FAMILIES[family]
    assert torch.equal(logits(again), logits(loaded))


def test_one_dense_weight_at_a_time(tmp_path, monkeypatch):
    """Peak memory: never two dense weights of those that become sparse."""
    plain = BlockSparseLinear.from_dense.__func__
    alive, most = [], []

    def from_dense(cls, linear, *args, **options):
        gc.collect()
        alive.append(weakref.ref(linear.weight))
        most.append(sum(ref() is not None for ref in alive))
        return plain(cls, linear, *args, **options)

    monkeypatch.setattr(BlockSparseLinear, "from_dense", classmethod(from_dense))
    sparsified(make(llama), tmp_path)
    assert len(most) == FAMILIES[llama]
    assert max(most) == 1


def test_a_rule_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="matches the full name of no linear layer; near"):
        sparsified(make(llama), tmp_path, BlockSparseConfig({r"model\.layer\.0": {}}))


def test_a_tied_layer_is_left_alone_with_a_warning(tmp_path):
    model = make(bert)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="left as it is, since its weight is tied"):
        loaded = type(model).from_pretrained(
            tmp_path, quantization_config=BlockSparseConfig({".*": {"block_shape": (16, 16)}})
        )
    assert len(sparse_layers(loaded)) == FAMILIES[bert]
    assert loaded.cls.predictions.decoder.weight is loaded.get_input_embeddings().weight


def test_weights_that_are_not_in_the_checkpoint(tmp_path):
    """A new head: drawn by transformers, then made sparse. Never left as memory was."""
    model = make(bert)
    model.save_pretrained(tmp_path)
    names = {r"bert\..*\.dense": {"block_shape": (16, 16)}, "classifier": {"block_shape": (1, 16)}}
    loaded = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path, quantization_config=BlockSparseConfig(names)
    )
    head = loaded.classifier
    assert type(head) is BlockSparseLinear and head.density == 0.5
    assert 0 < head.values.abs().max() < 1 and not head.bias.any()
    assert loaded.config.quantization_config.layers["classifier"] == (1, 16)


@pytest.mark.parametrize("family", [bert, gpt2], ids=["bert", "gpt2"])
def test_a_bias_that_is_not_in_the_checkpoint_is_zero(family, tmp_path, monkeypatch):
    model = make(family)
    wanted = rules(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    layer = next(iter(sparse_names(wanted)))
    gone = [key for key in state if key.endswith(f"{layer}.bias")]
    assert len(gone) == 1
    save_file({k: t for k, t in state.items() if k not in gone}, file, metadata={"format": "pt"})
    monkeypatch.setattr(torch, "empty_like", torch.ones_like)  # memory that was in use before
    loaded = type(model).from_pretrained(tmp_path, quantization_config=BlockSparseConfig(wanted))
    assert not loaded.get_submodule(layer).bias.any()


def sparse_names(wanted):
    return [regexp.replace("\\", "") for regexp in wanted]


def test_a_weight_of_another_shape_is_an_error(tmp_path):
    model = make(llama)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    key = "model.layers.0.mlp.up_proj.weight"
    state[key] = state[key][:64].contiguous()
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError)), contextlib.redirect_stdout(None):
        type(model).from_pretrained(tmp_path, quantization_config=BlockSparseConfig(rules(model)))


def test_rules_for_a_checkpoint_that_is_sparse_already_are_not_used(tmp_path):
    model = make(llama)
    patch(model, 0.25)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        loaded = type(model).from_pretrained(
            tmp_path, quantization_config=BlockSparseConfig({".*": {"density": 1.0}})
        )
    assert torch.equal(logits(loaded), logits(model))


def test_no_layers_on_the_disk(tmp_path):
    model = make(llama)
    config = BlockSparseConfig(rules(model))
    model.save_pretrained(tmp_path / "dense")
    patch(model, 0.5)
    model.save_pretrained(tmp_path / "sparse")
    for folder, options in (("dense", {"quantization_config": config}), ("sparse", {})):
        with pytest.raises(ValueError, match="block-sparse layers cannot be offloaded to the disk"):
            type(model).from_pretrained(tmp_path / folder, device_map={"": "disk"}, **options)
