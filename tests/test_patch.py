"""BlockSparseModelPatcher on plain torch models: which layers it takes, and what it leaves alone.

Models of the transformers library are in test_transformers.py.
"""

import copy
import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from pytorch_block_sparse import (
    BlockSparseLinear,
    BlockSparseModelPatcher,
    PseudoBlockSparseLinear,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These products are too small for threads: waking them is most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(64, 50, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TOKENS = torch.arange(12).reshape(2, 6)
LINEAR = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]


def patched(model, *rules):
    """Patches `model`, in which a warning is an error, and returns the report."""
    patcher = BlockSparseModelPatcher()
    for rule in rules:
        patcher.add_pattern(*rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return patcher.patch_model(model)


def sparse_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, BlockSparseLinear)]


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
