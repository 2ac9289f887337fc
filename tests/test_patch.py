"""BlockSparseModelPatcher on plain torch models: its rules, and what it puts in.

What it leaves alone is in test_patch_left_alone.py, models of the transformers library in
test_transformers.py.
"""

import copy
import re

import pytest
import torch
from torch import nn

from patch_helpers import LINEAR, TOKENS, Model, patched, sparse_names
from pytorch_block_sparse import (
    BlockSparseLinear,
    BlockSparseModelPatcher,
    PseudoBlockSparseLinear,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- rules --------------------------------------------------------------------------------------


def test_defaults_are_half_the_blocks_of_32():
    model = Model()
    patched(model, ("head",))
    assert (model.head.block_shape, model.head.block_count) == ((32, 32), 2)


def test_options_of_a_rule():
    model = Model()
    patched(model, ("head", {"density": 0.25, "block_shape": [8, 16], "pseudo_linear": False}))
    assert type(model.head) is BlockSparseLinear
    assert (model.head.block_shape, model.head.block_count) == ((8, 16), 7)


def test_a_rule_is_for_the_whole_name():
    for regex, names in {
        "head": ["head"],
        r"blocks\.0\..*": LINEAR[:2],
        r"blocks\..*\.up": [LINEAR[0], LINEAR[2]],
        r"blocks\.[01]\.up|head": [LINEAR[0], LINEAR[2], LINEAR[4]],
        r".*": LINEAR,
        r"(?i)HEAD": ["head"],
    }.items():
        model = Model()
        patched(model, (regex, {"density": 0.5}))
        assert sparse_names(model) == names, regex


@pytest.mark.parametrize(
    "regex", ["hea", "ead", "blocks", r"blocks\.0", "up", r"0\.up", "embed", ""]
)
def test_a_part_of_a_name_matches_nothing(regex):
    with pytest.raises(ValueError, match="matches the full name of no linear layer"):
        patched(Model(), (regex,))


def test_the_first_rule_that_matches_wins():
    model = Model()
    patched(
        model,
        (r"blocks\.0\.up", {"density": 0.25}),
        (r".*\.up", {"density": 0.5}),
        (r".*", {"density": 1.0}),
    )
    assert [layer.density for layer in map(model.get_submodule, LINEAR)] == [0.25, 1, 0.5, 1, 1]


def test_names_with_dots_are_taken_literally_when_escaped():
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(32, 32)}), "axb": nn.Linear(32, 32)})
    patched(model, (re.escape("a.b"),))
    assert sparse_names(model) == ["a.b"]


@pytest.mark.parametrize("name", LINEAR)
def test_patchable_layers_and_back(name):
    model = Model()
    patcher = BlockSparseModelPatcher()
    entries = patcher.get_patchable_layers(model)
    assert [set(entry) for entry in entries] == [{"regexp", "layer"}] * len(LINEAR)
    (entry,) = [e for e in entries if e["layer"] is model.get_submodule(name)]
    patched(model, (entry["regexp"], {"density": 0.5}))
    assert sparse_names(model) == [name]


def test_a_layer_that_is_sparse_is_not_patchable_again():
    model = Model()
    patched(model, ("head",))
    layers = BlockSparseModelPatcher().get_patchable_layers(model)
    assert [entry["regexp"] for entry in layers] == [re.escape(name) for name in LINEAR[:-1]]


REFUSED = {
    "key": ("x", {"densty": 0.5}, ValueError, "patch_info: unknown ['densty']; known are density"),
    "density": ("x", {"density": 0}, ValueError, "density: must be in (0, 1], got 0"),
    "density_bool": ("x", {"density": True}, ValueError, "density: must be in (0, 1], got True"),
    "block": ("x", {"block_shape": 32}, ValueError, "block_shape: must be two positive ints"),
    "pseudo": ("x", {"pseudo_linear": "no"}, ValueError, "pseudo_linear: must be True or False"),
    "regex": ("(", {}, ValueError, "pattern: '(' is no regular expression: missing )"),
    "regex_type": (7, {}, TypeError, "pattern: must be a string, got int"),
    "info_type": ("x", [1], TypeError, "patch_info: must be a dict, got list"),
}


@pytest.mark.parametrize(("regex", "info", "kind", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_add_pattern_refuses_and_adds_nothing(regex, info, kind, text):
    patcher = BlockSparseModelPatcher()
    with pytest.raises(kind, match="^" + re.escape(text)):
        patcher.add_pattern(regex, info)
    model = Model()
    assert patcher.patch_model(model) == [] and sparse_names(model) == []


def test_a_rule_that_matches_nothing_changes_nothing_and_lists_near_names():
    model = Model()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=re.escape(r"pattern: 'blocks\\.0\\.upp'")) as caught:
        patched(model, (".*",), (r"blocks\.0\.upp",))
    near = re.search(r"near names: (.*?) \(", str(caught.value))[1].split(", ")
    assert near[0] == "blocks.0.up" and set(near) <= set(LINEAR)
    assert "get_patchable_layers" in str(caught.value)
    assert list(map(id, model.modules())) == list(map(id, modules))


def test_a_rule_behind_another_is_no_error():
    patched(Model(), (".*",), ("head",))


def test_a_model_without_linear_layers():
    with pytest.raises(ValueError, match="near names: none"):
        patched(nn.Sequential(nn.Conv1d(1, 1, 1)), (".*",))


@pytest.mark.parametrize("regex", ["", ".*"])
def test_a_model_that_is_the_layer_itself(regex):
    with pytest.raises(ValueError, match=r"^model: is a Linear itself.*from_dense"):
        patched(nn.Linear(32, 32), (regex,))


# --- what a patched layer is ----------------------------------------------------------------------


def test_at_density_one_the_model_computes_the_same():
    model = Model()
    before = model(TOKENS)
    patched(model, (".*", {"density": 1.0, "block_shape": (16, 16)}))
    assert sparse_names(model) == LINEAR
    torch.testing.assert_close(model(TOKENS), before)


def test_keeps_the_largest_blocks():
    model = Model()
    dense = copy.deepcopy(model.head)
    patched(model, ("head", {"density": 0.5}))
    wanted = BlockSparseLinear.from_dense(dense, 0.5)
    assert torch.equal(model.head.weight.to_dense(), wanted.weight.to_dense())


@pytest.mark.parametrize("pseudo", [False, True], ids=["sparse", "pseudo"])
def test_keeps_dtype_requires_grad_and_mode(pseudo):
    model = Model().bfloat16()
    model.blocks[0].eval()
    model.blocks[0].up.weight.requires_grad_(False)
    model.blocks[1].up.bias.requires_grad_(False)
    patched(model, (".*", {"density": 0.5, "pseudo_linear": pseudo}))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    trained = {n: [p.requires_grad for p in model.get_submodule(n).parameters()] for n in LINEAR}
    assert trained == {
        "blocks.0.up": [False, True],
        "blocks.0.down": [True],
        "blocks.1.up": [True, False],
        "blocks.1.down": [True],
        "head": [True],
    }
    modes = [model.get_submodule(name).training for name in LINEAR]
    assert modes == [False, False, True, True, True]


def test_patches_on_the_meta_device_and_loads_by_assignment():
    model = Model()
    patched(model, (".*", {"density": 0.5}))
    with torch.device("meta"):
        empty = Model()
    patched(empty, (".*", {"density": 0.5}))
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(TOKENS), model(TOKENS))


def test_pseudo_linear_computes_the_same_densely():
    sparse = Model()
    dense = copy.deepcopy(sparse)
    rule = {"density": 0.3, "block_shape": (16, 16)}
    patched(sparse, (".*", rule))
    report = patched(dense, (".*", rule | {"pseudo_linear": True}))
    assert type(dense.head) is PseudoBlockSparseLinear and sparse_names(dense) == []
    assert [entry.name for entry in report] == LINEAR
    for entry in report:  # its weight is dense: nothing is saved
        layer = dense.get_submodule(entry.name)
        assert entry.parameters_after == sum(p.numel() for p in layer.parameters())
        assert entry.parameters_after == entry.parameters_before
    torch.testing.assert_close(dense(TOKENS), sparse(TOKENS))


def test_a_patched_model_trains():
    torch.manual_seed(0)
    model = Model()
    patched(model, (r"blocks.*", {"density": 0.5}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


def test_conv1d_of_transformers():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(96, 64), nn.ReLU(), conv1d(32, 96))
    model[0].weight.requires_grad_(False)
    model[2].eval()
    x = torch.randn(5, 64)
    before = model(x)
    report = patched(model, (".*", {"density": 1.0}))
    assert [entry.shape for entry in report] == [(96, 64), (32, 96)]
    assert sparse_names(model) == ["0", "2"]
    torch.testing.assert_close(model(x), before)
    assert not model[0].values.requires_grad and model[2].values.requires_grad
    assert model[0].training and not model[2].training


# --- the table ------------------------------------------------------------------------------------


def test_prints_a_table_and_returns_it(capsys):
    model = Model(blocks=1)
    report = patched(model, (r"blocks.*", {"density": 0.25}))
    assert capsys.readouterr().out == (
        "layer          out x in  density  parameters  after\n"
        "blocks.0.up    128 x 64     0.25       8,320  2,176\n"
        "blocks.0.down  64 x 128     0.25       8,192  2,048\n"
        "total                                 16,512  4,224\n"
    )
    fields = [(e.name, e.shape, e.density, e.parameters_before, e.parameters_after) for e in report]
    assert fields == [
        ("blocks.0.up", (128, 64), 0.25, 8320, 2176),
        ("blocks.0.down", (64, 128), 0.25, 8192, 2048),
    ]


def test_the_density_in_the_table_is_the_one_that_was_reached():
    (entry,) = patched(Model(), ("head", {"density": 0.3}))  # 2 x 2 blocks: one
    assert entry.density == 0.25
