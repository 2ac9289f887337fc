"""Small random models of six families of transformers, their patching, data and Trainer.

GPT-2 has Conv1D layers; T5 and GPT-2 initialise some weights from the parent module; all but Llama
and Qwen2 tie their output layer to the embedding.
"""

import contextlib
import os
import warnings

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from pytorch_block_sparse import BlockSparseLinear, BlockSparseModelPatcher  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY, HIDDEN, INNER = 96, 64, 128


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}


def bert():
    config = transformers.BertConfig(
        **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.BertForMaskedLM(config)


def roberta():
    config = transformers.RobertaConfig(
        **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.RobertaForMaskedLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=40,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=1)
    return transformers.LlamaForCausalLM(config)


def qwen2():
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, pad_token_id=1)
    return transformers.Qwen2ForCausalLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_ff=INNER,
        d_kv=16,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return transformers.T5ForConditionalGeneration(config)


# each with the number of its linear layers that are not tied
FAMILIES = {bert: 13, roberta: 13, gpt2: 8, llama: 15, qwen2: 15, t5: 32}
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)


def make(family, seed=0):
    torch.manual_seed(seed)
    return family().eval()


def patch(model, density, **options):
    """Patches all that can be patched, in which a warning is an error."""
    options |= {"density": density, "block_shape": (16, 16)}
    patcher = BlockSparseModelPatcher()
    for entry in patcher.get_patchable_layers(model):
        patcher.add_pattern(entry["regexp"], options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with contextlib.redirect_stdout(None):  # the table
            return patcher.patch_model(model)


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def batch(rows=2, length=8):
    tokens = torch.arange(rows * length).reshape(rows, length) * 7 % (VOCABULARY - 2) + 2
    return {"input_ids": tokens, "labels": tokens}


def logits(model):
    with torch.no_grad():
        return model(**batch()).logits


def trainer(model, folder, **options):
    torch.manual_seed(0)
    rows = batch(rows=8)
    data = [{key: value[i] for key, value in rows.items()} for i in range(8)]
    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 6,
    }
    arguments = transformers.TrainingArguments(str(folder), **{**defaults, **options})
    return transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
