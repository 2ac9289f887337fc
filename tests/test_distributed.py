"""DDP and FSDP2 on two processes: the losses of one process, checkpoints that go to and fro."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from distributed_helpers import batches, layers_of, mlp, train, two_processes
from linear_helpers import outside
from pytorch_block_sparse.distributed import broadcast_patterns_
from pytorch_block_sparse.optim import BlockSET, update_pattern_

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
]


# --- what the two ranks do ------------------------------------------------------------------------


def sharded(model, **options):
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole_state(model):
    options = StateDictOptions(full_state_dict=True)
    return get_state_dict(model, (), options=options)[0]


def state_of(model, optimizer):
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def ddp(rank, folder):
    model = DistributedDataParallel(mlp(seed=rank))  # another pattern: DDP takes that of rank 0
    indices = [layer._index.clone() for layer in layers_of(model)]
    return {"indices": indices, "losses": train(model, rank, 2), "state": model.module.state_dict()}


def fsdp(rank, folder):
    model = sharded(mlp())
    kinds = {name: type(p).__name__ for name, p in model.named_parameters()}
    held = [layer.values.to_local().shape[0] for layer in layers_of(model)]
    return {
        "kinds": kinds,
        "held": held,
        "losses": train(model, rank, 2),
        "state": whole_state(model),
    }


def fsdp_mixed(rank, folder):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(mlp(dtype=torch.float32), mp_policy=policy)
    y = model(batches()[0].float())
    return {
        "losses": train(model, rank, 2),
        "dtypes": [
            y.dtype,
            model[0].values.dtype,
            model[0].values.grad.dtype,
            model[0]._index.dtype,
        ],
    }


def broadcast(rank, folder):
    numbers, empty = mlp(seed=rank), mlp(seed=rank, device="meta")
    for model in (numbers, empty):
        broadcast_patterns_(model)
    said = None
    try:
        broadcast_patterns_(mlp(density=0.3 + 0.2 * rank))
    except ValueError as error:
        said = str(error)
    empty.to_empty(device="cpu")
    return {
        "indices": [layer._index for layer in layers_of(numbers) + layers_of(empty)],
        "outside": [layer.values[outside(layer)].abs().sum() for layer in layers_of(numbers)],
        "said": said,
    }


def fsdp_meta(rank, folder):
    model = sharded(mlp(device="meta"))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for layer in layers_of(model):
            layer.values.fill_(9)  # what is outside must go
            layer.reset_parameters()
    return {"state": whole_state(model), "y": model(batches()[0])}


def fsdp_save(rank, folder):
    model = sharded(mlp(seed=3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(batches()[0]).square().mean().backward()
    optimizer.step()
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "saved")
    return {"state": whole_state(model)}


def fsdp_load(rank, folder):
    """The checkpoint of `fsdp_save`, into a sharded model with other blocks, as many."""
    model = sharded(mlp(seed=4))
    state = {"model": get_state_dict(model, ())[0]}
    dcp.load(state, checkpoint_id=folder / "saved")
    set_model_state_dict(model, state["model"])
    return {"state": whole_state(model), "y": model(batches()[0])}


def fsdp_load_whole(rank, folder):
    """A checkpoint of one process, which only rank 0 has; into empty memory, too."""
    state = mlp(seed=6).state_dict() if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    model = sharded(mlp(seed=4))
    set_model_state_dict(model, dict(state), options=options)  # it writes into the dict
    empty = sharded(mlp(seed=4, device="meta"))
    empty.to_empty(device="cpu")
    set_model_state_dict(empty, dict(state), options=options)
    return {"state": whole_state(model), "empty": whole_state(empty)}


def fsdp_refusals(rank, folder):
    model = sharded(mlp())
    before = whole_state(model)
    options = StateDictOptions(full_state_dict=True)
    attempts = {
        "more_blocks": lambda: set_model_state_dict(
            model, mlp(density=0.5).state_dict(), options=options
        ),
        "method": lambda: BlockSET(model, torch.optim.SGD(model.parameters(), lr=1.0), 10),
        "update": lambda: update_pattern_(model[0], drop=[], grow=[]),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (RuntimeError, ValueError) as error:
            said[name] = str(error)
    after = whole_state(model)
    same = [torch.equal(before[name], after[name]) for name in before if name.startswith("0.")]
    return {"said": said, "same": same}


SCENARIOS = (
    broadcast,
    ddp,
    fsdp,
    fsdp_mixed,
    fsdp_meta,
    fsdp_save,
    fsdp_load,
    fsdp_load_whole,
    fsdp_refusals,
)


def work(rank, folder):
    dist.init_process_group("gloo")
    return {scenario.__name__: scenario(rank, folder) for scenario in SCENARIOS}


# --- what comes of it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    return two_processes(work, folder)


def assert_same_state(state, wanted, **tolerance):
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype
        torch.testing.assert_close(state[name], tensor, **tolerance)


@pytest.mark.parametrize("scenario", ["ddp", "fsdp"])
def test_the_losses_of_one_process(ranks, scenario):
    model = mlp()
    losses = train(model)
    both = torch.stack([rank[scenario]["losses"] for rank in ranks])
    assert not torch.equal(both[0], both[1])  # their batches differ
    torch.testing.assert_close(both.mean(0), losses, rtol=1e-12, atol=0)
    for rank in ranks:
        assert_same_state(rank[scenario]["state"], model.state_dict(), rtol=1e-9, atol=1e-12)


def test_ddp_takes_the_pattern_of_rank_0(ranks):
    wanted = [layer._index for layer in layers_of(mlp(seed=0))]
    assert not torch.equal(wanted[0], layers_of(mlp(seed=1))[0]._index)
    for rank in ranks:
        for index, of_0 in zip(rank["ddp"]["indices"], wanted, strict=True):
            assert torch.equal(index, of_0)


def test_patterns_of_one_rank_for_all(ranks):
    numbers, empty = mlp(seed=0), mlp(seed=0, device="meta").to_empty(device="cpu")
    wanted = [layer._index for layer in layers_of(numbers) + layers_of(empty)]
    for rank in ranks:
        for index, of_0 in zip(rank["broadcast"]["indices"], wanted, strict=True):
            assert torch.equal(index, of_0)
        assert not any(rank["broadcast"]["outside"])
    assert ranks[0]["broadcast"]["said"] is None
    assert "0: has 31 blocks on rank 0, but 52 here" in ranks[1]["broadcast"]["said"]


def test_fsdp_shards_along_the_blocks(ranks):
    counts = [layer.block_count for layer in layers_of(mlp())]
    assert counts[0] % 2 == 1 and counts[2] == 1  # uneven, and a rank with nothing
    assert set(ranks[0]["fsdp"]["kinds"].values()) == {"DTensor"}
    held = [rank["fsdp"]["held"] for rank in ranks]
    assert [sum(both) for both in zip(*held, strict=True)] == counts
    assert held[1][2] == 0


def test_mixed_precision_leaves_the_indices_alone(ranks):
    dtypes = [torch.bfloat16, torch.float32, torch.float32, torch.int32]
    losses = train(mlp(dtype=torch.float32))
    for rank in ranks:
        assert rank["fsdp_mixed"]["dtypes"] == dtypes
    mean = torch.stack([rank["fsdp_mixed"]["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(mean, losses, rtol=0.01, atol=0)


def test_meta_model_gets_its_pattern_and_its_numbers(ranks):
    model, state = mlp(), ranks[0]["fsdp_meta"]["state"]
    model.load_state_dict(state)
    fresh = mlp(device="meta").to_empty(device="cpu")
    for layer, other in zip(layers_of(model), layers_of(fresh), strict=True):
        assert layer.pattern.equal(other.pattern)
        assert (layer.values[outside(layer)] == 0).all()
        # each block is drawn, within the bound of its block row
        bound = layer._present_inputs().clamp(min=1).rsqrt()[layer.pattern.row_indices.long()]
        largest = layer.values.detach().abs().amax((1, 2))
        assert (largest <= bound).all() and (largest > bound / 2).all()
    for rank in ranks:
        torch.testing.assert_close(rank["fsdp_meta"]["y"], model(batches()[0]))


def test_save_on_two_load_on_one(ranks, folder):
    model = mlp(seed=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wanted = ranks[0]["fsdp_save"]["state"]
    assert not torch.equal(model.state_dict()["0.col_indices"], wanted["0.col_indices"])
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder / "saved")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    assert_same_state(model.state_dict(), wanted, rtol=0, atol=0)

    alone = mlp(seed=3)
    theirs = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    alone(batches()[0]).square().mean().backward()
    theirs.step()
    for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[mine]["exp_avg"], theirs.state[other]["exp_avg"])
    torch.testing.assert_close(model(batches()[0]), alone(batches()[0]))


def test_another_number_of_blocks_by_way_of_one_file(ranks, folder):
    dcp_to_torch_save(folder / "saved", folder / "one.pt")
    state = torch.load(folder / "one.pt")["model"]
    model = mlp(seed=4, density=0.7)
    model.load_state_dict(state)
    assert_same_state(model.state_dict(), ranks[0]["fsdp_save"]["state"], rtol=0, atol=0)


def test_a_sharded_model_adopts_the_pattern_of_the_checkpoint(ranks):
    model = mlp()
    model.load_state_dict(ranks[0]["fsdp_save"]["state"])
    for rank in ranks:
        assert_same_state(rank["fsdp_load"]["state"], model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(rank["fsdp_load"]["y"], model(batches()[0]))


def test_a_sharded_model_loads_what_one_process_saved(ranks):
    for rank in ranks:
        for name in ("state", "empty"):
            wanted = mlp(seed=6).state_dict()
            assert_same_state(rank["fsdp_load_whole"][name], wanted, rtol=0, atol=0)


def test_what_a_sharded_model_refuses(ranks):
    for rank in ranks:
        said, same = rank["fsdp_refusals"]["said"], rank["fsdp_refusals"]["same"]
        assert "values: are sharded (fully_shard)" in said["more_blocks"]
        assert "0: its values are sharded" in said["method"]
        assert "layer: its values are sharded" in said["update"]
        assert all(same)
