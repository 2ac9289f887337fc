"""Which method finds the best pattern? Trains one small decoder with each, on the same batches.

A Llama-like language model reads the sources of Python's standard library (corpus.py). Each run is
one line of OUT/results.jsonl; runs that are there already are not repeated, so that a study can be
stopped and extended. At the end a table and a picture: held-out loss over density, mean and
standard deviation over the seeds.

    python examples/optimise_pattern.py                   # short form, on a CPU
    python examples/optimise_pattern.py --long --devices cuda:0 cuda:1 --workers 28
    python examples/optimise_pattern.py --quick           # a toy, to see that everything works

What is compared: `dense`; `dense, small`, as many parameters as the sparse models; sparse from the
start (`static`: a fixed random pattern, `SET`, `RigL`); dense at the start, sparse at the end
(`gradual`, `gradual + distillation` from the dense run of the same seed, `movement`). These three
compute more than the ones before: the column of seconds says how much. `gradual's pattern` is
static again, with the pattern that `gradual` ended with: what that pattern alone is worth.

Runs are spread over worker processes (run_pool.py), the most wanted first: what others need, then
densities, blocks and seeds in the order given. On a GPU the layers compute in bfloat16 (autocast).
`--plan` is for other comparisons than this grid.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import corpus
import torch
from run_pool import run_pool
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
)

FROM_SPARSE = ["static", "SET", "RigL", "gradual's pattern"]
FROM_DENSE = ["gradual", "gradual + distillation", "movement"]
METHODS = ["dense", "dense, small", *FROM_DENSE, *FROM_SPARSE]
NEEDS = {"gradual + distillation": "dense", "gradual's pattern": "gradual"}  # must run before

LONG = {
    "hidden": 256,
    "layers": 4,
    "vocab_size": 2048,
    "length": 128,
    "batch_size": 32,
    "steps": 1600,
    "learning_rate": 2e-3,
    "sparse_learning_rate": 4e-3,
    "densities": [0.25, 0.1, 0.5],
    "blocks": [32, 16],
    "packages": ["torch"],  # else the text is read several times, and the loss is of overfitting
}
QUICK = {"steps": 20, "seeds": [0]}

Run = dict[str, Any]  # what tells one run from another; and, with its result, a line of the results


# Every linear layer of the decoder; the embedding, which is the head too, stays dense.
LINEAR_LAYERS = r"model\.layers\.\d+\..*_proj"


# --- the models -----------------------------------------------------------------------------------


def dense_model(args: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    """A freshly initialised decoder."""
    torch.manual_seed(seed)
    heads = max(1, args.hidden // 32)
    heads = next(count for count in range(heads, 0, -1) if args.hidden % count == 0)
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        head_dim=32,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        initializer_range=args.init_std,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def sparse_model(
    args: argparse.Namespace,
    seed: int,
    density: float,
    block: int,
    masks: dict[str, torch.Tensor] | None = None,
) -> nn.Module:
    """The same with sparse layers, initialised as such if they are not full.

    Their patterns are random, or those of `masks`.
    """
    model = dense_model(args, seed)
    shape = (block, block)
    patcher = BlockSparseModelPatcher()
    patcher.add_pattern(LINEAR_LAYERS, {"density": density, "block_shape": shape})
    with contextlib.redirect_stdout(io.StringIO()):
        replaced = patcher.patch_model(model)
    if density < 1:  # values as wide as so few inputs want
        for name in (layer.name for layer in replaced):
            old = model.get_submodule(name)
            size = (old.out_features, old.in_features)
            if masks is None:
                pattern = Pattern.random(size, density, shape)
            else:
                pattern = Pattern.from_mask(masks[name].cpu(), shape, size)
            new = BlockSparseLinear(old.in_features, old.out_features, False, pattern=pattern)
            nn.init.normal_(new.values, std=model.config.initializer_range / density**0.5)
            model.set_submodule(name, new)
    return model


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def small_model(args: argparse.Namespace, seed: int, density: float, block: int) -> nn.Module:
    """A dense model of the width at which it has about as many parameters as the sparse one."""
    wanted = count(sparse_model(args, seed, density, block))
    widths = range(32, args.hidden + 1, 8)
    options = [argparse.Namespace(**{**vars(args), "hidden": width}) for width in widths]
    with torch.device("meta"):
        counts = [count(dense_model(option, seed)) for option in options]
    best = min(range(len(options)), key=lambda i: abs(counts[i] - wanted))
    return dense_model(options[best], seed)


def make_model(args: argparse.Namespace, masks: dict[str, torch.Tensor] | None) -> nn.Module:
    """The model that a run starts with; `masks` are those of patterns found before."""
    if args.method == "dense":
        return dense_model(args, args.seed)
    if args.method == "dense, small":
        return small_model(args, args.seed, args.density, args.block)
    density = args.density if args.method in FROM_SPARSE else 1.0
    return sparse_model(args, args.seed, density, args.block, masks)


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


# --- one run --------------------------------------------------------------------------------------


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


def half_precision(device: str) -> torch.autocast:
    """On a GPU bfloat16, on a CPU nothing."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: torch.Tensor) -> float:
    """Mean loss over the held-out rows."""
    model.eval()
    return float(torch.stack([model(ids, labels=ids).loss for ids in held_out.split(64)]).mean())


def order(rows: int, args: argparse.Namespace) -> torch.Tensor:
    """``[steps, batch_size]``, rows to train on: none comes twice before all came once."""
    generator = torch.Generator().manual_seed(args.seed)
    wanted = args.steps * args.batch_size
    passes = [torch.randperm(rows, generator=generator) for _ in range(-(-wanted // rows))]
    return torch.cat(passes)[:wanted].view(args.steps, args.batch_size)


def patterns(model: nn.Module) -> dict[str, torch.Tensor]:
    """The mask of blocks of each sparse layer."""
    layers = model.named_modules()
    return {name: m.pattern.mask() for name, m in layers if isinstance(m, BlockSparseLinear)}


def train(args: argparse.Namespace, data: dict[str, torch.Tensor], device: str, run: Run) -> Run:
    """One training; returns the line for results.jsonl."""
    needed = need(args, run)
    args = argparse.Namespace(**{**vars(args), **run})
    kept = torch.load(kept_by(args, needed), map_location=device) if needed else None
    masks = kept["patterns"] if args.method == "gradual's pattern" else None
    model = make_model(args, masks).to(device)
    teacher = None
    if args.method.endswith("distillation"):
        teacher = dense_model(args, args.seed).to(device).eval().requires_grad_(False)
        teacher.load_state_dict(kept["model"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
    )
    sparsifier = make_sparsifier(args, model, optimizer)
    distillation = DistillationLoss(temperature=2.0, alpha=0.9, causal=True)
    warm_up = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (args.steps - step) / (args.steps - warm_up + 1)),
    )
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
            sparsifier.step()
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


def worker(args: argparse.Namespace, path: Path, device: str) -> Callable[[Run], Run]:
    """What a worker process does with a run."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    data = {name: rows.int().to(device) for name, rows in torch.load(path).items()}
    return functools.partial(train, args, data, device)


# --- all runs -------------------------------------------------------------------------------------


def make_run(args: argparse.Namespace, method: str, **other: Any) -> Run:
    """A run; what does not matter to the method is the same for all of its runs."""
    starts_dense = method == "dense" or method in FROM_DENSE
    run = {
        "method": method,
        "density": args.densities[0],
        "block": args.blocks[0],
        "seed": args.seeds[0],
        "learning_rate": args.learning_rate if starts_dense else args.sparse_learning_rate,
        "weight_decay": args.weight_decay,
        "init_std": args.init_std,
        "steps": args.steps,
        "hidden": args.hidden,
        "options": {},
        **other,
    }
    if method == "dense":
        run.update(density=1.0, block=0)
    if method == "dense, small":
        run.update(block=args.blocks[0])
    return run


def need(args: argparse.Namespace, run: Run) -> Run | None:
    """The run that has to be over before this one: its teacher, or where its pattern is from."""
    if run["method"] not in NEEDS:
        return None
    same = {name: run[name] for name in ("density", "block", "seed", "steps", "hidden")}
    return make_run(args, NEEDS[run["method"]], **same)


def kept_by(args: argparse.Namespace, run: Run) -> Path:
    """Where a run leaves its model for those that need it."""
    name = "_".join(str(value).replace(" ", "") for value in run.values())
    return Path(args.out / f"{name}.pt")


def wanted_runs(args: argparse.Namespace) -> list[Run]:
    """The plan or the grid, each after the run that it needs, and these before all others."""
    if args.plan is not None:
        lines = (json.loads(line) for line in args.plan.read_text().splitlines() if line.strip())
        asked = [make_run(args, **line) for line in lines]
    else:
        asked = [
            make_run(args, method, density=density, block=block, seed=seed)
            for density in args.densities
            for block in args.blocks
            for seed in args.seeds
            for method in args.methods
        ]
    first = [needed for run in asked if (needed := need(args, run))]
    first.sort(key=lambda run: run["method"] != "dense")
    ordered: list[Run] = []
    for run in [*first, *asked]:
        if run not in ordered:
            ordered.append(run)
    return ordered


def study(args: argparse.Namespace, deadline: float) -> list[Run]:
    """Makes the runs that results.jsonl does not have yet; returns the lines of all."""
    path = args.out / "results.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    results, missing = [], []
    for run in wanted_runs(args):
        known = [line for line in done if all(line.get(name) == run[name] for name in run)]
        if known and (run["method"] not in NEEDS.values() or kept_by(args, run).exists()):
            results.append(known[0])
        else:
            missing.append(run)

    def ready(run: Run) -> bool:
        needed = need(args, run)
        return needed is None or kept_by(args, needed).exists()

    data = prepare_data(args)
    total, start = len(missing), time.monotonic()
    print(f"{len(results)} runs are there, {total} are to be made, by {args.workers} workers")
    devices = [args.devices[i % len(args.devices)] for i in range(args.workers)]
    make = functools.partial(worker, args, data)
    outcomes = run_pool(make, list(missing), devices, ready=ready, deadline=deadline)
    for number, (run, result, error) in enumerate(outcomes, 1):
        print(f"[{number}/{total}, {time.monotonic() - start:.0f} s] {title(run)}", end="")
        if error is None:
            results.append(result)
            missing.remove(run)
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f": loss {result['loss']:.4f}, {result['seconds']:.0f} s, "
                f"pattern work {100 * result['pattern_share']:.1f} %",
                flush=True,
            )
        else:
            print(f" FAILED\n{error}", flush=True)
    if missing:
        print(f"{len(missing)} runs were not made; call it again to go on:")
        for run in missing:
            print(f"  {title(run)}")
    return results


def title(run: Run) -> str:
    """A run, in words."""
    options = " ".join(f"{name}={value}" for name, value in run["options"].items())
    return (
        f"{run['method']:24} density {run['density']:<5} block {run['block']:<3} "
        f"seed {run['seed']} rate {run['learning_rate']:g} {options}"
    )


# --- what came out --------------------------------------------------------------------------------


class Cell(NamedTuple):
    """Runs that differ in nothing but their seed: mean and spread of their losses, medians."""

    run: Run
    mean: float
    spread: float
    seeds: int
    parameters: int
    seconds: float
    pattern_share: float


def summary(results: list[Run]) -> list[Cell]:
    """One cell for all seeds, in the order of densities, blocks and METHODS."""
    groups: dict[str, list[Run]] = {}
    names = list(make_run(parse([]), "dense"))
    for line in results:
        run = {name: line[name] for name in names if name != "seed"}
        groups.setdefault(json.dumps(run), []).append(line)
    cells = []
    for lines in groups.values():
        losses = [line["loss"] for line in lines]
        cell = Cell(
            lines[0],
            statistics.fmean(losses),
            statistics.stdev(losses) if len(losses) > 1 else float("nan"),
            len(losses),
            lines[0]["parameters"],
            statistics.median(line["seconds"] for line in lines),
            statistics.median(line["pattern_share"] for line in lines),
        )
        cells.append(cell)

    def order(cell: Cell) -> tuple[float, int, int]:
        return -cell.run["density"], -cell.run["block"], METHODS.index(cell.run["method"])

    return sorted(cells, key=order)


def print_table(results: list[Run]) -> None:
    """The table, as Markdown."""
    print(
        "| method | density | block | rate | parameters | held-out loss | spread | seeds | s "
        "| pattern work |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for cell in summary(results):
        run = cell.run
        options = "".join(f", {name} {value}" for name, value in run["options"].items())
        print(
            f"| {run['method']}{options} | {run['density']:g} | {run['block'] or ''} "
            f"| {run['learning_rate']:g} | {cell.parameters:,} | {cell.mean:.4f} "
            f"| {cell.spread:.4f} | {cell.seeds} | {cell.seconds:.0f} "
            f"| {100 * cell.pattern_share:.1f} % |"
        )


def main_cells(results: list[Run]) -> dict[tuple[str, float, int], Cell]:
    """For each method, density and block the cell with most seeds, without options.

    The others, checks of a learning rate or an option, are in the table and not in the picture.
    """
    found: dict[tuple[str, float, int], Cell] = {}
    for cell in summary(results):
        key = (cell.run["method"], cell.run["density"], cell.run["block"])
        if not cell.run["options"] and (key not in found or cell.seeds > found[key].seeds):
            found[key] = cell
    return found


def draw(results: list[Run], path: Path) -> None:
    """Loss over density, one panel for each block size."""
    from matplotlib.figure import Figure

    table = main_cells(results)
    blocks = sorted({block for _, _, block in table if block}) or [0]
    densities = sorted({density for method, density, _ in table if method != "dense"})
    methods = [method for method in METHODS if any(method == name for name, _, _ in table)]
    figure = Figure(figsize=(4.4 * len(blocks) + 2, 4.4), layout="constrained")
    axes = figure.subplots(1, len(blocks), squeeze=False, sharey=True)[0]
    for ax, block in zip(axes, blocks, strict=True):
        for number, method in enumerate(methods):
            color = "black" if method == "dense" else f"C{METHODS.index(method) - 1}"
            if method == "dense":
                ax.axhline(table[method, 1.0, 0].mean, color=color, label=method)
                continue
            # `dense, small` has no blocks: what was run for one size is in all panels.
            cells = [
                (densities.index(density), cell)
                for (name, density, size), cell in table.items()
                if name == method and (size == block or name == "dense, small")
            ]
            ax.errorbar(
                [x + 0.07 * (number - len(methods) / 2) for x, _ in cells],  # side by side
                [cell.mean for _, cell in cells],
                yerr=[cell.spread for _, cell in cells],
                label=method,
                marker="o",
                markersize=5,
                linewidth=1,
                linestyle=":" if method in FROM_SPARSE else "-",
                capsize=2,
                color=color,
            )
        ax.set_title(f"blocks of {block} x {block}")
        ax.set_xticks(range(len(densities)), [f"{density:g}" for density in densities])
        ax.set_xlabel("density")
        ax.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("held-out loss")
    legend = {}  # one for all panels: a method may be in one of them only
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        legend.update(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="outside right center", fontsize=9)
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
    parser.add_argument("--packages", nargs="*", default=[], help="whose sources are read too")
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
    parser.add_argument(
        "--init-std",
        type=float,
        default=0.02,
        help="of initial weights; that of sparse layers is 1 / sqrt(density) times as large",
    )
    parser.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
    parser.add_argument("--devices", nargs="+", default=["cpu"], help="cpu, or cuda:0 cuda:1 ...")
    parser.add_argument("--workers", type=int, default=1, help="processes, spread over the devices")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument(
        "--plan",
        type=Path,
        help="instead of the grid: a file with a run on each line, as JSON; `method`, and what is "
        'not the default: {"method": "SET", "seed": 1, "options": {"drop": 0.2}}',
    )
    parser.add_argument("--quick", action="store_true", help="a toy model and few steps")
    parser.add_argument("--long", action="store_true", help="the study for a GPU")
    early = parser.parse_args(argv)
    parser.set_defaults(**(QUICK if early.quick else LONG if early.long else {}))
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """The study, its table and its picture."""
    args = parse(argv)
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    results = study(args, deadline)
    print_table(results)
    try:
        draw(results, args.out / "loss.png")
    except ImportError as error:
        print(f"no picture: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
