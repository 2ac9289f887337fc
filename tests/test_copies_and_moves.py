"""BlockSparseLinear in files, copied, moved, cast, on the meta device, placed by accelerate.

Indices are never cast and never made up.
"""

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from checkpoint_helpers import (
    BLOCK,
    IN,
    OUT,
    assert_same_layer,
    assert_same_tensors,
    assert_sound,
    layer_with,
    model_with,
    snapshot,
    tensors_of,
)
from pytorch_block_sparse import BlockSparseLinear, Pattern

pytestmark = pytest.mark.usefixtures("one_thread")


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
