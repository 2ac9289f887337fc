"""Block-sparse models of transformers: save_pretrained, from_pretrained, the same model again."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402

from hf_helpers import (  # noqa: E402
    FAMILIES,
    batch,
    bert,
    families,
    gpt2,
    llama,
    logits,
    losses,
    make,
    patch,
    sparse_layers,
    t5,
    trainer,
)
from pytorch_block_sparse import BlockSparseLinear, Pattern  # noqa: E402
from pytorch_block_sparse.integrations import BlockSparseConfig, record_layers  # noqa: E402
from pytorch_block_sparse.optim import compact_, update_pattern_  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

AUTO = {
    "bert": "AutoModelForMaskedLM",
    "roberta": "AutoModelForMaskedLM",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "qwen2": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
}


def saved(family, folder, density=0.5, **options):
    """A patched model, saved into `folder`."""
    model = make(family)
    patch(model, density)
    model.save_pretrained(folder, **options)
    return model


def load(family_or_model, folder, **options):
    cls = type(family_or_model)
    return cls.from_pretrained(folder, **options)


def same(one, other):
    """Values, biases and patterns, all to the bit."""
    ours, theirs = sparse_layers(one), sparse_layers(other)
    assert ours.keys() == theirs.keys() and ours
    for name, layer in ours.items():
        assert layer.pattern.equal(theirs[name].pattern), name
        assert torch.equal(layer.pattern.index, theirs[name].pattern.index), name
        assert torch.equal(layer.values, theirs[name].values), name
        assert layer.crow_indices.dtype == layer.col_indices.dtype == torch.int32
        assert (layer.bias is None) == (theirs[name].bias is None)
    assert torch.equal(logits(one), logits(other))


def test_round_trip_in_a_fresh_process(tmp_path):
    wanted = {}
    for family in FAMILIES:
        for shards in ("one", "many"):
            folder = tmp_path / f"{family.__name__}-{shards}"
            size = "50GB" if shards == "one" else "60KB"
            wanted[folder] = logits(saved(family, folder / "model", max_shard_size=size))
            (folder / "auto.txt").write_text(AUTO[family.__name__])
            files = list((folder / "model").glob("*.safetensors"))
            assert (len(files) > 2) == (shards == "many")
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, *(["-P"] if sys.flags.safe_path else []), here / "hf_load.py", tmp_path],
        check=True,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")]),
        },
    )
    for folder, expected in wanted.items():
        assert torch.equal(torch.load(folder / "logits.pt"), expected), folder.name


@families
def test_an_int32_index_stays_one_in_any_dtype(family, tmp_path):
    model = saved(family, tmp_path)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        loaded = load(model, tmp_path, dtype=dtype)
        for name, layer in sparse_layers(loaded).items():
            kept = family is t5 and dtype == torch.float16 and name.endswith("wo")  # T5 wants it
            assert layer.values.dtype == (torch.float32 if kept else dtype), name
            assert layer.crow_indices.dtype == layer.col_indices.dtype == torch.int32, name
            assert layer.pattern.index.dtype == torch.int32
            assert layer.pattern.equal(model.get_submodule(name).pattern), name
        assert logits(loaded).isfinite().all()


def test_dtype_auto_is_that_of_the_checkpoint(tmp_path):
    model = make(bert)
    patch(model, 0.5)
    model.bfloat16().save_pretrained(tmp_path)
    loaded = load(model, tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    same(loaded, model)


def test_the_config_names_the_layers_and_no_counts(tmp_path):
    saved(gpt2, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "block_sparse" and config["format"] == 1
    assert config.keys() == {"quant_method", "format", "layers"}
    assert config["layers"]["transformer.h.0.mlp.c_fc"] == [16, 16]
    assert len(config["layers"]) == FAMILIES[gpt2]


def test_counts_come_from_the_headers_after_compaction_and_updates(tmp_path):
    model = make(llama)
    patch(model, 0.5)
    first, *_, last = sparse_layers(model).values()
    norm = first.weight.block_norm()
    compact_(first, norm > norm.median())
    blocks = last.pattern.mask()
    drop, grow = blocks.nonzero()[:2], (~blocks).nonzero()[:2]
    update_pattern_(last, drop, grow)
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path)
    assert next(iter(sparse_layers(loaded).values())).block_count == first.block_count
    same(loaded, model)


def test_another_block_shape_and_a_size_that_is_no_multiple(tmp_path):
    model = make(bert)
    layer = model.bert.encoder.layer[0].intermediate.dense
    sparse = BlockSparseLinear.from_dense(layer, 0.5, (48, 24))  # 128 x 64: both reach outside
    model.bert.encoder.layer[0].intermediate.dense = sparse
    record_layers(model)
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path)
    assert loaded.bert.encoder.layer[0].intermediate.dense.block_shape == (48, 24)
    same(loaded, model)


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_the_base_model_loads_the_checkpoint_of_one_with_a_head(density, tmp_path):
    model = saved(bert, tmp_path, density)
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert type(base) is transformers.BertModel
    tokens = batch()["input_ids"]
    with torch.no_grad():
        wanted = model.bert(tokens).last_hidden_state
        assert torch.equal(base(tokens).last_hidden_state, wanted)
    base.save_pretrained(tmp_path / "base")
    again = transformers.AutoModel.from_pretrained(tmp_path / "base")
    same_layers = sparse_layers(again)
    assert len(same_layers) == FAMILIES[bert] - 1  # that of the head is not there
    with torch.no_grad():
        assert torch.equal(again(tokens).last_hidden_state, wanted)


def test_a_model_with_a_head_loads_the_checkpoint_of_the_base_model(tmp_path):
    base = make(llama).model
    patch(base, 0.5)
    assert "layers.0.mlp.up_proj" in base.config.quantization_config.layers
    base.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(
            loaded.model(tokens).last_hidden_state, base.eval()(tokens).last_hidden_state
        )
    assert len(sparse_layers(loaded)) == 14


def test_a_model_patched_in_part_and_one_made_dense_again(tmp_path):
    model = make(llama)
    patch(model, 0.5)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = mlp.up_proj.to_dense()  # the config does not know yet
    model.save_pretrained(tmp_path)
    loaded = load(model, tmp_path)
    assert type(loaded.model.layers[1].mlp.up_proj) is torch.nn.Linear
    same(loaded, model)
    assert "model.layers.1.mlp.up_proj" not in loaded.config.quantization_config.layers


def test_a_prepacked_model_saves_what_loads_as_an_ordinary_one(tmp_path):
    model = make(llama)
    patch(model, 0.5)
    served = make(llama)
    served.load_state_dict(make(llama).state_dict())
    patch(served, 0.5)
    for name, layer in sparse_layers(served).items():
        parent, _, child = name.rpartition(".")
        setattr(served.get_submodule(parent), child, layer.prepack())
    record_layers(served)
    served.save_pretrained(tmp_path)
    same(load(model, tmp_path), model)


def test_with_a_device_map(tmp_path):
    model = saved(llama, tmp_path)
    same(load(model, tmp_path, device_map="cpu"), model)


# --- what has been loaded is an ordinary model ----------------------------------------------------


@families
def test_a_loaded_model_casts_saves_and_trains(family, tmp_path):
    model = saved(family, tmp_path / "first")
    loaded = load(model, tmp_path / "first")
    modules = [m for m in loaded.modules() if isinstance(m, transformers.PreTrainedModel)]
    assert modules and not any(getattr(m, "is_quantized", False) for m in modules)
    loaded.save_pretrained(tmp_path / "second")
    again = load(model, tmp_path / "second")
    same(again, model)
    run = trainer(loaded, tmp_path, bf16=True)
    run.train()
    assert losses(run)[-1] < 0.9 * losses(run)[0]
    assert logits(again.half().float()).isfinite().all()
    assert sparse_layers(again.bfloat16()).popitem()[1].values.dtype == torch.bfloat16


def test_saving_takes_the_state_dict_that_the_caller_gives(tmp_path):
    model = saved(bert, tmp_path / "first")
    loaded = load(model, tmp_path / "first")
    state = {
        key: torch.zeros_like(t) if "values" in key else t for key, t in loaded.state_dict().items()
    }
    loaded.save_pretrained(tmp_path / "second", state_dict=state)
    zeros = load(model, tmp_path / "second")
    assert not any(layer.values.any() for layer in sparse_layers(zeros).values())


def test_the_loaded_parameters_are_trained_and_the_indices_are_not(tmp_path):
    loaded = load(saved(llama, tmp_path), tmp_path)
    layer = loaded.model.layers[0].mlp.up_proj
    assert layer.values.requires_grad and layer.values.is_leaf
    assert {name for name, _ in layer.named_parameters()} == {"values"}
    buffers = dict(layer.named_buffers())
    assert not any(b.requires_grad or b.is_meta for b in buffers.values())


def test_a_config_without_sparse_layers_has_no_method(tmp_path):
    model = make(llama)
    patch(model, 0.5)
    for name, layer in sparse_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.to_dense())
    record_layers(model)
    assert not hasattr(model.config, "quantization_config")


def test_another_method_stays_and_a_warning_says_so():
    model = make(llama)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with (
        pytest.raises(UserWarning, match="quantized by 'bitsandbytes' already"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        patch(model, 0.5)


def test_values_outside_the_matrix_become_zero(tmp_path):
    """Whoever writes a checkpoint by other means may leave numbers there."""
    from safetensors.torch import load_file, save_file

    model = make(bert)
    pattern = Pattern.full((128, 64), (48, 24))
    dense = model.bert.encoder.layer[0].intermediate.dense
    sparse = BlockSparseLinear.from_dense(dense, pattern=pattern)
    model.bert.encoder.layer[0].intermediate.dense = sparse
    record_layers(model)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = "bert.encoder.layer.0.intermediate.dense.values"
    outside = state[key] == 0
    assert outside.any()
    state[key][outside] = 7.0
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same(load(model, tmp_path), model)


def test_files_have_int32_indices(tmp_path):
    saved(t5, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as tensors:
        kinds = {
            key.rpartition(".")[2]: tensors.get_slice(key).get_dtype()
            for key in tensors.keys()  # noqa: SIM118
            if key.endswith("indices")
        }
    assert kinds == {"crow_indices": "I32", "col_indices": "I32"}


def test_the_config_survives_json():
    config = BlockSparseConfig(
        {"a": {"density": 0.5, "block_shape": (16, 16)}}, layers={"b": (8, 4)}
    )
    again = BlockSparseConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == json.loads(config.to_json_string())
    assert again.layers == {"b": (8, 4)}
