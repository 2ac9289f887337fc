"""BlockSparsityCallback: each method under transformers' Trainer, its log, and resuming."""

import contextlib
import json
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from hf_helpers import bert, gpt2, llama, logits, losses, make, patch, sparse_layers, trainer  # noqa: E402
from pytorch_block_sparse.integrations import BlockSparsityCallback  # noqa: E402
from pytorch_block_sparse.optim import (  # noqa: E402
    BlockMovement,
    BlockRigL,
    BlockSET,
    BlockWanda,
    GradualMagnitude,
    SparseOptimizer,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12
SET = {"every": 2, "end": 11}
# method, its options, the density to start from, and the one at the end
METHODS = {
    "set": (BlockSET, SET, 0.5, 0.5),
    "rigl": (BlockRigL, SET, 0.5, 0.5),
    "gradual": (
        GradualMagnitude,
        {"density": 0.25, "begin": 1, "end": 10, "updates": 4, "compactions": 2},
        1.0,
        0.25,
    ),
    "movement": (
        BlockMovement,
        {"begin": 1, "end": 9, "every": 2, "floor": 0.25, "score_lr": 1.0},
        1.0,
        0.3,  # the loss says how much, from `floor` on
    ),
    "wanda": (BlockWanda, {"density": 0.25, "calibration_batches": 2}, 1.0, 0.25),
}
methods = pytest.mark.parametrize("case", METHODS.values(), ids=METHODS.keys())


def run(model, folder, case, resume=None, **options):
    """Trains `model` with a method; returns the Trainer and the callback."""
    method, arguments = case[:2]
    callback = BlockSparsityCallback(method, **arguments)
    job = trainer(model, folder, **{"max_steps": STEPS, **options})
    job.add_callback(callback)
    with contextlib.redirect_stdout(None):
        job.train(resume_from_checkpoint=resume)
    return job, callback


def patched(family, density, seed=0):
    model = make(family, seed)
    patch(model, density)
    return model


@methods
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_drives_any_method(case, bf16, tmp_path):
    _, _, start, end = case
    model = patched(llama, start)
    before = {name: layer.pattern.mask() for name, layer in sparse_layers(model).items()}
    job, callback = run(model, tmp_path, case, bf16=bf16)
    assert callback.sparsifier.steps == (1 if callback.method is BlockWanda else STEPS)
    assert callback.sparsifier.log
    after = sparse_layers(model)
    assert any(not torch.equal(before[name], layer.pattern.mask()) for name, layer in after.items())
    present = sum(layer.block_count for layer in after.values())
    cells = sum(layer.pattern.mask().numel() for layer in after.values())
    assert present / cells == pytest.approx(end, abs=0.03)
    assert callback.sparsifier.density() == pytest.approx(present / cells)
    assert losses(job)[-1] < losses(job)[0]


@methods
def test_logs_density_and_churn(case, tmp_path):
    job, callback = run(patched(llama, case[2]), tmp_path, case)
    entries = [entry for entry in job.state.log_history if "loss" in entry]
    assert len(entries) == STEPS
    assert entries[-1]["block_density"] == pytest.approx(callback.sparsifier.density())
    churn = sum(entry["churn"] for entry in callback.sparsifier.log)
    assert sum(entry["block_churn"] for entry in entries) == pytest.approx(churn) and churn > 0


def test_others_see_density_and_churn_if_they_come_after(tmp_path):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    job = trainer(patched(llama, 0.5), tmp_path, max_steps=3)
    job.add_callback(Reporter())
    job.callback_handler.callbacks.insert(0, BlockSparsityCallback(BlockSET, every=1, end=3))
    job.train()
    assert [set(entry) >= {"block_density", "block_churn"} for entry in seen[:3]] == [True] * 3


@methods
@pytest.mark.parametrize("at", [3, 6])
def test_a_resumed_training_is_the_same(case, at, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = patched(gpt2, case[2])
    _, first = run(whole, tmp_path / "whole", case, **options)

    again = patched(gpt2, case[2], seed=1)
    checkpoint = tmp_path / "whole" / f"checkpoint-{at}"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, second = run(again, tmp_path / "elsewhere", case, str(checkpoint), **options)
    for name, layer in sparse_layers(whole).items():
        other = sparse_layers(again)[name]
        assert layer.pattern.equal(other.pattern), name
        assert torch.equal(layer.values, other.values), name
    assert torch.equal(logits(whole), logits(again))
    assert first.sparsifier.log == second.sparsifier.log


def test_the_state_in_the_checkpoint_is_json_and_no_code(tmp_path):
    run(patched(llama, 0.5), tmp_path, METHODS["set"], save_strategy="steps", save_steps=6)
    file = tmp_path / "checkpoint-6" / "trainer_state.json"
    state = json.loads(file.read_text())["stateful_callbacks"]["BlockSparsityCallback"]
    assert state["args"] == {"method": None} and len(state["attributes"]["saved"]) > 100


def test_checkpoints_of_the_trainer_load_with_from_pretrained(tmp_path):
    model = patched(llama, 1.0)
    run(model, tmp_path, METHODS["gradual"], save_strategy="steps", save_steps=6)
    half, end = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        for step in (6, 12)
    )
    assert half.num_parameters() > end.num_parameters() == model.num_parameters()
    assert torch.equal(logits(end), logits(model))


@pytest.mark.parametrize("best", [3, 12])
def test_the_best_model_at_the_end_after_compaction(best, tmp_path):
    """The best one may have another number of blocks than the last one."""
    model = patched(bert, 1.0)
    method, arguments, *_ = METHODS["gradual"]
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    job = trainer(
        model,
        tmp_path,
        max_steps=STEPS,
        load_best_model_at_end=True,
        metric_for_best_model="step_is_best",
        greater_is_better=True,
        **options,
    )
    job.add_callback(BlockSparsityCallback(method, **arguments))
    job.compute_metrics = lambda _: {"step_is_best": float(job.state.global_step == best)}
    job.train()
    wanted = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / f"checkpoint-{best}")
    assert torch.equal(logits(model), logits(wanted))
    assert model.num_parameters() == wanted.num_parameters()
    job.train()  # once more: the Trainer keeps its optimizer, with moments of other blocks
    assert losses(job)[-1] < losses(job)[0]


def test_gradient_accumulation_counts_steps_of_the_optimizer(tmp_path):
    case = METHODS["set"]
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 6}
    _, callback = run(patched(llama, 0.5), tmp_path, case, **options)
    assert callback.sparsifier.steps == 6


def test_a_checkpoint_without_the_method_warns_and_starts_anew(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer(patched(llama, 0.5), tmp_path, max_steps=3, **options).train()
    with pytest.warns(UserWarning, match="has no state of it, so its schedule starts anew"):
        _, callback = run(
            patched(llama, 0.5), tmp_path, METHODS["set"], str(tmp_path / "checkpoint-3"), **options
        )
    assert callback.sparsifier.steps == STEPS - 3


def test_a_function_that_makes_the_method(tmp_path):
    def make_method(model, optimizer, total_steps):
        return BlockSET(model, optimizer, total_steps, only=lambda name: "up_proj" in name)

    _, callback = run(patched(llama, 0.5), tmp_path, (make_method, {}))
    assert len(callback.sparsifier.layers) == 2


def test_what_is_no_method():
    with pytest.raises(TypeError, match="must be a Sparsifier"):
        BlockSparsityCallback(SparseOptimizer)
    with pytest.raises(TypeError, match="must be a Sparsifier"):
        BlockSparsityCallback("BlockSET")
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint at False"):
        BlockSparsityCallback(None)


def test_a_function_that_makes_something_else(tmp_path):
    with pytest.raises(TypeError, match="must make a Sparsifier, got int"):
        run(patched(llama, 0.5), tmp_path, (lambda model, optimizer: 3, {}))
