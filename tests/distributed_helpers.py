"""Two processes on the CPU (gloo), and the model and the batches that one process has too."""

import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from pytorch_block_sparse import BlockSparseLinear

STEPS, TOKENS = 4, 8


def two_processes(work, folder):
    """What `work(rank, folder)` returned in each of two processes, as torchrun would start them.

    They get two tries, of 240 s: gloo can hang on its own (seen once in hundreds of runs, torch
    2.13: UnboundBuffer's destructor waits for ever), what hangs twice is ours.
    """
    for _ in range(2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        if _ended(mp.spawn(_run, (port, work, folder), nprocs=2, join=False), seconds=240):
            return [torch.load(folder / f"result{rank}.pt") for rank in (0, 1)]
    raise TimeoutError("two processes hung, twice")


def _ended(context, seconds):
    """Whether all of its processes ended in time; kills them if not. Raises what one raised."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if context.join(timeout=deadline - time.monotonic()):
            return True
    for process in context.processes:
        process.kill()
        process.join()
    return False


def _run(rank, port, work, folder):
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)
    torch.save(work(rank, folder), folder / f"result{rank}.pt")
    dist.destroy_process_group()


def mlp(seed=0, density=0.3, device=None, dtype=torch.float64):
    """Ragged at both ends; an odd number of blocks; one layer of a single block."""
    torch.manual_seed(seed)
    options = {"block_shape": (8, 8), "device": device, "dtype": dtype}
    return nn.Sequential(
        BlockSparseLinear(60, 100, density=density, **options),
        nn.Tanh(),
        BlockSparseLinear(100, 60, density=density, **options),
        nn.Tanh(),
        BlockSparseLinear(60, 60, density=0.01, **options),
    )


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, BlockSparseLinear)]


def batches():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(STEPS, TOKENS, 60, generator=generator, dtype=torch.float64)


def train(model, rank=0, ranks=1):
    """Losses of a few steps of AdamW, on this rank's part of each batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for batch in batches():
        part = batch.chunk(ranks)[rank].to(next(model.parameters()).dtype)
        loss = (model(part) - part.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
