"""Layers that BlockSparseModelPatcher leaves alone, with a warning; layers with two names."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from patch_helpers import LINEAR, TOKENS, Model, patched, sparse_names
from pytorch_block_sparse import (
    BlockSparseLinear,
    BlockSparseModelPatcher,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_left_alone(model, name, reason):
    """A rule for every linear layer replaces all but `name`, with a warning that says `reason`."""
    layer = model.get_submodule(name)
    parameters = {id(p) for p in layer.parameters()}
    others = [n for n in LINEAR if n != name]
    patcher = BlockSparseModelPatcher()
    patcher.add_pattern(".*", {"density": 1.0, "block_shape": (16, 16)})
    before = model(TOKENS)
    listed = [entry["regexp"] for entry in patcher.get_patchable_layers(model)]
    assert listed == [re.escape(n) for n in others]
    with pytest.warns(UserWarning, match=re.escape(f"{name}: left as it is, since ")) as caught:
        report = patcher.patch_model(model)
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert caught[0].filename == __file__
    assert model.get_submodule(name) is layer
    assert {id(p) for p in layer.parameters()} == parameters
    assert sparse_names(model) == [entry.name for entry in report] == others
    torch.testing.assert_close(model(TOKENS), before)


# --- what is left alone ---------------------------------------------------------------------------

HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda *args: None),
    "forward_pre": lambda m: m.register_forward_pre_hook(lambda *args: None),
    "full_backward": lambda m: m.register_full_backward_hook(lambda *args: None),
    "full_backward_pre": lambda m: m.register_full_backward_pre_hook(lambda *args: None),
    "state_dict_pre": lambda m: m.register_state_dict_pre_hook(lambda *args: None),
    "state_dict_post": lambda m: m.register_state_dict_post_hook(lambda *args: None),
    "load_pre": lambda m: m.register_load_state_dict_pre_hook(lambda *args: None),
    "load_post": lambda m: m.register_load_state_dict_post_hook(lambda *args: None),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
def test_leaves_a_layer_with_hooks_alone(hook):
    model = Model()
    hook(model.blocks[0].down)
    assert_left_alone(model, "blocks.0.down", "it carries hooks")


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_leaves_a_layer_with_hooks_on_its_tensors_alone(name, hook):
    model = Model()
    getattr(getattr(model.blocks[0].up, name), hook)(lambda tensor: None)
    assert_left_alone(model, "blocks.0.up", f"its {name} carries hooks")


@pytest.mark.parametrize("tool", ["weight_norm", "orthogonal", "spectral_norm"])
def test_leaves_a_parametrized_layer_alone(tool):
    model = Model().eval()
    getattr(parametrizations, tool)(model.blocks[0].up)
    assert_left_alone(model, "blocks.0.up", "it has parametrizations")


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_leaves_old_weight_norm_alone():
    model = Model()
    nn.utils.weight_norm(model.blocks[0].up)
    assert_left_alone(model, "blocks.0.up", "it carries hooks")


def test_leaves_a_pruned_layer_alone():
    model = Model()
    prune.l1_unstructured(model.blocks[1].up, "weight", 0.5)
    assert_left_alone(model, "blocks.1.up", "it carries hooks")


def test_leaves_a_layer_with_a_hook_of_accelerate_alone():
    hooks = pytest.importorskip("accelerate.hooks")
    model = Model()
    hooks.add_hook_to_module(model.head, hooks.ModelHook())
    assert_left_alone(model, "head", "it carries a hook of accelerate")


def test_leaves_a_tied_weight_alone():
    model = Model()
    model.head.weight = model.embed.weight
    assert_left_alone(model, "head", "its weight is tied to embed.weight")


def test_leaves_a_tied_bias_alone():
    model = Model()
    model.bias = model.blocks[0].up.bias
    assert_left_alone(model, "blocks.0.up", "its bias is tied to bias")


def test_leaves_both_of_two_tied_layers_alone():
    model = Model()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    patcher = BlockSparseModelPatcher()
    patcher.add_pattern(r".*\.up")
    with pytest.warns(UserWarning, match="left as it is") as caught:
        assert patcher.patch_model(model) == []
    assert [str(warning.message) for warning in caught] == [
        "blocks.0.up: left as it is, since its weight is tied to blocks.1.up.weight",
        "blocks.1.up: left as it is, since its weight is tied to blocks.0.up.weight",
    ]
    assert model.blocks[1].up.weight is model.blocks[0].up.weight


@pytest.mark.parametrize("attribute", ["all_tied_weights_keys", "_tied_weights_keys"])
@pytest.mark.parametrize("inside", [False, True], ids=["at_the_root", "in_a_submodule"])
def test_leaves_a_declared_tie_alone(attribute, inside):
    model = Model()
    if inside:
        setattr(model.blocks[0], attribute, {"up.weight": "down.weight"})
        del model.blocks[0].down
        model.blocks[0].down = nn.Identity()
        patcher = BlockSparseModelPatcher()
        patcher.add_pattern(r"blocks\.0\.up")
        with pytest.warns(UserWarning, match=r"weight is tied to blocks\.0\.down\.weight"):
            assert patcher.patch_model(model) == []
    else:
        setattr(model, attribute, {"head.weight": "embed.weight"})
        assert_left_alone(model, "head", "its weight is tied to embed.weight")


def test_leaves_both_sides_of_a_declared_tie_alone():
    model = Model()
    model.all_tied_weights_keys = {"blocks.1.up.weight": "blocks.0.up.weight"}
    patcher = BlockSparseModelPatcher()
    patcher.add_pattern(r".*\.up")
    with pytest.warns(UserWarning, match="left as it is") as caught:
        assert patcher.patch_model(model) == []
    assert [str(warning.message).split(":")[0] for warning in caught] == LINEAR[0:4:2]


def test_leaves_a_declared_tie_of_old_transformers_alone():
    model = Model()
    model._tied_weights_keys = ["head.weight"]
    assert_left_alone(model, "head", "its weight is tied")


def test_leaves_a_dtype_alone_that_the_products_do_not_know():
    model = Model()
    model.head.to(torch.float8_e4m3fn)
    patcher = BlockSparseModelPatcher()
    patcher.add_pattern("head")
    with pytest.warns(UserWarning, match="head: left as it is, since its weight is torch.float8"):
        assert patcher.patch_model(model) == []
    assert type(model.head) is nn.Linear


def test_subclasses_of_linear_are_not_taken():
    # The output projection of nn.MultiheadAttention is one: its weight is read, it is never called.
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    patched(model, (".*", {"density": 0.5}))
    assert sparse_names(model) == ["linear1", "linear2"]


# --- shared modules -------------------------------------------------------------------------------


@pytest.mark.parametrize("regex", [r"blocks\.0\.up", r"blocks\.1\.up", r"blocks\..\.up"])
def test_a_shared_layer_stays_one_layer_whichever_name_matches(regex):
    model = Model()
    model.blocks[1].up = model.blocks[0].up
    report = patched(model, (regex, {"density": 1.0}))
    assert [entry.name for entry in report] == ["blocks.0.up"]
    assert type(model.blocks[0].up) is BlockSparseLinear
    assert model.blocks[1].up is model.blocks[0].up


def test_a_shared_block_is_patched_once():
    model = Model()
    model.blocks[1] = model.blocks[0]
    before = model(TOKENS)
    report = patched(model, (r"blocks\.1\..*", {"density": 1.0}))
    assert [entry.name for entry in report] == ["blocks.0.up", "blocks.0.down"]
    assert model.blocks[1] is model.blocks[0]
    assert {type(layer) for layer in model.blocks[0].children()} == {BlockSparseLinear}
    torch.testing.assert_close(model(TOKENS), before)


def test_the_first_rule_wins_for_a_shared_layer_too():
    model = Model()
    model.blocks[1].up = model.blocks[0].up
    patched(model, (r"blocks\.1\.up", {"density": 0.25}), (r"blocks\.0\.up", {"density": 1.0}))
    assert model.blocks[0].up.density == 0.25
