"""Tokens per second and losses of DDP, FSDP2 and tensor parallelism, against one process.

Usage: torchrun --nproc-per-node 2 benchmarks/distributed.py [--json FILE]

Residual MLPs, dense and block sparse, trained by AdamW on random data; NCCL where there are GPUs,
else gloo. All ways train on the same tokens in all: "one" is one process that has all of them (the
other ranks do the same at that time). Ways alternate; the time is the median of the rounds, of the
slowest rank. The losses are those of the first steps, the largest relative difference from "one".
"""

import argparse
import json
import pathlib
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from pytorch_block_sparse import BlockSparseLinear
from pytorch_block_sparse.distributed import (
    BlockSparseColwiseParallel,
    BlockSparseRowwiseParallel,
    balanced_cuts,
)


class MLP(nn.Module):
    def __init__(self, kind, args):
        super().__init__()
        sizes = (args.width, args.hidden)
        options = {"density": args.density, "block_shape": (args.block, args.block)}
        make = nn.Linear if kind == "dense" else BlockSparseLinear
        options = {} if kind == "dense" else options
        self.up, self.down = make(*sizes, **options), make(*sizes[::-1], **options)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def model_of(kind, args, device):
    torch.manual_seed(0)
    layers = [MLP(kind, args) for _ in range(args.layers)]
    return nn.Sequential(*layers).to(device, getattr(torch, args.dtype))


def one(model, mesh):
    return model


def ddp(model, mesh):
    return DistributedDataParallel(model)


def fsdp(model, mesh):
    for mlp in model:
        fully_shard(mlp, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor(model, mesh):
    for mlp in model:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        if isinstance(mlp.up, BlockSparseLinear):
            cuts = balanced_cuts(mesh.size(), colwise=[mlp.up], rowwise=[mlp.down])
            plan = {
                "up": BlockSparseColwiseParallel(cuts=cuts),
                "down": BlockSparseRowwiseParallel(cuts=cuts),
            }
        parallelize_module(mlp, mesh, plan)
    return model


WAYS = {"one": one, "ddp": ddp, "fsdp": fsdp, "tensor": tensor}


class Run:
    """One way of training one kind of model."""

    def __init__(self, kind, way, args, mesh, device):
        self.kind, self.way, self.seconds = kind, way, []
        self.model = WAYS[way](model_of(kind, args, device), mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.splits = mesh.size() if way in ("ddp", "fsdp") else 1

    def step(self, batch):
        part = batch.chunk(self.splits)[dist.get_rank() % self.splits]
        loss = (self.model(part) - part.roll(1, 1)).float().square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def losses(self, batches):
        losses = torch.stack([self.step(batch) for batch in batches])
        dist.all_reduce(losses)
        return losses / dist.get_world_size()

    def time(self, batch, steps):
        for timed in (False, True):
            dist.barrier()
            start = time.perf_counter()
            for _ in range(steps if timed else 1):
                self.step(batch)
            if batch.is_cuda:
                torch.cuda.synchronize()
        seconds = torch.tensor((time.perf_counter() - start) / steps, device=batch.device)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        self.seconds.append(float(seconds))


def measure(args, mesh, device):
    generator = torch.Generator().manual_seed(1)
    shape = (args.check, args.tokens, args.width)
    batches = torch.randn(shape, generator=generator).to(device, getattr(torch, args.dtype))
    rows = []
    for kind in ("dense", "sparse"):
        runs = [Run(kind, way, args, mesh, device) for way in WAYS]
        losses = [run.losses(batches) for run in runs]
        for _ in range(args.rounds):
            for run in runs:
                run.time(batches[0], args.steps)
        for run, its_losses in zip(runs, losses, strict=True):
            seconds = statistics.median(run.seconds)
            difference = ((its_losses - losses[0]) / losses[0]).abs().max()
            rows.append(
                {
                    "kind": kind,
                    "way": run.way,
                    "milliseconds": round(seconds * 1e3, 3),
                    "tokens_per_second": round(args.tokens / seconds),
                    "against_one": round(statistics.median(runs[0].seconds) / seconds, 2),
                    "loss_difference": float(difference),
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"width": 2048, "hidden": 8192, "layers": 4, "tokens": 16384, "block": 64}
    for name, default in (numbers | {"steps": 10, "rounds": 5, "check": 5}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    rows = measure(args, init_device_mesh(device.type, (dist.get_world_size(),)), device)
    if dist.get_rank() == 0:
        about = {name: value for name, value in vars(args).items() if name != "json"}
        name = torch.cuda.get_device_name() if cuda else "CPU"
        about |= {"ranks": dist.get_world_size(), "device": name, "torch": torch.__version__}
        print(json.dumps(about))
        for row in rows:
            print(
                f"{row['kind']:6}  {row['way']:6}  {row['milliseconds']:9.3f} ms  "
                f"{row['tokens_per_second']:>9,} tokens/s  {row['against_one']:5.2f} x one  "
                f"loss {row['loss_difference']:.1e}"
            )
        if args.json:
            args.json.write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
