"""Which method finds the best pattern? Trains one small decoder with each, on the same batches.

A Llama-like language model reads the sources of Python's standard library (corpus.py). Each run is
one line of OUT/results.jsonl; runs that are there already are not repeated, so that a study can be
stopped and extended. At the end a table and a picture: held-out loss over density, mean and
standard deviation over the seeds.

    python examples/optimise_pattern.py                   # short form, on a CPU
    python examples/optimise_pattern.py --long --device cuda
    python examples/optimise_pattern.py --quick           # a toy, to see that everything works

What is compared: `dense`; `dense, small`, as many parameters as the sparse models; sparse from the
start (`static`: a fixed random pattern, `SET`, `RigL`); dense at the start, sparse at the end
(`gradual`, `gradual + distillation` from the dense run of the same seed, `movement`). The last
three compute more than the ones before: the column of seconds says how much.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import corpus
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pytorch_block_sparse import BlockSparseLinear, BlockSparseModelPatcher, Pattern
from pytorch_block_sparse.optim import (
    BlockMovement,
    BlockRigL,
    BlockSET,
    DistillationLoss,
    GradualMagnitude,
    Sparsifier,
    teacher_of,
)

FROM_SPARSE = ["static", "SET", "RigL"]
FROM_DENSE = ["gradual", "gradual + distillation", "movement"]
METHODS = ["dense", "dense, small", *FROM_SPARSE, *FROM_DENSE]

LONG = {
    "hidden": 512,
    "layers": 4,
    "vocab_size": 8192,
    "length": 128,
    "batch_size": 64,
    "steps": 4000,
    "learning_rate": 1e-3,
    "sparse_learning_rate": 2e-3,
    "densities": [0.5, 0.25, 0.1],
    "blocks": [16, 32],
}
QUICK = {"steps": 20, "seeds": [0]}


# Every linear layer of the decoder; the embedding, which is the head too, stays dense.
LINEAR_LAYERS = r"model\.layers\.\d+\..*_proj"


# --- the models -----------------------------------------------------------------------------------


def dense_model(args: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    """A freshly initialised decoder."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden // 32),
        head_dim=32,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def sparse_model(args: argparse.Namespace, seed: int, density: float, block: int) -> nn.Module:
    """The same with sparse layers, initialised as such if they are not full."""
    model = dense_model(args, seed)
    patcher = BlockSparseModelPatcher()
    patcher.add_pattern(LINEAR_LAYERS, {"density": density, "block_shape": (block, block)})
    with contextlib.redirect_stdout(io.StringIO()):
        replaced = patcher.patch_model(model)
    if density < 1:  # a random pattern, and values as wide as so few inputs want
        for name in (layer.name for layer in replaced):
            old = model.get_submodule(name)
            pattern = Pattern.random((old.out_features, old.in_features), density, (block, block))
            new = BlockSparseLinear(old.in_features, old.out_features, False, pattern=pattern)
            nn.init.normal_(new.values, std=model.config.initializer_range / density**0.5)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    return model


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def small_model(args: argparse.Namespace, seed: int, density: float, block: int) -> nn.Module:
    """A dense model of the width at which it has about as many parameters as the sparse one."""
    wanted = count(sparse_model(args, seed, density, block))
    widths = range(32, args.hidden + 1, 8 if args.hidden < 256 else 32)
    options = [argparse.Namespace(**{**vars(args), "hidden": width}) for width in widths]
    best = min(options, key=lambda option: abs(count(dense_model(option, seed)) - wanted))
    return dense_model(best, seed)


def make_model(args: argparse.Namespace, method: str, density: float, block: int, seed: int) -> Any:
    """The model that a run starts with."""
    if method == "dense":
        return dense_model(args, seed)
    if method == "dense, small":
        return small_model(args, seed, density, block)
    return sparse_model(args, seed, density if method in FROM_SPARSE else 1.0, block)


def make_sparsifier(
    args: argparse.Namespace,
    method: str,
    model: nn.Module,
    optimizer: Any,
    density: float,
    seed: int,
) -> Sparsifier | None:
    """The method at its defaults, but for Adam's second moment (see BlockSET)."""
    steps = args.steps
    if method == "SET":
        return BlockSET(model, optimizer, steps, seed=seed, second_moment="mean")
    if method == "RigL":
        return BlockRigL(model, optimizer, steps, seed=seed, second_moment="mean")
    if method.startswith("gradual"):
        return GradualMagnitude(model, optimizer, steps, density=density)
    if method == "movement":
        # Equal densities are compared: a strong penalty, and the floor decides.
        return BlockMovement(model, optimizer, steps, floor=density, penalty=100.0, score_lr=3e-2)
    return None


# --- one run --------------------------------------------------------------------------------------


class Data:
    """Token rows to train on and held-out batches, the same for all runs."""

    def __init__(self, args: argparse.Namespace) -> None:
        texts, held_out_texts = corpus.split(corpus.source_files())
        tokenizer = corpus.train_tokenizer(texts, args.vocab_size)
        self.rows = corpus.sequences(tokenizer, texts, args.length)
        held_out = corpus.sequences(tokenizer, held_out_texts, args.length)
        self.held_out = held_out[torch.arange(1024) * (len(held_out) // 1024)].split(64)


@torch.no_grad()
def held_out_loss(model: nn.Module, data: Data, device: str) -> float:
    """Mean loss over the held-out batches."""
    model.eval()
    batches = [ids.to(device) for ids in data.held_out]
    losses = [float(model(ids, labels=ids).loss) for ids in batches]
    model.train()
    return statistics.fmean(losses)


def train(
    args: argparse.Namespace,
    data: Data,
    key: dict[str, Any],
    teacher: nn.Module | None,
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """One training; returns the model and a line for results.jsonl."""
    method, density, seed = key["method"], key["density"], key["seed"]
    model = make_model(args, method, density, key["block"], seed).to(args.device)
    rate = key["learning_rate"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    sparsifier = make_sparsifier(args, method, model, optimizer, density, seed)
    distillation = DistillationLoss(temperature=2.0, alpha=0.9, causal=True)
    warm_up = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (args.steps - step) / (args.steps - warm_up + 1)),
    )
    pattern_seconds, start = 0.0, time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        picked = torch.randint(len(data.rows), (args.batch_size,), generator=generator)
        ids = data.rows[picked].to(args.device)
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
            before = time.perf_counter()
            sparsifier.step()
            pattern_seconds += time.perf_counter() - before
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - start
    result = {
        **key,
        "loss": held_out_loss(model, data, args.device),
        "parameters": count(model),
        "seconds": seconds,
        "pattern_share": pattern_seconds / seconds,
        "end_density": sparsifier.density() if sparsifier else None,
    }
    return model, result


def runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What is to be run: the dense model does not depend on density and block."""
    keys = []
    for seed in args.seeds:
        for method in args.methods:
            starts_dense = method == "dense" or method in FROM_DENSE
            rate = args.learning_rate if starts_dense else args.sparse_learning_rate
            for density in [1.0] if method == "dense" else args.densities:
                for block in [0] if method == "dense" else args.blocks:
                    if method == "dense, small" and block != args.blocks[0]:
                        continue
                    keys.append(
                        {
                            "method": method,
                            "density": density,
                            "block": block,
                            "seed": seed,
                            "learning_rate": rate,
                            "steps": args.steps,
                            "hidden": args.hidden,
                        }
                    )
    return keys


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Makes the runs that results.jsonl does not have yet; returns the lines of all."""
    path = args.out / "results.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    data = Data(args)
    print(f"{data.rows.numel():,} tokens to train on")
    wanted, teachers, results = runs(args), {}, []
    for key in wanted:
        known = [line for line in done if all(line.get(name) == key[name] for name in key)]
        if known:
            results.append(known[0])
            continue
        teacher = None
        if key["method"].endswith("distillation"):
            teacher = teachers.get(key["seed"])
            if teacher is None:
                dense = {**key, "method": "dense", "density": 1.0, "block": 0}
                teacher = teachers[key["seed"]] = teacher_of(train(args, data, dense, None)[0])
        model, result = train(args, data, key, teacher)
        if key["method"] == "dense":
            teachers[key["seed"]] = teacher_of(model)
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        results.append(result)
        print(
            f"{key['method']:24} density {key['density']:<5} block {key['block']:<3} "
            f"seed {key['seed']}: loss {result['loss']:.4f}, {result['seconds']:.0f} s, "
            f"pattern work {100 * result['pattern_share']:.1f} %",
            flush=True,
        )
    return results


# --- what came out --------------------------------------------------------------------------------


def summary(results: list[dict[str, Any]]) -> list[tuple[str, float, int, dict[str, float]]]:
    """(method, density, block, numbers) for each cell: mean and spread over the seeds."""
    cells: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for line in results:
        cells.setdefault((line["method"], line["density"], line["block"]), []).append(line)
    table = []
    for (method, density, block), lines in cells.items():
        losses = [line["loss"] for line in lines]
        numbers = {
            "mean": statistics.fmean(losses),
            "spread": statistics.stdev(losses) if len(losses) > 1 else float("nan"),
            "seeds": len(losses),
            "parameters": lines[0]["parameters"],
            "seconds": statistics.median(line["seconds"] for line in lines),
            "pattern_share": statistics.median(line["pattern_share"] for line in lines),
        }
        table.append((method, density, block, numbers))
    return table


def print_table(results: list[dict[str, Any]]) -> None:
    """The table, as Markdown."""
    print("| method | density | block | parameters | held-out loss | spread | s | pattern work |")
    print("|---|---|---|---|---|---|---|---|")
    for method, density, block, cell in summary(results):
        print(
            f"| {method} | {density:g} | {block or ''} | {cell['parameters']:,} | "
            f"{cell['mean']:.4f} | {cell['spread']:.4f} | {cell['seconds']:.0f} | "
            f"{100 * cell['pattern_share']:.1f} % |"
        )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Loss over density, one panel for each block size."""
    from matplotlib.figure import Figure

    table = summary(results)
    blocks = sorted({block for _, _, block, _ in table if block})
    figure = Figure(figsize=(5.5 * max(1, len(blocks)), 4.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(blocks)), squeeze=False, sharey=True)[0]
    for ax, block in zip(axes, blocks, strict=False):
        for number, method in enumerate(METHODS):
            cells = [c for c in table if c[0] == method and c[2] in (0, block)]
            if not cells:
                continue
            if method == "dense":
                ax.axhline(cells[0][3]["mean"], color="black", linestyle="--", label=method)
                continue
            cells.sort(key=lambda cell: cell[1])
            ax.errorbar(
                [density for _, density, _, _ in cells],
                [cell["mean"] for *_, cell in cells],
                yerr=[cell["spread"] for *_, cell in cells],
                label=method,
                marker="o",
                capsize=3,
                color=f"C{number}",
            )
        ax.set_title(f"blocks of {block} x {block}")
        ax.set_xlabel("density")
        ax.set_ylabel("held-out loss")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; --quick and --long change the defaults of the others."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/optimise"), help="folder to write to")
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, choices=METHODS, help="what to run"
    )
    parser.add_argument("--densities", nargs="+", type=float, default=[0.25], help="at the end")
    parser.add_argument("--blocks", nargs="+", type=int, default=[8], help="sizes of square blocks")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of each run")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size")
    parser.add_argument("--layers", type=int, default=2, help="encoder layers")
    parser.add_argument("--vocab-size", type=int, default=512, help="size of the vocabulary")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=2400, help="training steps")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="at its highest")
    parser.add_argument(
        "--sparse-learning-rate",
        type=float,
        default=6e-3,
        help="that of the models that are small or sparse from the start, which want more",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="a toy model and few steps")
    parser.add_argument("--long", action="store_true", help="the study for a GPU")
    early = parser.parse_args(argv)
    parser.set_defaults(**(QUICK if early.quick else LONG if early.long else {}))
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """The study, its table and its picture."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    results = study(args)
    print_table(results)
    draw(results, args.out / "loss.png")


if __name__ == "__main__":
    main(sys.argv[1:])
