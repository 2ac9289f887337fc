"""Layers cut over two processes: forward, gradients, training and checkpoints of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from distributed_helpers import train, two_processes
from pytorch_block_sparse import BlockSparseLinear, BlockSparseMatrix, Pattern
from pytorch_block_sparse.distributed import (
    BlockSparseColwiseParallel,
    BlockSparseRowwiseParallel,
    balanced_cuts,
)
from pytorch_block_sparse.optim import BlockSET

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo"),
]

COLWISE, ROWWISE = BlockSparseColwiseParallel, BlockSparseRowwiseParallel
SEQUENCE = Shard(1)


class MLP(nn.Module):
    """Ragged, of two block shapes; most blocks of the hidden features are among the first."""

    def __init__(self, seed=0, share=0.2, device=None):
        super().__init__()
        torch.manual_seed(seed)
        up, down = torch.rand(13, 8) < share, torch.rand(4, 25) < share
        up[:3], down[:, :6] = True, True
        options = {"device": device, "dtype": torch.float64}
        pattern = Pattern.from_mask(up, (8, 8), (100, 60))
        self.up = BlockSparseLinear(60, 100, pattern=pattern, **options)
        pattern = Pattern.from_mask(down, (16, 4), (60, 100))
        self.down = BlockSparseLinear(100, 60, pattern=pattern, **options)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def cuts_of(mlp):
    return balanced_cuts(2, colwise=[mlp.up], rowwise=[mlp.down])


def parallel(mlp):
    cuts = cuts_of(mlp)
    plan = {"up": COLWISE(cuts=cuts), "down": ROWWISE(cuts=cuts)}
    return parallelize_module(mlp, init_device_mesh("cpu", (2,)), plan)


def tokens(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def gradients_of(layer):
    """Of the weight, densely, and of the bias."""
    weight = BlockSparseMatrix(layer.values.grad, layer.pattern).to_dense()
    return {"weight": weight, "bias": layer.bias.grad}


# --- what the two ranks do ------------------------------------------------------------------------


def pair(rank, folder):
    mlp = parallel(MLP(seed=rank))  # other numbers: rank 0 has the say
    x = tokens(2, 5, 60).requires_grad_()
    y = mlp(x)
    (y * tokens(*y.shape)).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        "up": gradients_of(mlp.up),
        "down": gradients_of(mlp.down),
        "blocks": mlp.up.values.numel() + mlp.down.values.numel(),
        "said": repr(mlp.up),
    }


# the style's layouts: of the input, of the output, a plain tensor or not
LAYOUTS = {
    "colwise to whole": ("up", COLWISE, Replicate(), Replicate(), True),
    "colwise to DTensor": ("up", COLWISE, Replicate(), Replicate(), False),
    "colwise of sequence to sequence": ("up", COLWISE, SEQUENCE, SEQUENCE, True),
    "rowwise of whole": ("down", ROWWISE, Replicate(), Replicate(), True),
    "rowwise to sequence": ("down", ROWWISE, Replicate(), SEQUENCE, True),
    "rowwise of sequence to DTensor": ("down", ROWWISE, SEQUENCE, SEQUENCE, False),
}


def part_of(tensor, layout, rank):
    return tensor.chunk(2, layout.dim)[rank] if isinstance(layout, Shard) else tensor


def layouts(rank, folder):
    """Each layer alone; its own cuts."""
    results = {}
    for case, (name, style, of, to, local) in LAYOUTS.items():
        layer = getattr(MLP(seed=rank), name)
        options = {"input_layouts": of, "output_layouts": to, "use_local_output": local}
        parallelize_module(layer, init_device_mesh("cpu", (2,)), style(**options))
        full = tokens(2, 6, 60 if name == "up" else 100)
        x = part_of(full, of, rank).clone().requires_grad_()
        y = layer(x)
        kind = type(y)
        if not local:
            y = y.to_local()
        goal = tokens(2, 6, 100 if name == "up" else 60)
        (y * part_of(goal, to, rank)).sum().backward()
        results[case] = {"y": y.detach(), "x": x.grad, "plain": kind is torch.Tensor}
        results[case] |= gradients_of(layer)
    return results


def even(rank, folder):
    """DTensors from one layer to the next, which exist of equal parts only."""
    mlp, cuts = MLP(), [0, 64, 128]
    up = BlockSparseLinear(60, 128, block_shape=(16, 8), dtype=torch.float64)
    down = BlockSparseLinear(128, 60, block_shape=(8, 16), dtype=torch.float64)
    mlp.up, mlp.down = up, down
    x = tokens(3, 60)
    wanted = mlp(x).detach()
    plan = {"up": COLWISE(cuts=cuts, use_local_output=False), "down": ROWWISE(cuts=cuts)}
    parallelize_module(mlp, init_device_mesh("cpu", (2,)), plan)
    hidden = mlp.up(x)
    return {
        "sharded": isinstance(hidden, DTensor) and tuple(hidden.shape) == (3, 128),
        "y": mlp(x).detach(),
        "wanted": wanted,
    }


def training(rank, folder):
    mlp = parallel(MLP())
    losses = train(mlp)
    state = mlp.state_dict()
    dcp.save({"model": get_model_state_dict(mlp)}, checkpoint_id=folder / "saved")
    return {"losses": losses, "state": state}


def loading(rank, folder):
    """Another pattern, of another number of blocks; and one in which rank 1 has none at all."""
    mlp = parallel(MLP())
    mlp.load_state_dict(MLP(seed=3, share=0.5).state_dict())
    state = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    results = {"y": mlp(tokens(3, 60)).detach(), "state": state}
    mlp.load_state_dict(first_features_only().state_dict())
    results |= {"empty": mlp.up.block_count, "few": mlp(tokens(3, 60)).detach()}
    set_model_state_dict(mlp, MLP(seed=4).state_dict())
    return results | {"set": mlp.state_dict()}


def first_features_only():
    mlp = MLP(seed=5)
    up, down = torch.zeros(13, 8, dtype=torch.bool), torch.zeros(4, 25, dtype=torch.bool)
    up[0], down[:, 0] = True, True
    options = {"dtype": torch.float64}
    mlp.up = BlockSparseLinear(60, 100, pattern=Pattern.from_mask(up, (8, 8), (100, 60)), **options)
    mlp.down = BlockSparseLinear(
        100, 60, pattern=Pattern.from_mask(down, (16, 4), (60, 100)), **options
    )
    return mlp


def meta(rank, folder):
    mlp = parallel(MLP(device="meta")).to_empty(device="cpu")
    torch.manual_seed(rank)
    for layer in (mlp.up, mlp.down):
        layer.reset_parameters()
    return {"state": mlp.state_dict()}


def two_dimensions(rank, folder):
    """FSDP2 over one dimension of the mesh, of size 1 here, the parts over the other."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    mlp, cuts = MLP(), cuts_of(MLP())
    plan = {"up": COLWISE(cuts=cuts), "down": ROWWISE(cuts=cuts)}
    parallelize_module(mlp, mesh["tp"], plan)
    for layer in (mlp.up, mlp.down):
        fully_shard(layer, mesh=mesh["dp"])
    losses = train(mlp)
    try:
        mlp.state_dict()
    except ValueError as error:
        return {"losses": losses, "said": str(error)}


def refusals(rank, folder):
    line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    small = BlockSparseLinear(64, 16, block_shape=(16, 16))
    cut = parallel(MLP())
    whole = MLP().state_dict()
    hostile = {**whole, "up.col_indices": whole["up.col_indices"] + 8}
    attempts = {
        "few_rows": lambda: parallelize_module(small, line, COLWISE()),
        "dimensions": lambda: parallelize_module(MLP().up, square, COLWISE()),
        "dense": lambda: parallelize_module(nn.Linear(8, 8), line, ROWWISE()),
        "twice": lambda: parallelize_module(cut.up, line, COLWISE()),
        "number": lambda: parallelize_module(MLP().up, line, COLWISE(cuts=[0, 40, 80, 100])),
        "end": lambda: parallelize_module(MLP().up, line, COLWISE(cuts=[0, 40, 96])),
        "block": lambda: parallelize_module(MLP().up, line, COLWISE(cuts=[0, 44, 100])),
        "order": lambda: parallelize_module(MLP().up, line, COLWISE(cuts=[0, 0, 100])),
        "uneven": lambda: parallelize_module(MLP().up, line, COLWISE(use_local_output=False)),
        "prepack": lambda: cut.up.prepack(),
        "method": lambda: BlockSET(cut, torch.optim.SGD(cut.parameters(), lr=1.0), 10),
        "width": lambda: cut.down(tokens(3, 100)),
        "corrupt": lambda: cut.load_state_dict(hostile),
        "no_values": lambda: cut.load_state_dict({**whole, "up.values": whole["up.values"][1:]}),
        "bias": lambda: cut.load_state_dict({**whole, "up.bias": whole["up.bias"][1:]}),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (RuntimeError, TypeError, ValueError) as error:
            said[name] = str(error)
    return {"said": said, "untouched": type(small) is BlockSparseLinear}


SCENARIOS = (pair, layouts, even, training, loading, meta, two_dimensions, refusals)


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


def assert_close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)


def assert_same_state(state, wanted, close=torch.testing.assert_close):
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        close(state[name], tensor)


def test_forward_and_gradients_of_an_mlp(ranks):
    mlp = MLP()
    x = tokens(2, 5, 60).requires_grad_()
    y = mlp(x)
    (y * tokens(*y.shape)).sum().backward()
    parts = [rank["pair"] for rank in ranks]
    for part in parts:
        assert_close(part["y"], y.detach())
        assert_close(part["x"], x.grad)
        assert_close(part["down"]["bias"], mlp.down.bias.grad)
    up, down = gradients_of(mlp.up), gradients_of(mlp.down)
    assert_close(torch.cat([part["up"]["weight"] for part in parts]), up["weight"])
    assert_close(torch.cat([part["up"]["bias"] for part in parts]), up["bias"])
    assert_close(torch.cat([part["down"]["weight"] for part in parts], 1), down["weight"])
    cuts = cuts_of(mlp)
    assert cuts[1] < 48  # not at half of the features
    assert f"part=0:{cuts[1]} of 100" in parts[0]["said"]


def test_the_parts_are_balanced(ranks):
    blocks = [rank["pair"]["blocks"] for rank in ranks]
    mlp = MLP()
    assert sum(blocks) == mlp.up.values.numel() + mlp.down.values.numel()
    assert max(blocks) < 0.6 * sum(blocks)


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts(ranks, case):
    name, _, of, to, local = LAYOUTS[case]
    layer = getattr(MLP(), name)
    x = tokens(2, 6, layer.in_features).requires_grad_()
    y = layer(x)
    (y * tokens(*y.shape)).sum().backward()
    wanted, parts = gradients_of(layer), [rank["layouts"][case] for rank in ranks]
    for rank, part in enumerate(parts):
        assert part["plain"] == local
        assert_close(part["y"], part_of(y.detach(), to, rank))
        assert_close(part["x"], part_of(x.grad, of, rank))
        if name == "down":
            assert_close(part["bias"], wanted["bias"])
    dim = 0 if name == "up" else 1
    assert_close(torch.cat([part["weight"] for part in parts], dim), wanted["weight"])
    if name == "up":
        assert_close(torch.cat([part["bias"] for part in parts]), wanted["bias"])


def test_dtensors_from_layer_to_layer(ranks):
    for rank in ranks:
        assert rank["even"]["sharded"]
        assert_close(rank["even"]["y"], rank["even"]["wanted"])


def test_training_and_its_checkpoint(ranks, folder):
    mlp = MLP()
    losses = train(mlp)
    for rank in ranks:
        assert_close(rank["training"]["losses"], losses)

        def close(a, b):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)

        assert_same_state(rank["training"]["state"], mlp.state_dict(), close)
    alone = MLP(share=0.2)
    with torch.no_grad():
        alone.up.values.zero_()
    state = {"model": get_model_state_dict(alone)}
    dcp.load(state, checkpoint_id=folder / "saved")  # saved on two ranks
    set_model_state_dict(alone, state["model"])
    assert_same_state(alone.state_dict(), ranks[0]["training"]["state"])


def test_fsdp_on_top(ranks):
    for rank in ranks:
        assert_close(rank["two_dimensions"]["losses"], train(MLP()))
        assert "take its state_dict before" in rank["two_dimensions"]["said"]


def test_loading_another_pattern(ranks):
    other, few = MLP(seed=3, share=0.5), first_features_only()
    for rank in ranks:
        assert_same_state(rank["loading"]["state"], other.state_dict())
        assert_close(rank["loading"]["y"], other(tokens(3, 60)).detach())
        assert_same_state(rank["loading"]["set"], MLP(seed=4).state_dict())
    assert [rank["loading"]["empty"] for rank in ranks] == [8, 0]
    assert_close(ranks[0]["loading"]["few"], ranks[1]["loading"]["few"])
    assert_close(ranks[0]["loading"]["few"], few(tokens(3, 60)).detach())


def test_meta_layers_are_drawn_as_the_whole_one(ranks):
    state, wanted = ranks[0]["meta"]["state"], MLP()
    assert_same_state(state, ranks[1]["meta"]["state"])
    fresh = MLP(device="meta").to_empty(device="cpu")
    fresh.load_state_dict(state)
    for name in ("up", "down"):
        layer = getattr(fresh, name)
        assert layer.pattern.equal(getattr(wanted, name).pattern)
        bound = layer._present_inputs().rsqrt()[layer.pattern.row_indices.long()]
        largest = layer.values.detach().abs().amax((1, 2))
        assert (largest <= bound).all() and largest.max() > 0.9 * bound.min()
        assert 0.8 < layer.bias.abs().max() * layer.in_features**0.5 <= 1


def test_what_is_refused(ranks):
    wanted = {
        "few_rows": "ranks: 2 ranks cannot share 16 features that are cut at multiples of 16",
        "dimensions": "device_mesh: must have one dimension, got 2",
        "dense": "module: must be a BlockSparseLinear, got Linear",
        "twice": "module: is cut over ranks already",
        "number": "cuts: must be 3 ints from 0 to 100, for a mesh of 2 ranks",
        "end": "cuts: must be 3 ints from 0 to 100",
        "block": "cuts: must be multiples of the block, 8",
        "order": "cuts: must ascend",
        "uneven": "use_local_output: a DTensor that is sharded along the last dimension",
        "prepack": "cannot be prepacked",
        "method": "give process_group",
        "width": "input: must be [..., in_features=",
        "corrupt": "up.: col_indices",
        "no_values": "up.: values: must be",
        "bias": "up.: bias: must be [100], got [99]",
    }
    for rank in ranks:
        said = rank["refusals"]["said"]
        assert list(said) == list(wanted)
        for name, message in wanted.items():
            assert message in said[name], said[name]
        assert rank["refusals"]["untouched"]
