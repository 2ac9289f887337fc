"""LoRA of PEFT on frozen block-sparse layers: training, saving, loading, and no merging."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from packaging.version import Version

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from hf_helpers import batch, bert, families, llama, logits, make, patch, sparse_layers, t5, trainer  # noqa: E402
from pytorch_block_sparse import BlockSparseLinear  # noqa: E402
from pytorch_block_sparse.integrations import BlockSparseLora  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = {
    "bert": ["query", "intermediate.dense", "transform.dense"],
    "roberta": ["query", "value", "output.dense"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "up_proj"],
    "qwen2": ["q_proj", "up_proj"],
    "t5": ["q", "wo"],
}


def lora(family, **options):
    """A patched model with an adapter whose B is not zero, and the patched model without."""
    plain, model = make(family), make(family)
    for each in (plain, model):
        patch(each, 0.5)
    targets = TARGETS[family.__name__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = peft.LoraConfig(r=4, target_modules=targets, **options)
        adapted = peft.get_peft_model(model, config)
    return adapted, plain


def shake(adapted):
    """Gives the adapters something to say."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


def loss(adapted):
    with torch.no_grad():
        return float(adapted.eval()(**batch(rows=8)).loss)


def lora_layers(adapted):
    return [m for m in adapted.modules() if isinstance(m, BlockSparseLora)]


@families
def test_adds_the_low_rank_product_to_a_frozen_layer(family):
    adapted, plain = lora(family)
    layers = lora_layers(adapted)
    assert layers and all(type(x.base_layer) is BlockSparseLinear for x in layers)
    torch.testing.assert_close(logits(adapted.eval()), logits(plain))  # B is zero
    shake(adapted)
    layer = layers[0]
    x = torch.randn(3, layer.in_features)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wanted = layer.base_layer(x) + x @ a.T @ b.T * layer.scaling["default"]
    torch.testing.assert_close(layer(x), wanted)
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(plain))


@families
def test_trains_the_adapter_and_nothing_else(family, tmp_path):
    adapted, _ = lora(family)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    first = loss(adapted)
    trainer(adapted, tmp_path, learning_rate=2e-2, max_steps=12).train()
    assert loss(adapted) < 0.995 * first
    for name, parameter in adapted.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name]), name
    changed = [n for n, p in adapted.named_parameters() if not torch.equal(p, before[n])]
    assert set(changed) == set(trained)


def test_gradient_of_the_input_passes_the_frozen_layer():
    adapted, _ = lora(llama)
    shake(adapted)
    adapted(**batch()).loss.backward()
    first = lora_layers(adapted)[0]
    assert first.lora_A["default"].weight.grad.any() and first.base_layer.values.grad is None


def test_saves_and_loads_the_adapter_in_a_fresh_process(tmp_path):
    adapted, plain = lora(bert)
    shake(adapted)
    plain.save_pretrained(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    code = (
        "import sys, torch, hf_helpers, transformers, peft\n"
        "base = transformers.AutoModelForMaskedLM.from_pretrained(sys.argv[1] + '/base')\n"
        "model = peft.PeftModel.from_pretrained(base, sys.argv[1] + '/adapter')\n"
        "torch.save(hf_helpers.logits(model.eval()), sys.argv[1] + '/logits.pt')\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, *(["-P"] if sys.flags.safe_path else []), "-c", code, str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(adapted.eval()))


@pytest.mark.skipif(
    Version(peft.__version__) < Version(transformers.integrations.peft.MIN_PEFT_VERSION),
    reason="transformers wants a newer PEFT for its own adapters",
)
def test_adapters_of_transformers_itself(tmp_path):
    """``model.add_adapter``, ``load_adapter``: the same layers without a PeftModel."""
    model = make(llama)
    patch(model, 0.5)
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert len(lora_layers(loaded)) == 2
    assert torch.equal(logits(loaded), logits(model.eval()))


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
def test_merging_is_an_error_and_changes_nothing(how):
    adapted, _ = lora(llama)
    shake(adapted)
    before = logits(adapted.eval())
    with pytest.raises(RuntimeError, match="an adapter has values outside of its pattern"):
        getattr(adapted, how)()
    assert torch.equal(logits(adapted), before)


def test_unload_gives_the_sparse_model_back():
    adapted, plain = lora(llama)
    shake(adapted)
    model = adapted.unload()
    assert sparse_layers(model).keys() == sparse_layers(plain).keys()
    torch.testing.assert_close(logits(model.eval()), logits(plain))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_that_read_a_dense_weight(init):
    with pytest.raises(ValueError, match=f"init_lora_weights: .* got '{init}'"):
        lora(llama, init_lora_weights=init)


def test_variants_that_read_a_dense_weight():
    with pytest.raises(ValueError, match="use_dora"):
        lora(llama, use_dora=True)


def test_in_bfloat16_and_two_adapters():
    adapted, _ = lora(t5)
    adapted.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q"]))
    shake(adapted)
    adapted.set_adapter("other")
    first = logits(adapted.eval())
    adapted.set_adapter("default")
    assert not torch.equal(logits(adapted), first)
    assert logits(adapted.bfloat16()).isfinite().all()


def test_dense_layers_keep_the_lora_of_peft():
    model = make(llama)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    assert not lora_layers(adapted)
    adapted.merge_and_unload()
