"""The Python of README.md and docs/pattern-optimisation.md runs, exactly as printed.

A test gives a block the names that it takes from the reader (a model, batches), and nothing else.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pytorch_block_sparse import BlockSparseLinear, BlockSparseModelPatcher

ROOT = Path(__file__).parent.parent


def blocks_of(document):
    """Its fenced blocks of Python, in order."""
    text = (ROOT / document).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(code, document, **names):
    exec(compile(code, document, "exec"), names)
    return names


README = blocks_of("README.md")
GUIDE = blocks_of("docs/pattern-optimisation.md")


def test_every_block_is_run_below():
    assert len(README) == 6
    assert len(GUIDE) == 9  # the third one shows a result


# --- README.md ------------------------------------------------------------------------------------


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in README:
        exec(compile(code, "README.md", "exec"), names)
    assert names["sparsifier"].steps == 1
    names["model"](torch.arange(5)[None]).logits.sum().backward()


def test_the_one_changed_line():
    names = run(README[0], "README.md")
    (line,) = re.findall(r"^layer = .*", README[0], re.MULTILINE)
    layer, dense = names["layer"], eval(line.split("# was ")[1], {"nn": nn})
    assert (layer.in_features, layer.out_features) == (dense.in_features, dense.out_features)
    assert type(layer) is BlockSparseLinear and layer.block_count == 26
    assert names["y"].shape == dense(names["x"]).shape


def test_a_whole_model(capsys):
    pytest.importorskip("transformers")
    model = run(README[1], "README.md")["model"]
    sparse = [m for m in model.modules() if isinstance(m, BlockSparseLinear)]
    assert len(sparse) == 2 * 3  # of each layer: attention output, intermediate, output
    assert "roberta.encoder.layer.1.output.dense" in capsys.readouterr().out
    assert model(torch.arange(5)[None]).logits.shape == (1, 5, model.config.vocab_size)


def test_at_home_in_transformers(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    model = run(README[1], "README.md")["model"]
    loaded = run(README[2], "README.md", model=model)["model"]
    sparse = [m for m in loaded.modules() if isinstance(m, BlockSparseLinear)]
    assert len(sparse) == 2 * 3
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


def test_serve_it_on_a_cpu():
    layer, x = BlockSparseLinear(64, 96), torch.randn(3, 64)
    names = run(README[3], "README.md", torch=torch, layer=layer, x=x)
    assert torch.allclose(names["y"], layer(x), atol=1e-5)
    assert torch.equal(names["layer"].values, layer.values)


def test_bring_your_own_pattern(capsys):
    layer = run(README[4], "README.md")["layer"]
    assert layer.pattern.equal(run(README[4], "README.md")["pattern"])
    assert "forward f32 tokens=512" in capsys.readouterr().out


def test_a_pattern_that_learns():
    model, patcher = patched_model()
    patcher.patch_model(model)
    sparsifier = run(README[5], "README.md", torch=torch, model=model)["sparsifier"]
    assert sparsifier.steps == 1


# --- docs/pattern-optimisation.md -----------------------------------------------------------------


def patched_model():
    """What the reader has: a model, its patcher, an optimizer."""
    model = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 64), nn.Linear(64, 20))
    patcher = BlockSparseModelPatcher()
    patcher.add_pattern("1", {"density": 0.25, "block_shape": (16, 16)})
    return model, patcher


def loss_of(model, batch):
    return model(batch).square().mean()


def trained():
    """The first block, run: what the others go on with."""
    model, patcher = patched_model()
    patcher.patch_model(model)
    return run(
        GUIDE[0],
        "pattern-optimisation.md",
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        batches=torch.arange(12).reshape(3, 4),
        loss_of=loss_of,
    )


def test_training_with_a_method():
    names = trained()
    assert names["sparsifier"].steps == 3
    assert names["model"][1].density == 0.25


def test_saving_and_resuming(tmp_path):
    saving, resuming = re.split(r"^\.\.\.\n", GUIDE[1], flags=re.MULTILINE)
    first, second = trained(), trained()
    run(saving, "pattern-optimisation.md", **first, path=tmp_path / "saved", torch=torch)
    saved = torch.load(tmp_path / "saved", weights_only=True)
    run(resuming, "pattern-optimisation.md", **second, saved=saved)
    assert second["model"][1].pattern.equal(first["model"][1].pattern)
    for mine, theirs in zip(first["model"].parameters(), second["model"].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_distillation():
    model, patcher = patched_model()
    ids = torch.arange(8).reshape(2, 4)
    code = GUIDE[3]
    names = run(
        code,
        "pattern-optimisation.md",
        model=model,
        patcher=patcher,
        ids=ids,
        labels=ids,
        torch=torch,
    )
    assert type(names["model"][1]) is BlockSparseLinear
    assert names["loss"].requires_grad and names["loss"].isfinite()


def test_learning_rates():
    model, patcher = patched_model()
    patcher.patch_model(model)
    optimizer = run(GUIDE[4], "pattern-optimisation.md", torch=torch, model=model)["optimizer"]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {
        id(p): 4e-3 if p is model[1].values else pytest.approx(1e-3) for p in model.parameters()
    }


def test_a_learning_rate_that_follows_the_density():
    model, patcher = patched_model()
    patcher.add_pattern("1", {"density": 1.0, "block_shape": (16, 16)})
    patcher.patch_model(model)
    setting, step = re.split(r"^\.\.\.\n", GUIDE[5], flags=re.MULTILINE)
    short = setting.replace("10_000", "10")
    names = run(short, "pattern-optimisation.md", torch=torch, model=model)
    optimizer, rates = names["optimizer"], []
    for _ in range(10):
        model(torch.arange(4)).square().mean().backward()
        optimizer.step()
        run(step, "pattern-optimisation.md", **names)
        optimizer.zero_grad()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[0] == [1e-3, 1e-3] and rates[-1] == [1e-3, 1e-3 / 0.25]
    assert optimizer.param_groups[1]["params"] == [model[1].values]


def test_by_hand(capsys):
    model, patcher = patched_model()
    patcher.patch_model(model)
    names = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    before, ids = model[1].pattern.mask(), torch.arange(8).reshape(2, 4)
    run(GUIDE[6], "pattern-optimisation.md", **names)
    after = model[1].pattern.mask()
    assert before.sum() == 4 and 2 <= after.sum() <= 3 and (before != after).any()
    seen = run(GUIDE[7], "pattern-optimisation.md", **names, ids=ids)
    assert 0 <= float(capsys.readouterr().out.split()[-1]) <= 0.5
    assert seen["blocks"].shape == (len(seen["gradients"]), 2) and seen["gradients"].any()
    assert model[1].block_count == 2
    sparsifier = run(GUIDE[8], "pattern-optimisation.md", **names)["sparsifier"]
    before = model[1].pattern.mask()
    model(ids).square().mean().backward()
    names["optimizer"].step()
    assert sparsifier.step()["churn"] == 0.5
    assert (before & model[1].pattern.mask()).sum() == 1
