"""Models of the transformers library, patched: the same logits, training, checkpoints, generation.

Small random configurations of six families (hf_helpers.py).
"""

import copy

import pytest
import torch

pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

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
    qwen2,
    roberta,
    sparse_layers,
    t5,
    trainer,
)
from pytorch_block_sparse import (  # noqa: E402
    BlockSparseLinear,
    BlockSparseMatrix,
    BlockSparseModelPatcher,
)

pytestmark = pytest.mark.usefixtures("one_thread")

causal = pytest.mark.parametrize("family", [gpt2, llama, qwen2, t5], ids=lambda f: f.__name__)


@families
def test_patched_at_density_one_computes_the_same(family):
    model = make(family)
    before = logits(model)
    report = patch(model, 1.0)
    assert len(report) == len(sparse_layers(model)) == FAMILIES[family]
    torch.testing.assert_close(logits(model), before)


@families
def test_num_parameters_counts_what_is_stored(family):
    model = make(family)
    dense = model.num_parameters()
    report = patch(model, 0.25)
    saved = sum(entry.parameters_before - entry.parameters_after for entry in report)
    assert model.num_parameters() == dense - saved
    blocks = sum(entry.shape[0] * entry.shape[1] for entry in report) // 256
    assert saved == 256 * (blocks - sum(m.block_count for m in sparse_layers(model).values()))
    assert saved == 256 * blocks * 3 // 4


@families
def test_initialising_every_module_leaves_sparse_layers_as_they_were(family):
    model = make(family)
    patch(model, 0.5)
    before = copy.deepcopy(sparse_layers(model))
    embedding = model.get_input_embeddings().weight.detach().clone()
    torch.manual_seed(1)
    for module in model.modules():
        model._init_weights(module)
    assert not torch.equal(model.get_input_embeddings().weight, embedding)
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.values, before[name].values), name
        assert layer.bias is None or torch.equal(layer.bias, before[name].bias), name
        assert layer.pattern.equal(before[name].pattern), name


@pytest.mark.parametrize("family", [bert, roberta, gpt2, t5], ids=lambda f: f.__name__)
def test_a_tied_output_layer_is_left_alone(family):
    model = make(family)
    before = logits(model)
    patcher = BlockSparseModelPatcher()
    patcher.add_pattern(".*", {"density": 1.0, "block_shape": (16, 16)})
    with pytest.warns(UserWarning, match="left as it is, since its weight is tied to") as caught:
        patcher.patch_model(model)
    (warning,) = caught
    assert str(warning.message).startswith(("lm_head", "cls.predictions.decoder"))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.tie_weights()
    torch.testing.assert_close(logits(model), before)


def test_an_output_layer_that_is_not_tied_is_patched():
    model = make(llama)
    patch(model, 0.5)
    assert type(model.lm_head) is BlockSparseLinear


@families
def test_checkpoint_into_a_model_of_another_seed(family, tmp_path):
    source = make(family)
    patch(source, 0.5)
    torch.save(source.state_dict(), tmp_path / "model.pt")

    target = make(family, seed=1)
    patch(target, 0.25)  # another number of blocks, too
    assert not torch.allclose(logits(target), logits(source))
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert target.load_state_dict(state).missing_keys == []
    assert torch.equal(logits(target), logits(source))
    assert target.num_parameters() == source.num_parameters()


@families
def test_save_pretrained_and_load_its_file(family, tmp_path):
    source = make(family)
    patch(source, 0.5)
    source.save_pretrained(tmp_path)
    target = make(family, seed=1)
    patch(target, 0.5)
    state = safetensors_torch.load_file(tmp_path / "model.safetensors")
    keys = target.load_state_dict(state, strict=False)  # tied weights are in the file once
    assert not keys.unexpected_keys
    assert not any(key.endswith(("values", "indices")) for key in keys.missing_keys)
    assert torch.equal(logits(target), logits(source))


@families
def test_gradients_are_those_of_the_masked_dense_model(family):
    sparse, dense = make(family), make(family)
    patch(sparse, 0.5)
    patch(dense, 0.5, pseudo_linear=True)
    for model in (sparse, dense):
        model(**batch()).loss.backward()
    for name, layer in sparse_layers(sparse).items():
        wanted = BlockSparseMatrix.from_dense(
            dense.get_submodule(name).weight.grad, pattern=layer.pattern
        )
        assert layer.values.grad.any(), name
        torch.testing.assert_close(
            layer.values.grad, wanted.values, msg=lambda m, n=name: f"{n}: {m}"
        )


@families
@pytest.mark.parametrize("reentrant", [False, True], ids=["not_reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant):
    model = make(family).train()
    patch(model, 0.5)

    def gradients():
        model.zero_grad()
        model(**batch()).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    again = gradients()
    assert plain.keys() == again.keys()
    assert {f"{name}.values" for name in sparse_layers(model)} <= plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@causal
def test_generates_what_the_dense_model_does(family):
    model = make(family)
    inputs = batch(rows=2, length=6)["input_ids"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    before = model.generate(inputs, **options)
    assert before.shape[1] >= 6
    patch(model, 1.0)
    assert torch.equal(model.generate(inputs, **options), before)


def test_t5_casts_to_the_dtype_of_its_weight():
    model = make(t5)
    patch(model, 0.5)
    model.bfloat16()
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert type(wo) is BlockSparseLinear and wo.weight.dtype == torch.bfloat16
    assert logits(model).isfinite().all()


# --- Trainer --------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_trains(family, bf16, tmp_path):
    model = make(family)
    patch(model, 0.5)
    before = {name: layer.values.detach().clone() for name, layer in sparse_layers(model).items()}
    run = trainer(model, tmp_path, bf16=bf16)
    run.train()
    assert len(losses(run)) == 6 and losses(run)[-1] < 0.9 * losses(run)[0]
    for name, layer in sparse_layers(model).items():
        assert layer.values.dtype == torch.float32
        assert not torch.equal(layer.values, before[name]), name


def test_trains_with_gradient_checkpointing(tmp_path):
    model = make(gpt2)
    patch(model, 0.5)
    run = trainer(model, tmp_path, gradient_checkpointing=True, bf16=True)
    run.train()
    assert losses(run)[-1] < 0.9 * losses(run)[0]


def test_resumes_from_a_checkpoint_of_the_trainer(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    first = make(roberta)
    patch(first, 0.5)
    trainer(first, tmp_path, **options).train()

    second = make(roberta, seed=1)
    patch(second, 0.5)
    checkpoint = tmp_path / "checkpoint-3"
    trainer(second, tmp_path / "second", **options).train(resume_from_checkpoint=str(checkpoint))
    for name, layer in sparse_layers(second).items():
        assert layer.pattern.equal(first.get_submodule(name).pattern), name
    torch.testing.assert_close(logits(second), logits(first))
