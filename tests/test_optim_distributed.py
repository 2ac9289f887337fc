"""Two processes with different batches keep the same pattern (rule 3)."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from optim_helpers import layers_of, mlp
from pytorch_block_sparse.optim import (
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
    torch.save(report, results / f"{rank}.pt")
    dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_ranks_with_different_batches_keep_the_same_pattern(tmp_path):
    mp.spawn(run, (free_port(), tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, tensors in first.items():
        for a, b in zip(tensors, second[name], strict=True):
            assert torch.equal(a, b), name
    for name in METHODS:
        assert first[name][-1] >= 6
    assert int(first["refusals"][0]) == 2
