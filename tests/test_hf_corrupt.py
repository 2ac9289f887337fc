"""Checkpoints of transformers that are broken or hostile: an error before anything is computed."""

import json
import pickle
import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from hf_helpers import llama, logits, make, patch  # noqa: E402
from pytorch_block_sparse.integrations import BlockSparseConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = "model.layers.0.mlp.up_proj"  # 128 x 64 in blocks of 16 x 16: 16 of 8 x 4 blocks


@pytest.fixture
def checkpoint(tmp_path):
    model = make(llama)
    patch(model, 0.5)
    model.save_pretrained(tmp_path)
    return tmp_path


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def rewrite(folder, change):
    """Applies `change` to the tensors of the checkpoint."""
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


def rewrite_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


def at(part, position, value):
    def change(state):
        state[f"{LAYER}.{part}"][position] = value

    return change


def instead(part, make_tensor):
    def change(state):
        key = f"{LAYER}.{part}"
        state[key] = make_tensor(state[key]).contiguous()

    return change


def without(*parts):
    def change(state):
        for part in parts:
            del state[f"{LAYER}.{part}"]

    return change


CORRUPT = {
    "column out of range": (at("col_indices", 0, 4), "col_indices"),
    "column negative": (at("col_indices", 0, -1), "col_indices"),
    "column huge": (at("col_indices", 3, 2**31 - 1), "col_indices"),
    "row pointer out of range": (at("crow_indices", -1, 17), "crow_indices"),
    "row pointer not monotone": (at("crow_indices", 2, 16), "block row"),
    "row pointer negative": (at("crow_indices", 1, -5), "crow_indices"),
    "a block twice": (instead("col_indices", torch.zeros_like), "col_indices"),
    "fewer values than indices": (instead("values", lambda t: t[:-1]), "values has 15 blocks"),
    "more values than indices": (
        instead("values", lambda t: torch.cat([t, t])),
        "values has 32 blocks",
    ),
    "fewer columns": (instead("col_indices", lambda t: t[:-1]), r"col_indices: values has 16"),
    "fewer row pointers": (instead("crow_indices", lambda t: t[:-1]), "crow_indices: has 8"),
    "another block shape": (instead("values", lambda t: t[:, :8]), "crow_indices: has 9 entries"),
    "flat values": (instead("values", torch.flatten), r"\[blocks, block_out, block_in\]"),
    "integer values": (instead("values", lambda t: t.to(torch.int16)), "values: must be BF16"),
    "int8 values alone": (instead("values", lambda t: t.to(torch.int8)), "lacks scales"),
    "float indices": (instead("col_indices", lambda t: t.float()), "col_indices: must be I32"),
    "no values": (without("values"), "lacks values"),
    "no row pointers": (without("crow_indices"), "lacks crow_indices"),
    "no columns": (without("col_indices"), "lacks col_indices"),
    "no layer at all": (without("values", "crow_indices", "col_indices"), "lacks values, crow"),
}


@pytest.mark.parametrize("change, message", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_layer_is_an_error_that_names_it(change, message, checkpoint, monkeypatch):
    rewrite(checkpoint, change)

    def computed(*args, **kwargs):
        raise AssertionError("weights were read before the checkpoint was found corrupt")

    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", computed)
    with pytest.raises(ValueError, match=f"checkpoint: {LAYER}: .*{message}"):
        load(checkpoint)


def test_the_same_change_that_does_no_harm_is_none(checkpoint):
    """So that the cases above fail for what they say."""
    before = logits(load(checkpoint))
    rewrite(checkpoint, instead("col_indices", torch.clone))
    assert torch.equal(logits(load(checkpoint)), before)


def test_int64_indices_become_int32(checkpoint):
    rewrite(checkpoint, instead("col_indices", lambda t: t.long()))
    layer = load(checkpoint).get_submodule(LAYER)
    assert layer.col_indices.dtype == torch.int32
    assert layer.pattern.index.dtype == torch.int32


CONFIGS = {
    "unknown key": ({"sparsity": 0.5}, r"unknown \['sparsity'\]"),
    "format of the future": ({"format": 2}, "format: this version .* reads up to 1, got 2"),
    "layers no dict": ({"layers": [1]}, "layers: must be a dict"),
    "block shape": ({"layers": {LAYER: [0, 16]}}, f"layers: {LAYER}: block_shape"),
    "block shape text": ({"layers": {LAYER: "16"}}, f"layers: {LAYER}: block_shape"),
    "rule": ({"rules": {"(": {}}}, "no regular expression"),
    "rule with unknown key": ({"rules": {"a": {"shape": 1}}}, r"unknown \['shape'\]"),
    "rule no dict": ({"rules": {"a": "code"}}, "must be a dict"),
    "density": ({"rules": {"a": {"density": 7}}}, "density: must be in"),
    "pseudo": ({"rules": {"a": {"pseudo_linear": True}}}, "pseudo_linear is for checks"),
}


@pytest.mark.parametrize("changes, message", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_config_that_makes_no_sense(changes, message, checkpoint):
    rewrite_config(checkpoint, **changes)
    with pytest.raises((ValueError, TypeError), match=message):
        load(checkpoint)


def test_a_layer_that_the_model_has_not_as_a_linear_one(checkpoint):
    def change(state):
        for part in ("values", "crow_indices", "col_indices"):
            state[f"model.embed_tokens.{part}"] = state.pop(f"{LAYER}.{part}")

    rewrite(checkpoint, change)
    with pytest.raises(
        ValueError, match=r"model.embed_tokens: is block sparse, but .* is Embedding"
    ):
        load(checkpoint)


def test_a_layer_that_is_tied_in_the_model(checkpoint):
    file = checkpoint / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(
        ValueError, match="lm_head: is block sparse, but in the model its weight is"
    ):
        load(checkpoint)


def test_a_file_that_is_cut_off(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)checkpoint|safetensors|incomplete|metadata"):
        load(checkpoint)


def test_a_pickle_is_refused_and_not_opened(checkpoint, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(Exception):  # noqa: B017  (ours, or that of transformers before)
        load(checkpoint)
    torch.save({"model.embed_tokens.weight": torch.zeros(1)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: must be a safetensors file"):
        load(checkpoint)
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_says_nothing_that_is_run(checkpoint, tmp_path):
    """Names and text of config and header go through no eval, import or template."""
    evil = f"__import__('os').system('touch {tmp_path}/exploded')"
    rewrite_config(checkpoint, layers={LAYER: [16, 16], evil: [16, 16]})

    def change(state):
        state[f"{evil}.values"] = state[f"{LAYER}.values"].clone()
        state[f"{evil}.crow_indices"] = state[f"{LAYER}.crow_indices"].clone()
        state[f"{evil}.col_indices"] = state[f"{LAYER}.col_indices"].clone()

    rewrite(checkpoint, change)
    before = logits(load(checkpoint))
    assert before.isfinite().all() and not (tmp_path / "exploded").exists()


def test_a_state_dict_without_files_says_what_to_do(checkpoint):
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    state = load_file(checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="load it into the patched model with load_state_dict"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state)


def test_rules_are_needed_for_a_dense_checkpoint(tmp_path):
    make(llama).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no rules, and the checkpoint is dense"):
        load(tmp_path, quantization_config=BlockSparseConfig())


@pytest.mark.parametrize("order", ["ours first", "theirs first", "a part of ours first"])
def test_the_import_alone_registers_and_imports_nothing(order, checkpoint):
    ours = "import pytorch_block_sparse\n"
    light = "import sys\nassert not {'transformers', 'peft', 'safetensors'} & set(sys.modules)\n"
    code = {
        "ours first": ours + light + "import transformers\n",
        "theirs first": "import transformers\n" + ours,
        "a part of ours first": "import pytorch_block_sparse.integrations._names\n",
    }[order]
    code = (
        "import warnings\nwarnings.simplefilter('error', UserWarning)\n"
        + code
        + (
            "from transformers import AutoModelForCausalLM\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(checkpoint)!r})\n"
            f"print(type(model.get_submodule({LAYER!r})).__name__)\n"
            "assert not any(type(f).__name__ == '_Finder' and 'transformers' in f.name "
            "for f in sys.meta_path)\n"
        )
    )
    run = subprocess.run(
        [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-c", "import sys\n" + code],
        text=True,
        capture_output=True,
    )
    assert run.stdout.strip().endswith("BlockSparseLinear"), run.stderr
