"""Schedules, choice and distillation."""

import math

import pytest
import torch
from torch import nn

from pytorch_block_sparse import BlockSparseLinear, BlockSparseModelPatcher
from pytorch_block_sparse.optim import (
    Constant,
    Cosine,
    Cubic,
    DistillationLoss,
    Every,
    choose,
    parameter_groups,
    scores,
    teacher_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# --- learning rates ------------------------------------------------------------------------------


def test_sparse_values_learn_faster():
    model = nn.Sequential(
        BlockSparseLinear(64, 64, density=0.25, block_shape=(16, 16)),
        nn.LayerNorm(64),
        BlockSparseLinear(64, 64, False, density=0.5, block_shape=(16, 16)),
        BlockSparseLinear(64, 64, density=0.25, block_shape=(16, 16)),
    )
    groups = parameter_groups(model, lr=0.1)
    found = {group["lr"]: {id(p) for p in group["params"]} for group in groups}
    assert found == {
        0.1: {id(model[0].bias), id(model[3].bias), *map(id, model[1].parameters())},
        0.4: {id(model[0].values), id(model[3].values)},
        0.2: {id(model[2].values)},
    }
    torch.optim.AdamW(groups)  # each parameter is in one group only


def test_parameter_groups_refuses():
    model = nn.Sequential(BlockSparseLinear(64, 64, density=0.25))
    for rate in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr: must be positive"):
            parameter_groups(model, rate)
    with pytest.raises(TypeError, match=r"lr: must be a number, got '0\.1'"):
        parameter_groups(model, "0.1")
    with pytest.raises(ValueError, match="has no BlockSparseLinear"):
        parameter_groups(nn.Linear(4, 4), 0.1)


# --- schedules and choice ------------------------------------------------------------------------


def test_schedules():
    density = Cubic(1.0, 0.1, begin=10, end=20)
    assert [density(step) for step in (0, 10, 20, 30)] == [1.0, 1.0, 0.1, 0.1]
    assert density(15) == pytest.approx(1 - (0.9 + (0 - 0.9) * (1 - 0.5) ** 3))  # as a sparsity
    share = Cosine(0.3, end=30)
    assert share(10) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert (share(0), share(30), share(99), Constant(2)(7)) == (0.3, 0, 0, 2)
    assert [step for step in range(30) if Every(4, 3, 15).due(step)] == [3, 7, 11, 15]
    assert not Every(4, 0, 15).due(0)


@pytest.mark.parametrize(
    "make", [lambda: Every(1, 5, 4), lambda: Cosine(0.5, 0), lambda: Cubic(1, 0, 5, 5)]
)
def test_a_schedule_that_ends_before_it_starts(make):
    with pytest.raises(ValueError, match=r"end: the schedule ends .* before it starts"):
        make()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Cubic(math.nan, 0.1, 0, 5), ValueError, "start: must be finite, got nan"),
        (lambda: Cubic(1.0, math.inf, 0, 5), ValueError, "final: must be finite, got inf"),
        (lambda: Cubic("x", 0.1, 0, 5), TypeError, "start: must be a number, got 'x'"),
        (lambda: Cubic(1.0, 0.1, "a", 5), ValueError, "begin: must be an int, got 'a'"),
        (lambda: Cubic(1.0, 0.1, 0, math.nan), ValueError, "end: must be an int, got nan"),
        (lambda: Cosine(0.5, math.nan), ValueError, "end: must be an int, got nan"),
        (lambda: Cosine(0.5, 2.5), ValueError, "end: must be an int, got 2.5"),
        (lambda: Constant("x"), TypeError, "value: must be a number, got 'x'"),
        (lambda: Constant(math.nan), ValueError, "value: must be finite, got nan"),
    ],
)
def test_schedules_of_what_is_no_number(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_random_choice_depends_on_seed_name_and_step_alone():
    items = torch.arange(1000) * 3
    picks = {}
    for seed, name, step in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2)]:
        torch.manual_seed(step)
        pick = choose.random_sample(items, 10, choose.generator(seed, name, step))
        again = choose.random_sample(items, 10, choose.generator(seed, name, step))
        assert torch.equal(pick, again) and len(pick.unique()) == 10
        picks[seed, name, step] = tuple(pick.tolist())
    assert len(set(picks.values())) == 4
    # Written down: a checkpoint resumes on another machine.
    assert picks[0, "a", 1][:4] == (2070, 477, 1128, 582)
    assert len(choose.random_sample(items[:3], 10, choose.generator(0, "a", 1))) == 3


def test_ties_and_nan():
    scores = torch.tensor([1.0, 0.0, 1.0, 0.0, torch.nan])
    with pytest.warns(UserWarning, match="here: 1 of 5 block scores are NaN"):
        clean = choose.without_nan(scores, "here")
    assert choose.lowest(clean, 3).tolist() == [4, 1, 3]
    assert choose.highest(clean, 3).tolist() == [0, 2, 1]


# --- distillation --------------------------------------------------------------------------------


def logits_of(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_relative_scores_are_their_formula():
    inf = float("inf")
    norms, ids = torch.tensor([1.0, 2.0, 4.0, -inf]), torch.tensor([0, 1, 3, 5])  # a grid of 3 x 2
    rows = {0: (1 + 2) / 2, 1: 4 / 2}
    cols = {0: 1 / 3, 1: (2 + 4) / 3}
    by_hand = [
        norm / (rows[id // 2] * cols[id % 2]) ** 0.25 for id, norm in ((0, 1), (1, 2), (3, 4))
    ]
    got = scores.relative(norms, ids, (3, 2))
    assert got[:3].tolist() == pytest.approx(by_hand)
    assert got[3] == -inf
    assert (scores.relative(torch.zeros(2), torch.tensor([0, 5]), (3, 2)) == 0).all()


def test_relative_scores_leave_something_to_weak_columns():
    norms = torch.ones(8, 8)
    norms[:, 0] = 0.9  # a whole column that is a little smaller than the others
    ids = torch.arange(64)
    plain, relative = norms.flatten(), scores.relative(norms.flatten(), ids, (8, 8))
    assert plain[::8].max() / plain.max() == pytest.approx(0.9)
    assert relative[::8].max() / relative.max() == pytest.approx(0.9**0.75, rel=0.02)


def test_distillation_is_its_formula_over_the_tokens_that_count():
    student, teacher = logits_of(0, 2, 5, 7), logits_of(1, 2, 5, 7)
    labels = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(2))
    labels[0, 3:] = -100
    kept = labels != -100
    p = torch.softmax(teacher[kept] / 3, -1)
    divergence = (p * (p.log() - torch.log_softmax(student[kept] / 3, -1))).sum(-1).mean()
    entropy = nn.functional.cross_entropy(student[kept], labels[kept])
    expected = 0.8 * 9 * divergence + 0.2 * entropy
    loss = DistillationLoss(temperature=3.0, alpha=0.8)
    torch.testing.assert_close(loss(student, teacher, labels), expected)
    torch.testing.assert_close(loss(student, teacher, None, kept), 9 * divergence)
    poisoned = student.clone()
    poisoned[~kept] = torch.inf  # padding may hold anything
    poisoned.requires_grad_()
    result = loss(poisoned, teacher, labels)
    torch.testing.assert_close(result, expected)


def test_distillation_with_classes_that_are_ruled_out():
    """A logit of minus infinity in both counts as if the class were not there."""
    student, teacher = logits_of(0, 2, 5, 7), logits_of(1, 2, 5, 7)
    loss = DistillationLoss()
    expected = loss(student[..., :6], teacher[..., :6])
    for logits in (student, teacher):
        logits[..., 6] = -torch.inf
    student.requires_grad_()
    result = loss(student, teacher)
    torch.testing.assert_close(result, expected)
    result.backward()
    assert student.grad.isfinite().all() and not student.grad[..., 6].any()
    student.data[..., 5] = -torch.inf  # ruled out by the student alone
    assert loss(student, teacher) == torch.inf


def test_distillation_causal_shifts():
    student, teacher = logits_of(0, 2, 5, 7), logits_of(1, 2, 5, 7)
    labels = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(2))
    shifted = DistillationLoss(causal=True)(student, teacher, labels)
    by_hand = DistillationLoss()(student[:, :-1], teacher[:, :-1], labels[:, 1:])
    torch.testing.assert_close(shifted, by_hand)


def test_distillation_teaches_the_student_only():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    teacher = teacher_of(model)
    patcher = BlockSparseModelPatcher()
    patcher.add_pattern("0", {"density": 0.5, "block_shape": (4, 4)})
    patcher.patch_model(model)
    assert type(teacher[0]) is nn.Linear and model.training and not teacher.training
    x = torch.randn(4, 8)
    DistillationLoss()(model(x), teacher(x), torch.zeros(4, dtype=torch.long)).backward()
    assert model[0].values.grad.any()
    assert all(p.grad is None for p in teacher.parameters())


def test_distillation_works_with_heads_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    teacher = teacher_of(model)
    ids = torch.randint(50, (2, 8))
    out = model(ids, labels=ids)
    with torch.no_grad():
        target = teacher(ids)
    loss = DistillationLoss(alpha=0.0, causal=True)(out, target, ids)
    torch.testing.assert_close(loss, out.loss)


def test_distillation_bad_input():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="temperature: must be positive"):
        DistillationLoss(temperature=0.0)
    with pytest.raises(ValueError, match=r"alpha: must be in \[0, 1\]"):
        DistillationLoss(alpha=2.0)
    with pytest.raises(ValueError, match=r"teacher: logits must be \[2, 3\]"):
        DistillationLoss()(x, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"labels: must be \[2\]"):
        DistillationLoss()(x, x, torch.zeros(3, dtype=torch.long))
    for temperature in (math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature: must be positive and finite"):
            DistillationLoss(temperature)
    with pytest.raises(TypeError, match="temperature: must be a number, got '2'"):
        DistillationLoss("2")
    with pytest.raises(TypeError, match=r"alpha: must be a number, got '0\.5'"):
        DistillationLoss(2.0, "0.5")
    loss = DistillationLoss()
    with pytest.raises(TypeError, match=r"student: must be logits, a tensor, or .* got str"):
        loss("x", x)
    for output in ((x,), {"logits": x}):
        kind = type(output).__name__
        with pytest.raises(TypeError, match=f"teacher: .* got {kind}: pass its logits alone"):
            loss(x, output)
    with pytest.raises(ValueError, match=r"student: logits must be \[\.\.\., classes\]"):
        loss(x.sum(), x.sum())
    with pytest.raises(ValueError, match=r"causal wants .* \[\.\.\., tokens, classes\], got \[3\]"):
        DistillationLoss(causal=True)(x[0], x[0])
    with pytest.raises(TypeError, match="labels: must be a tensor, got list"):
        loss(x, x, [0, 1])
    with pytest.raises(TypeError, match="mask: must be a tensor, got list"):
        loss(x, x, None, [True, True])
    with pytest.raises(TypeError, match=r"labels: must be integers, got torch\.float32"):
        loss(x, x, torch.zeros(2))
    assert DistillationLoss()(x, x, torch.full((2,), -100)) == 0
