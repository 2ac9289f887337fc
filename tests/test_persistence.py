"""BlockSparseLinear through all that is done to a module: checkpoints, copies, moves, optimizers.

A pattern is loaded with its values or not at all, and indices are never cast and never made up.
"""

import copy
import io
import pickle
import re

import pytest
import safetensors.torch
import torch
from torch import nn

from pytorch_block_sparse import BlockSparseLinear, Pattern, _resized


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These products are too small for threads: waking them is most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


IN, OUT, BLOCK = 72, 40, (16, 16)  # 3 x 5 blocks, ragged both ways


def layer_with(nnz, seed=0, **options):
    torch.manual_seed(seed)
    return BlockSparseLinear(IN, OUT, density=nnz / 15, block_shape=BLOCK, **options)


def model_with(nnz, seed=0):
    """One name is a prefix of another, with and without a dot between."""
    torch.manual_seed(seed)
    model = nn.Module()
    model.fc = BlockSparseLinear(IN, OUT, density=nnz / 15, block_shape=BLOCK)
    model.fc1 = BlockSparseLinear(IN, OUT, density=nnz / 15, block_shape=BLOCK, bias=False)
    model.block = nn.Module()
    model.block.fc = nn.Sequential(nn.Linear(IN, IN), layer_with(nnz, seed + 1))
    return model


def tensors_of(module):
    """Everything a module holds, also what no checkpoint has."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def snapshot(module):
    return {name: tensor.detach().clone() for name, tensor in tensors_of(module).items()}


def assert_same_tensors(a, b):
    a, b = (tensors_of(m) if isinstance(m, nn.Module) else m for m in (a, b))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor, b[name]), name


def assert_sound(layer):
    """The index is the one that belongs to the saved indices, and the layer computes with it."""
    made_anew = Pattern.from_bsr(
        layer.crow_indices, layer.col_indices, (layer.out_features, layer.in_features), BLOCK
    )
    assert torch.equal(layer._index, made_anew.index)
    x = torch.randn(3, layer.in_features, dtype=layer.values.dtype)
    torch.testing.assert_close(layer(x), layer.to_dense()(x))


def assert_same_layer(a, b):
    assert_same_tensors(a, b)
    for layer in (a, b):
        assert_sound(layer)


# --- the checkpoint -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_keys_of_the_checkpoint(bias):
    state = layer_with(6, bias=bias).state_dict()
    names = ["values", "bias", "crow_indices", "col_indices"]
    assert list(state) == [name for name in names if bias or name != "bias"]
    assert state["crow_indices"].dtype == state["col_indices"].dtype == torch.int32
    assert state["values"].shape == (6, 16, 16)


def test_checkpoint_of_a_ragged_layer_is_zero_outside():
    state = layer_with(15).state_dict()
    assert (state["values"][10:, 8:] == 0).all()
    assert (state["values"][4::5, :, 8:] == 0).all()


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("nnz", [15, 6], ids=["same_number", "more"])
def test_numbers_outside_a_ragged_layer_are_not_loaded(nnz, assign):
    state = layer_with(15).state_dict()
    state["values"].fill_(1)
    target = layer_with(nnz, seed=1)
    target.load_state_dict(state, assign=assign)
    assert target.values.sum() == OUT * IN
    assert torch.equal(target.to_dense().weight, torch.ones(OUT, IN))
    assert state["values"].eq(1).all()  # the checkpoint is not ours to change


LOADS = {"same_number": 6, "fewer": 4, "more": 9, "all": 15, "one": 1}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("nnz", LOADS.values(), ids=LOADS.keys())
def test_adopts_the_pattern_of_the_checkpoint(nnz, assign):
    source, target = layer_with(nnz, seed=1), layer_with(6, seed=2)
    assert not target.pattern.equal(source.pattern)
    keys = target.load_state_dict(source.state_dict(), assign=assign)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert target.block_count == nnz
    assert_same_layer(target, source)


def test_loads_the_same_number_of_blocks_in_place():
    source, target = layer_with(6, seed=1), layer_with(6, seed=2)
    before = {name: (id(t), t.data_ptr()) for name, t in tensors_of(target).items()}
    target.load_state_dict(source.state_dict())
    assert {name: (id(t), t.data_ptr()) for name, t in tensors_of(target).items()} == before


@pytest.mark.parametrize("nnz", [4, 9], ids=["fewer", "more"])
def test_another_number_of_blocks_keeps_the_parameter(nnz):
    source, target = layer_with(nnz, seed=1), layer_with(6, seed=2)
    values = target.values
    target(torch.randn(3, IN)).sum().backward()
    target.load_state_dict(source.state_dict())
    assert target.values is values and values.requires_grad
    assert values.grad is None
    target(torch.randn(3, IN)).sum().backward()
    assert values.grad.shape == (nnz, 16, 16)


def test_gradients_survive_a_load_only_with_their_pattern():
    layer = layer_with(6)
    layer(torch.randn(3, IN)).sum().backward()
    gradient = layer.values.grad
    layer.load_state_dict(copy.deepcopy(layer).state_dict())
    assert layer.values.grad is gradient
    layer.load_state_dict(layer_with(6, seed=1).state_dict())  # as many blocks, others
    assert layer.values.grad is None and layer.bias.grad is not None


@pytest.mark.parametrize("nnz", [6, 9], ids=["same_number", "more"])
def test_loading_shares_no_memory_with_the_checkpoint(nnz):
    source, target = layer_with(nnz, seed=1), layer_with(6, seed=2)
    target.load_state_dict(source.state_dict())
    before = snapshot(source)
    target.load_state_dict(layer_with(nnz, seed=3).state_dict())
    assert_same_tensors(source, before)


def test_assign_takes_the_tensors_of_the_checkpoint():
    source, target = layer_with(9, seed=1), layer_with(6, seed=2)
    target.values.requires_grad_(False)
    state = source.state_dict()
    target.load_state_dict(state, assign=True)
    for name, tensor in state.items():
        assert getattr(target, name).data_ptr() == tensor.data_ptr(), name
    assert isinstance(target.values, nn.Parameter)
    assert not target.values.requires_grad and target.bias.requires_grad


def test_casts_the_checkpoint_to_the_dtype_of_the_layer():
    source, target = layer_with(9, seed=1, dtype=torch.float64), layer_with(6, dtype=torch.bfloat16)
    target.load_state_dict(source.state_dict())
    assert_same_layer(target, source.bfloat16())


def test_loads_int64_indices():
    source, target = layer_with(6, seed=1), layer_with(6, seed=2)
    state = source.state_dict()
    for assign in (False, True):
        for name in ("crow_indices", "col_indices"):
            state[name] = state[name].long()
        target.load_state_dict(state, assign=assign)
        assert_same_layer(target, source)


@pytest.mark.parametrize("nnz", [6, 9], ids=["same_number", "more"])
def test_swapping_of_tensors_loads_too(nnz):
    source, target = layer_with(nnz, seed=1), layer_with(6, seed=2)
    values = target.values
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        target.load_state_dict(source.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert target.values is values
    assert_same_layer(target, source)


def test_nested_modules_with_names_that_are_prefixes():
    source, target = model_with(9, seed=1), model_with(6, seed=5)
    target.load_state_dict(source.state_dict())
    assert_same_tensors(target, source)
    for layer in (target.fc, target.fc1, target.block.fc[1]):
        assert_sound(layer)


def test_a_load_hook_and_a_tensor_of_a_subclass_are_served():
    class Scaled(BlockSparseLinear):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = nn.Parameter(torch.ones(1))
            self.register_buffer("steps", torch.zeros(()))
            self.adapter = nn.Linear(3, 3)

    source, target = (Scaled(IN, OUT, density=0.4, block_shape=BLOCK) for _ in range(2))
    with torch.no_grad():
        source.scale.fill_(7)
        source.steps.fill_(5)
    seen = []
    target.register_load_state_dict_pre_hook(lambda module, *args: seen.append(module))
    target.load_state_dict(source.state_dict())
    assert_same_tensors(target, source)
    assert seen == [target]


# --- checkpoints that do not fit ----------------------------------------------------------------


def corrupt(name, change):
    def apply(state):
        state[name] = change(state[name].clone())

    return apply


def put(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def another_shape(state):
    torch.manual_seed(1)
    other = BlockSparseLinear(IN, OUT + 16, density=0.4, block_shape=BLOCK)
    state.update(other.state_dict())


def another_block_shape(state):
    torch.manual_seed(1)
    state.update(BlockSparseLinear(IN, OUT, density=0.4, block_shape=(16, 8)).state_dict())


# what is done to a good checkpoint, and what the message says
CORRUPTIONS = {
    "values_too_few": (corrupt("values", lambda t: t[:-1]), "values: must be [9, 16, 16], got [8"),
    "values_flat": (corrupt("values", lambda t: t.flatten()), "values: must be [9, 16, 16], got"),
    "values_int": (corrupt("values", lambda t: t.int()), "values: must be floating point"),
    "values_complex": (corrupt("values", lambda t: t.cfloat()), "values: must be floating point"),
    "values_meta": (corrupt("values", lambda t: t.to("meta")), "values: must be floating point, w"),
    "values_array": (corrupt("values", lambda t: t.numpy()), "values: must be a tensor, got ndarr"),
    "bias_too_long": (corrupt("bias", lambda t: t.repeat(2)), "bias: must be [40], got [80]"),
    "bias_meta": (corrupt("bias", lambda t: t.to("meta")), "bias: must be floating point, with n"),
    "bias_list": (corrupt("bias", lambda t: t.tolist()), "bias: must be a tensor, got list"),
    "crow_too_short": (corrupt("crow_indices", lambda t: t[:-1]), "crow_indices: has 3 entries"),
    "crow_empty": (corrupt("crow_indices", lambda t: t[:0]), "crow_indices: has 0 entries"),
    "crow_first": (corrupt("crow_indices", put(0, 1)), "crow_indices"),
    "crow_not_monotone": (corrupt("crow_indices", put(1, 100)), "crow_indices"),
    "crow_negative": (corrupt("crow_indices", put(1, -1)), "crow_indices"),
    "crow_last": (corrupt("crow_indices", put(-1, 8)), "crow_indices"),
    "crow_last_huge": (corrupt("crow_indices", put(-1, 2**31 - 1)), "crow_indices"),
    "crow_float": (corrupt("crow_indices", lambda t: t.float()), "crow_indices: dtype must be int"),
    "crow_2d": (corrupt("crow_indices", lambda t: t[None]), "crow_indices: must have one dimens"),
    "crow_list": (corrupt("crow_indices", lambda t: t.tolist()), "crow_indices: must be a tensor"),
    "col_too_large": (corrupt("col_indices", put(2, 5)), "col_indices"),
    "col_negative": (corrupt("col_indices", put(2, -1)), "col_indices"),
    "col_twice": (corrupt("col_indices", lambda t: t * 0), "col_indices"),
    "col_not_sorted": (corrupt("col_indices", lambda t: t.flip(0)), "col_indices"),
    "col_too_short": (corrupt("col_indices", lambda t: t[:-1]), "_indices"),
    "col_too_long": (corrupt("col_indices", lambda t: t.repeat(2)), "_indices"),
    "col_int64_huge": (corrupt("col_indices", lambda t: t.long() + 2**40), "col_indices: has an"),
    "col_uint8": (corrupt("col_indices", lambda t: t.byte()), "col_indices: dtype must be int32"),
    "col_meta": (corrupt("col_indices", lambda t: t.to("meta")), "indices"),
    "of_another_shape": (another_shape, "crow_indices: has 5 entries; 3 block rows need 4"),
    "of_another_block_shape": (another_block_shape, "fc.: "),
}


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not_strict"])
@pytest.mark.parametrize(("change", "text"), CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_a_checkpoint_that_does_not_fit_changes_nothing(change, text, strict, assign):
    target = nn.ModuleDict({"fc": layer_with(6, seed=2)})
    before, objects = snapshot(target), {n: id(t) for n, t in tensors_of(target).items()}
    state = layer_with(9, seed=1).state_dict()
    change(state)
    state = {f"fc.{key}": value for key, value in state.items()}
    with pytest.raises(RuntimeError, match=re.escape("fc.: ")) as caught:
        target.load_state_dict(state, strict=strict, assign=assign)
    assert text in str(caught.value)
    assert_same_tensors(target, before)
    assert {n: id(t) for n, t in tensors_of(target).items()} == objects
    assert_sound(target["fc"])


@pytest.mark.parametrize("nnz", [6, 9], ids=["same_number", "more"])
@pytest.mark.parametrize("name", ["values", "crow_indices", "col_indices"])
def test_a_missing_key_is_reported_and_no_half_of_a_pattern_loaded(name, nnz):
    source, target = layer_with(nnz, seed=1), layer_with(6, seed=2)
    before = snapshot(target)
    state = source.state_dict()
    del state[name]
    with pytest.raises(RuntimeError, match=f'Missing key\\(s\\) in state_dict: "{name}". '):
        copy.deepcopy(target).load_state_dict(state)
    keys = target.load_state_dict(state, strict=False)
    assert keys.missing_keys == [name] and not keys.unexpected_keys
    assert_same_tensors(target, before | {"bias": source.bias})  # as nn.Module: the rest is loaded
    assert_sound(target)


def test_a_missing_bias_is_reported_and_the_rest_loaded():
    source, target = layer_with(9, seed=1), layer_with(6, seed=2)
    bias = target.bias.clone()
    state = source.state_dict()
    del state["bias"]
    keys = target.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["bias"]
    assert torch.equal(target.values, source.values) and torch.equal(target.bias, bias)
    assert_sound(target)


def test_missing_and_unexpected_keys_are_those_of_nn_module():
    source, target = model_with(6, seed=1), model_with(6, seed=2)
    state = source.state_dict()
    state["fc.extra"] = state.pop("fc.values")
    state["fc.sub.bias"] = state["fc1.bias"] = torch.zeros(1)
    state["fc2.values"] = state["_index"] = state["fc._index"] = torch.zeros(1)
    keys = target.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["fc.values"]
    assert sorted(keys.unexpected_keys) == [
        "_index",
        "fc._index",
        "fc.extra",
        "fc.sub.bias",
        "fc1.bias",
        "fc2.values",
    ]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        target.load_state_dict(state)


def test_a_checkpoint_of_a_dense_layer_is_refused_by_its_keys():
    target = layer_with(6)
    before = snapshot(target)
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        target.load_state_dict({"weight": torch.zeros(OUT, IN)})
    assert 'Unexpected key(s) in state_dict: "weight"' in str(caught.value)
    assert_same_tensors(target, before)


# --- files and copies ---------------------------------------------------------------------------


def through_torch_save(model, path):
    torch.save(model.state_dict(), path)
    return torch.load(path, weights_only=True)


def through_safetensors(model, path):
    safetensors.torch.save_file(model.state_dict(), path)
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("through", [through_torch_save, through_safetensors])
@pytest.mark.parametrize("nnz", [6, 9], ids=["same_number", "more"])
def test_checkpoint_files(through, nnz, tmp_path):
    source, target = model_with(nnz, seed=1), model_with(6, seed=5)
    target.load_state_dict(through(source, tmp_path / "file"))
    assert_same_tensors(target, source)
    for layer in (target.fc, target.fc1, target.block.fc[1]):
        assert_sound(layer)


def test_safetensors_save_model_and_load_model(tmp_path):
    source, target = model_with(9, seed=1), model_with(6, seed=5)
    safetensors.torch.save_model(source, tmp_path / "file")
    safetensors.torch.load_model(target, tmp_path / "file")
    assert_same_tensors(target, source)


def test_a_checkpoint_file_holds_little_more_than_its_tensors():
    state = BlockSparseLinear(256, 256, density=0.25).state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < sum(t.nbytes for t in state.values()) + 4096


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_whole_module_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, through_pickle, through_whole_module_file])
def test_copies_are_equal_and_independent(again):
    layer = layer_with(6).eval()
    layer.bias.requires_grad_(False)
    twin = again(layer)
    assert_same_layer(twin, layer)
    assert not twin.training
    assert [p.requires_grad for p in twin.parameters()] == [True, False]
    assert repr(twin) == repr(layer)
    before = snapshot(layer)
    twin.load_state_dict(layer_with(6, seed=7).state_dict())
    assert_same_tensors(layer, before)


def test_copy_on_the_meta_device():
    twin = copy.deepcopy(layer_with(6, device="meta"))
    twin.to_empty(device="cpu").reset_parameters()
    assert_sound(twin)


# --- moves and casts ----------------------------------------------------------------------------

CASTS = {
    "to_double": (lambda m: m.to(torch.float64), torch.float64),
    "to_device_and_dtype": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "type": (lambda m: m.type(torch.float64), torch.float64),
    "to_tensor": (lambda m: m.to(torch.zeros(1, dtype=torch.float16)), torch.float16),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS.keys())
def test_casts_leave_the_indices_alone(cast, dtype):
    model = nn.Sequential(layer_with(6))
    values, before = model[0].values, snapshot(model[0])
    indices = dict(model[0].named_buffers())
    cast(model)
    assert model[0].values is values
    assert {p.dtype for p in model.parameters()} == {dtype}
    for name, buffer in model[0].named_buffers():
        assert buffer is indices[name] and torch.equal(buffer, before[name])
    assert torch.equal(model[0].values, before["values"].to(dtype))
    assert_sound(model[0])


def test_to_meta_and_back_keeps_the_pattern():
    model = nn.Sequential(layer_with(6))
    pattern = Pattern.from_mask(model[0].pattern.mask(), BLOCK, (OUT, IN))
    model.to("meta")
    assert {t.device.type for t in tensors_of(model).values()} == {"meta"}
    assert model[0](torch.zeros(2, IN, device="meta")).shape == (2, OUT)
    model.half().to_empty(device="cpu")
    assert model[0].values.dtype == torch.float16
    assert model[0].pattern.equal(pattern)
    model[0].reset_parameters()
    assert_sound(model[0])


def test_to_empty_keeps_the_pattern_of_a_module_with_numbers():
    layer = layer_with(6)
    before = snapshot(layer)
    layer.to_empty(device="cpu")
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])


def test_meta_to_empty_reset_parameters():
    layer = layer_with(6, device="meta")
    layer.reset_parameters()  # nothing to draw
    layer.to_empty(device="cpu")
    assert layer.block_count == 6
    with torch.no_grad():
        layer.values.fill_(torch.nan)
    layer.reset_parameters()
    assert_sound(layer)
    dense = layer.to_dense().weight
    assert dense.isfinite().all() and (dense != 0).any()


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"device": "cpu"}], ids=str)
def test_skip_init(options):
    layer = nn.utils.skip_init(
        BlockSparseLinear, IN, OUT, density=0.4, block_shape=BLOCK, **options
    )
    assert layer.block_count == 6 and layer.values.device.type == "cpu"
    assert layer.values.dtype == options.get("dtype", torch.float32)
    layer.reset_parameters()
    assert_sound(layer)


@pytest.mark.parametrize("nnz", [6, 9], ids=["same_number", "more"])
def test_meta_and_load_by_assignment(nnz):
    source = model_with(nnz, seed=1)
    with torch.device("meta"):
        target = model_with(6, seed=5)
    target.load_state_dict(source.state_dict(), assign=True)
    assert_same_tensors(target, source)
    target.double()  # the pattern that the meta module had must not come back
    assert torch.equal(target.fc.col_indices, source.fc.col_indices)
    for layer in (target.fc, target.fc1, target.block.fc[1]):
        assert_sound(layer)


@pytest.mark.parametrize("nnz", [6, 9], ids=["same_number", "more"])
def test_meta_to_empty_and_load(nnz):
    source = layer_with(nnz, seed=1)
    target = layer_with(6, seed=2, device="meta").to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    assert_same_layer(target, source)


def test_loading_into_a_meta_module_is_a_no_op_with_a_warning():
    target = layer_with(6, seed=2, device="meta")
    pattern = target._host_pattern
    with pytest.warns(UserWarning, match="assign=True"):
        target.load_state_dict(layer_with(6, seed=1).state_dict())
    assert target.values.is_meta
    target.to_empty(device="cpu")
    assert target.pattern.equal(pattern)


def test_share_memory_shares_the_indices_too():
    layer = layer_with(6)
    before = snapshot(layer)
    layer.share_memory()
    assert all(t.is_shared() for t in tensors_of(layer).values())
    assert_same_tensors(layer, before)


# --- a checkpoint placed tensor by tensor ---------------------------------------------------------


@pytest.mark.parametrize("buffers_too", [False, True], ids=["parameters", "parameters_and_buffers"])
@pytest.mark.parametrize("nnz", [6, 9], ids=["same_number", "more"])
def test_accelerate_init_empty_weights(nnz, buffers_too):
    accelerate = pytest.importorskip("accelerate")
    source = layer_with(nnz, seed=1)
    with accelerate.init_empty_weights(include_buffers=buffers_too):
        target = layer_with(6, seed=2)
    assert target.values.is_meta
    target.load_state_dict(source.state_dict(), assign=True)
    assert_same_layer(target, source)


def test_accelerate_load_checkpoint_and_dispatch(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    source = model_with(6, seed=1)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    with accelerate.init_empty_weights():
        target = model_with(6, seed=5)
    target = accelerate.load_checkpoint_and_dispatch(
        target, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}
    )
    target.to("cpu")
    for name in ("fc", "fc1", "block.fc.1"):
        assert_same_layer(target.get_submodule(name), source.get_submodule(name))


def test_a_cast_of_an_offloaded_pattern_says_who_holds_it():
    accelerate = pytest.importorskip("accelerate")
    source = layer_with(6)
    target = accelerate.cpu_offload(
        nn.Sequential(copy.deepcopy(source)), torch.device("cpu"), offload_buffers=True
    )
    target(torch.randn(3, IN))
    assert target[0].crow_indices.is_meta
    with pytest.raises(RuntimeError, match=r"^crow_indices.*meta device.*offload_buffers=True"):
        target.double()
    accelerate.hooks.remove_hook_from_submodules(target)  # as the message says
    target.double()
    assert_same_layer(target[0], source.double())


@pytest.mark.parametrize("name", ["crow_indices", "col_indices"])
def test_a_cast_of_indices_that_someone_put_on_meta_says_what_is_wrong(name):
    layer = layer_with(6)
    setattr(layer, name, getattr(layer, name).to("meta"))
    with pytest.raises(RuntimeError, match=r"^crow_indices, col_indices: are on the meta device"):
        layer.half()
    assert layer.values.dtype == torch.float32


def test_transformers_from_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "block_sparse_test"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.fc = BlockSparseLinear(IN, OUT, density=0.4, block_shape=BLOCK)
            self.post_init()

    source = Model(Config())
    source.save_pretrained(tmp_path)
    target = Model.from_pretrained(tmp_path)
    assert_same_layer(target.fc, source.fc)


# --- as a part of a module ------------------------------------------------------------------------


def test_what_named_parameters_and_named_buffers_give():
    layer = layer_with(6)
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert [name for name, _ in layer.named_buffers()] == ["crow_indices", "col_indices", "_index"]


def test_requires_grad_off_trains_nothing():
    layer = layer_with(6).requires_grad_(False)
    assert not layer(torch.randn(3, IN)).requires_grad
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.any() and layer.values.grad is None and layer.bias.grad is None


def test_parameters_to_vector_and_back():
    source, target = layer_with(6, seed=1), layer_with(6, seed=2)
    vector = nn.utils.parameters_to_vector(source.parameters())
    assert vector.numel() == 6 * 256 + OUT
    nn.utils.vector_to_parameters(vector, target.parameters())
    assert torch.equal(target.values, source.values) and torch.equal(target.bias, source.bias)


def test_broadcast_of_parameters_and_buffers():
    # What DistributedDataParallel does at its start: rank 0 writes into the tensors of the others.
    source, target = layer_with(6, seed=1), layer_with(6, seed=2)
    with torch.no_grad():
        for mine, theirs in zip(
            (*target.parameters(), *target.buffers()),
            (*source.parameters(), *source.buffers()),
            strict=True,
        ):
            mine.copy_(theirs)
    assert_same_layer(target, source)


# --- optimizers -----------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def train(layer, optimizer, steps=1):
    x, target = torch.randn(64, IN), torch.randn(64, OUT)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
    return loss.item()


@optimizers
def test_optimizers_do_as_with_the_dense_layer(make):
    # At density 1 with blocks that fit, the same numbers in another order: the same training.
    sparse = BlockSparseLinear(64, 32, density=1.0, block_shape=BLOCK, dtype=torch.float64)
    dense = sparse.to_dense()
    x, target = torch.randn(20, 64).double(), torch.randn(20, 32).double()
    for layer in (sparse, dense):
        optimizer = make(layer.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(layer(x), target).backward()
            optimizer.step()
    torch.testing.assert_close(sparse.weight.to_dense(), dense.weight)
    torch.testing.assert_close(sparse.bias, dense.bias)


@optimizers
def test_an_optimizer_trains_on_after_another_pattern_of_the_same_number(make):
    layer = layer_with(6)
    optimizer = make(layer.parameters())
    train(layer, optimizer)
    layer.load_state_dict(layer_with(6, seed=1).state_dict())
    before = snapshot(layer)
    train(layer, optimizer)
    assert not torch.equal(layer.values, before["values"])
    assert_sound(layer)


@pytest.mark.parametrize("nnz", [4, 9], ids=["fewer", "more"])
@pytest.mark.parametrize("kind", ["adamw", "adamw_foreach", "adamw_fused", "sgd_momentum", "sgd"])
def test_a_new_optimizer_trains_on_after_another_number_of_blocks(kind, nnz):
    layer = layer_with(6)
    optimizer = OPTIMIZERS[kind](layer.parameters())
    layer.load_state_dict(layer_with(nnz, seed=1).state_dict())
    before = snapshot(layer)
    train(layer, optimizer, steps=3)
    assert (layer.values != before["values"]).flatten(1).any(dim=1).all()  # each block
    assert_sound(layer)


@pytest.mark.parametrize("nnz", [4, 9], ids=["fewer", "more"])
@pytest.mark.parametrize("kind", ["adamw", "adamw_foreach", "adamw_fused", "sgd_momentum"])
def test_an_optimizer_with_moments_of_the_old_shape_refuses_to_step(kind, nnz):
    # torch's fused optimizers do not check: they would write out of bounds.
    layer = layer_with(6)
    optimizer = OPTIMIZERS[kind](layer.parameters())
    train(layer, optimizer)
    layer.load_state_dict(layer_with(nnz, seed=1).state_dict())
    before = snapshot(layer)
    moment = "momentum_buffer" if kind == "sgd_momentum" else "exp_avg"
    text = f"holds {moment} [6, 16, 16] for values that are now [{nnz}, 16, 16]"
    with pytest.raises(RuntimeError, match=re.escape(text)):
        train(layer, optimizer)
    assert_same_tensors(layer, before)

    optimizer.state.pop(layer.values)  # as the message says
    first = train(layer, optimizer)
    assert train(layer, optimizer, steps=3) != first
    assert (layer.values != before["values"]).flatten(1).any(dim=1).all()


def test_a_layer_whose_moments_fit_is_looked_at_no_more():
    layer = layer_with(6)
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    layer.load_state_dict(layer_with(9, seed=1).state_dict())
    assert layer in _resized._resized
    train(layer, optimizer)  # the state is made in this step
    assert layer in _resized._resized
    train(layer, optimizer)
    assert layer not in _resized._resized
    layer.load_state_dict(layer_with(6).state_dict())
    with pytest.raises(RuntimeError, match="holds exp_avg"):
        train(layer, optimizer)


def test_factored_moments_of_the_new_shape_are_no_error():
    layer = layer_with(6)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer.load_state_dict(layer_with(9, seed=1).state_dict())
    train(layer, optimizer, steps=2)
    assert optimizer.state[layer.values]["row_var"].shape == (9, 16, 1)
    layer.load_state_dict(layer_with(6).state_dict())
    with pytest.raises(RuntimeError, match="holds row_var"):
        train(layer, optimizer)


@pytest.mark.parametrize("nnz", [4, 9], ids=["fewer", "more"])
def test_resuming_with_the_optimizers_state(nnz):
    saved = layer_with(nnz, seed=1)
    saved_optimizer = OPTIMIZERS["adamw"](saved.parameters())
    train(saved, saved_optimizer, steps=2)

    layer = layer_with(6)
    optimizer = OPTIMIZERS["adamw"](layer.parameters())
    train(layer, optimizer)
    layer.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(copy.deepcopy(saved_optimizer.state_dict()))
    for one, its_optimizer in ((saved, saved_optimizer), (layer, optimizer)):
        torch.manual_seed(5)
        train(one, its_optimizer, steps=2)
    assert_same_layer(layer, saved)
