"""One run of optimise_pattern.py: the rows of tokens, the method's sparsifier, and the training."""

import argparse
import functools
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import corpus
import torch
from optimise_pattern_models import LINEAR_LAYERS, count, dense_model, make_model
from optimise_pattern_runs import FROM_DENSE, NEEDS, Result, Run, kept_by, need
from torch import nn

from pytorch_block_sparse import BlockSparseLinear
from pytorch_block_sparse.optim import (
    BlockMovement,
    BlockRigL,
    BlockSET,
    DistillationLoss,
    GradualMagnitude,
    Sparsifier,
)


def prepare_data(args: argparse.Namespace) -> Path:
    """Writes the token rows, to train on and held out, once for all workers."""
    path = args.out / f"data_{'_'.join([*args.packages, str(args.vocab_size)])}x{args.length}.pt"
    if not path.exists():
        texts, held_out_texts = corpus.split(corpus.source_files(args.packages))
        tokenizer = corpus.train_tokenizer(texts, args.vocab_size)
        rows = corpus.sequences(tokenizer, texts, args.length)
        held_out = corpus.sequences(tokenizer, held_out_texts, args.length)
        held_out = held_out[torch.arange(1024) * (len(held_out) // 1024)]
        torch.save({"rows": rows, "held_out": held_out}, path)
    return path


def order(rows: int, args: argparse.Namespace) -> torch.Tensor:
    """``[steps, batch_size]``, rows to train on: none comes twice before all came once."""
    generator = torch.Generator().manual_seed(args.seed)
    wanted = args.steps * args.batch_size
    passes = [torch.randperm(rows, generator=generator) for _ in range(-(-wanted // rows))]
    return torch.cat(passes)[:wanted].view(args.steps, args.batch_size)


def make_sparsifier(
    args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Sparsifier | None:
    """The method at its defaults, but for Adam's second moment (see BlockSET), or with options."""
    common = (model, optimizer, args.steps)
    if args.method in ("SET", "RigL"):
        method = BlockSET if args.method == "SET" else BlockRigL
        return method(*common, **{"seed": args.seed, "second_moment": "mean", **args.options})
    if args.method.startswith("gradual") and args.method in FROM_DENSE:
        return GradualMagnitude(*common, **{"density": args.density, **args.options})
    if args.method == "movement":
        # Equal densities are compared: a strong penalty, and the floor decides.
        options = {"floor": args.density, "penalty": 100.0, "score_lr": 3e-2, **args.options}
        return BlockMovement(*common, **options)
    return None


def split_parameters(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """Groups for the optimizer: embeddings and norms, and the weights of the decoder's layers."""
    weights = {
        id(parameter)
        for name, module in model.named_modules()
        if re.fullmatch(LINEAR_LAYERS, name)
        for parameter in module.parameters()
    }
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) not in weights]},
        {"params": [p for p in parameters if id(p) in weights]},
    ]


def fewer_inputs(args: argparse.Namespace, model: nn.Module) -> float:
    """How many times fewer inputs an output of the linear layers has than in the dense model.

    Adam moves every weight of a sum by the rate: the fewer they are, the higher it may be. That is
    the rule of maximal update parameterization, for width (Yang et al., arXiv 2203.03466) and for
    sparsity (Dey et al., arXiv 2405.15743): with it all models share one learning rate.
    """
    sparse = [module for module in model.modules() if isinstance(module, BlockSparseLinear)]
    if sparse:
        cells = sum(math.prod(module.pattern.grid) for module in sparse)
        return cells / sum(module.block_count for module in sparse)
    return args.hidden / model.config.hidden_size


def patterns(model: nn.Module) -> dict[str, torch.Tensor]:
    """The mask of blocks of each sparse layer."""
    layers = model.named_modules()
    return {name: m.pattern.mask() for name, m in layers if isinstance(m, BlockSparseLinear)}


def half_precision(device: str) -> torch.autocast:
    """On a GPU bfloat16, on a CPU nothing."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: torch.Tensor) -> float:
    """Mean loss over the held-out rows."""
    model.eval()
    return float(torch.stack([model(ids, labels=ids).loss for ids in held_out.split(64)]).mean())


def train(args: argparse.Namespace, data: dict[str, torch.Tensor], device: str, run: Run) -> Result:
    """One training; returns the line for results.jsonl."""
    needed = need(args, run)
    args = argparse.Namespace(**{**vars(args), **run, "options": dict(run["options"])})
    of_loss = {n: args.options.pop(n) for n in ("temperature", "alpha") if n in args.options}
    kept = torch.load(kept_by(args, needed), map_location=device) if needed else None
    masks = kept["patterns"] if args.method == "gradual's pattern" else None
    model = make_model(args, masks).to(device)
    teacher = None
    if args.method.endswith("distillation"):
        teacher = dense_model(args, args.seed).to(device).eval().requires_grad_(False)
        teacher.load_state_dict(kept["model"])
    optimizer = torch.optim.AdamW(
        split_parameters(model),
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
        fused=True,
    )
    sparsifier = make_sparsifier(args, model, optimizer)
    distillation = DistillationLoss(**of_loss, causal=True)
    faster = fewer_inputs(args, model)
    warm_up = max(1, args.steps // 10)

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, (args.steps - step) / (args.steps - warm_up + 1))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [rate, lambda s: faster * rate(s)])
    picked = order(len(data["rows"]), args).to(device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    last = max(1, args.steps // 10)
    last_losses = torch.zeros((), device=device)
    pattern_seconds, start = 0.0, time.perf_counter()
    for step in range(args.steps):
        ids = data["rows"][picked[step]].long()
        with half_precision(device):
            if teacher is None:
                loss = model(ids, labels=ids).loss
            else:
                with torch.no_grad():
                    target = teacher(ids)
                loss = distillation(model(ids), target, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if sparsifier is not None:
            due = sparsifier.schedule.due(sparsifier.steps + 1)
            if due:
                wait()  # an update waits for the device: not for the step before it
            before = time.perf_counter()
            entry = sparsifier.step()
            if entry is not None:
                faster = 1 / entry["density"]
            pattern_seconds += time.perf_counter() - before
        optimizer.zero_grad()
        schedule.step()
        if step >= args.steps - last:
            last_losses += loss.detach()
    wait()
    seconds = time.perf_counter() - start
    if args.method in NEEDS.values():
        saved = {"model": model.state_dict(), "patterns": patterns(model)}
        torch.save(saved, kept_by(args, run).with_suffix(".part"))
        os.replace(kept_by(args, run).with_suffix(".part"), kept_by(args, run))
    with half_precision(device):
        loss = held_out_loss(model, data["held_out"].long())
    return {
        **run,
        "loss": loss,
        "train_loss": float(last_losses) / last,
        "parameters": count(model),
        "seconds": seconds,
        "pattern_share": pattern_seconds / seconds,
        "end_density": sparsifier.density() if sparsifier else None,
    }


def worker(args: argparse.Namespace, path: Path, device: str) -> Callable[[Run], Result]:
    """What a worker process does with a run."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    data = {name: rows.int().to(device) for name, rows in torch.load(path).items()}
    return functools.partial(train, args, data, device)
