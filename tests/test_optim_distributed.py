"""Two processes with different batches keep the same pattern (rule 3)."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from optim_helpers import layers_of, mlp
from pytorch_block_sparse import BlockSparseLinear, Pattern
from pytorch_block_sparse.optim import (
    BlockImportance,
    BlockMovement,
    BlockRigL,
    BlockSET,
    BlockWanda,
    GradualMagnitude,
)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

METHODS = {
    "SET": (0.25, lambda m, o: BlockSET(m, o, 24, every=2)),
    "RigL": (0.25, lambda m, o: BlockRigL(m, o, 24, every=2)),
    "gradual": (1.0, lambda m, o: GradualMagnitude(m, o, 24, density=0.2, compactions=0)),
    "movement": (1.0, lambda m, o: BlockMovement(m, o, 24, every=2, score_lr=0.5, compact=False)),
}


def with_gradients_that_cancel(rank):
    """A row of three blocks, of which the first is there.

    The gradient of the second is ten times the input of each rank, and cancels; that of the third
    is smaller, and adds up.
    """
    pattern = Pattern.from_blocks([(0, 0)], (8, 24), (8, 8))
    model = torch.nn.Sequential(BlockSparseLinear(24, 8, False, pattern=pattern))
    x = torch.zeros(4, 24)
    x[:, 8:16] = 10.0 if rank == 0 else -10.0
    x[:, 16:] = 1.0
    return model, x


def absent_blocks_of_both_ranks(rank):
    """Norms of the candidates, and the pattern after RigL has grown one of them."""
    model, x = with_gradients_that_cancel(rank)
    with BlockImportance(model).candidates(share=1.0) as candidates:
        model(x).sum().backward()
    pairs, norms = candidates["0"]
    model, x = with_gradients_that_cancel(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    # Of the one block all is replaced, and no new one is random.
    options = {"drop": lambda step: 1.0, "every": 1, "random_share": 0.0, "normalise": False}
    sparsifier = BlockRigL(model, optimizer, 24, **options)
    model(x).sum().backward()
    optimizer.step()
    sparsifier.step()
    return [pairs, norms, model[0].pattern.mask()]


def run(rank, port, results):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    report = {}
    for name, (density, build) in METHODS.items():
        model = DistributedDataParallel(mlp(density))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sparsifier = build(model, optimizer)
        generator = torch.Generator().manual_seed(100 + rank)  # each rank has its own batches
        for step in range(20):
            x = torch.randn(8, 64, generator=generator)
            with torch.random.fork_rng():  # and its own global randomness
                torch.manual_seed(rank + step)
                (model(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()
            sparsifier.step()
            optimizer.zero_grad()
        report[name] = [
            *(layer.pattern.mask() for layer in layers_of(model)),
            *(layer.alive for layer in sparsifier.layers),
            *(p.detach() for p in model.parameters()),
            torch.tensor([len(sparsifier.log)]),
        ]
    model = mlp(1.0)
    wanda = BlockWanda(model, density=0.25)
    with wanda.calibration():
        model(torch.randn(8 * (rank + 1), 64, generator=generator))
    wanda.step()
    report["Wanda"] = [layer.pattern.mask() for layer in layers_of(model)]
    refusals = 0
    for build in (GradualMagnitude, BlockMovement):
        options = {"density": 0.2} if build is GradualMagnitude else {}
        try:
            build(model, torch.optim.SGD(model.parameters(), lr=1.0), 24, **options)
        except ValueError as error:
            refusals += "DDP would not see" in str(error)
    report["refusals"] = [torch.tensor([refusals])]
    report["absent"] = absent_blocks_of_both_ranks(rank)
    torch.save(report, results / f"{rank}.pt")
    dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each rank has found."""
    path = tmp_path_factory.mktemp("ranks")
    mp.spawn(run, (free_port(), path), nprocs=2)
    return [torch.load(path / f"{rank}.pt") for rank in (0, 1)]


def test_ranks_with_different_batches_keep_the_same_pattern(reports):
    first, second = reports
    for name, tensors in first.items():
        for a, b in zip(tensors, second[name], strict=True):
            assert torch.equal(a, b), name
    for name in METHODS:
        assert first[name][-1] >= 6
    assert int(first["refusals"][0]) == 2


def test_gradients_are_summed_over_the_ranks_before_any_norm(reports):
    """Norms of each rank's gradient, or their sum, would choose the block that cancels."""
    for report in reports:
        pairs, norms, mask = report["absent"]
        assert pairs.tolist() == [[0, 1], [0, 2]]
        # 64 elements, each of 4 tokens on 2 ranks.
        assert norms.tolist() == [0.0, 8.0 * 64**0.5]
        assert mask.tolist() == [[False, False, True]]
