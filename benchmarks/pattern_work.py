"""What the search for a pattern costs in training: each method against the same model without it.

Usage: python benchmarks/pattern_work.py [--whole] [--device cuda] [--json FILE]

A Llama-like decoder with random tokens. For each method two models, patched alike, train in turn in
one process, some steps each, since clocks drift; one of them has the method at its own cadence, put
to one or more steps of its schedule, each of which stands for a part of the training. A window is a
whole number of updates, so that all is in it. Both compute with the same number of blocks: nothing
is freed inside the windows.

The work itself is timed: `sparsifier.step()`, what it collects before a step of the optimizer, and
the hooks that watch a backward. On a GPU by the device's clock: what it spends between the last
kernel before a piece of work and the last of it, waiting for the host included. On a CPU it is the
time of the processor, with one thread, since other processes disturb it least. The difference
between the two models, whole windows of them, is what it must agree with, but for the noise.

The share of the whole training is that of the windows, each times the part of the training that it
stands for, and compaction (6 times or once in a training, timed apart) over `--steps`. Figures are
medians over the windows, `+-` is how far the windows are from them.

With `--whole` each method trains over all `--steps` instead, once, with its own compactions, and
the share is the work over all of that time. It takes hours on a CPU.
"""

import argparse
import contextlib
import dataclasses
import datetime
import io
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pytorch_block_sparse import BlockSparseModelPatcher
from pytorch_block_sparse.optim import (
    BlockMovement,
    BlockRigL,
    BlockSET,
    GradualMagnitude,
    Sparsifier,
)
from pytorch_block_sparse.optim.observe import GradientWatcher


@dataclasses.dataclass(frozen=True)
class Part:
    """What is measured at a step stands for so much of the training."""

    at: float  # of the training
    share: float
    alive: float | None = None  # of movement: so many blocks are over its threshold


@dataclasses.dataclass(frozen=True)
class Case:
    density: float  # that the model is patched at
    method: type[Sparsifier]
    options: dict
    parts: tuple[Part, ...]
    compactions: int = 0


METHODS = {
    "SET": Case(0.25, BlockSET, {}, (Part(0.25, 0.5),)),
    "RigL": Case(0.25, BlockRigL, {}, (Part(0.25, 0.5),)),
    "gradual": Case(
        1.0, GradualMagnitude, {"density": 0.25, "compactions": 0}, (Part(0.25, 0.3),), 6
    ),
    # Scores are stepped before the threshold rises too. How dense it is, is the loss's to say: here
    # it comes to its floor.
    "movement": Case(
        1.0,
        BlockMovement,
        {"floor": 0.25, "compact": False},
        (Part(0.05, 0.1), Part(0.2, 0.2, 0.75), Part(0.4, 0.2, 0.5), Part(0.65, 0.25, 0.2)),
        1,
    ),
}
STEPS_IN_TURN = 10
SIZES = {
    "cuda": {"hidden": 2048, "layers": 2, "tokens": 8192, "block": 32, "rounds": 2},
    "cpu": {"hidden": 256, "layers": 2, "tokens": 512, "block": 32, "rounds": 2},
}

WINDOWS = {
    "method": "{method}",
    "step, ms": "{step_ms:.2f}",
    "pattern work, ms": "{work_ms:.3f}",
    "update every": "{update_every}",
    "compaction, ms": "{compaction_ms:.0f}",
    "active": "{active:.0%}",
    "share of the training": "{share:.2%}",
    "+- of it": "{spread:.2%}",
    "difference": "{difference:.2%}",
    "+- of the difference": "{difference_spread:.2%}",
}
WHOLE = {
    "method": "{method}",
    "training, s": "{seconds:.1f}",
    "pattern work, s": "{work_seconds:.3f}",
    "updates": "{updates}",
    "density at the end": "{density:.2f}",
    "share of the training": "{share:.2%}",
}


class Stopwatch:
    """Adds up the seconds inside of the functions that it watches, while it is `on`.

    On a GPU by the device's clock, between an event before and an event after: a device that is
    behind its host spends that long on the work, one that waits for its host waits in there too.
    """

    def __init__(self, device):
        self.on_gpu = device == "cuda"
        self.now = time.perf_counter if self.on_gpu else time.process_time
        self.on, self.inside, self.pieces = False, False, []

    def read(self):
        if self.on_gpu:
            torch.cuda.synchronize()
        return self.now()

    def mark(self):
        if not self.on_gpu:
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self):
        """Of all pieces since the last call."""
        self.read()
        if self.on_gpu:
            total = sum(start.elapsed_time(end) for start, end in self.pieces) / 1e3
        else:
            total = sum(end - start for start, end in self.pieces)
        self.pieces = []
        return total

    def watch(self, owner, name):
        """Puts a timed function in the place of `owner.name`."""
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            if not self.on or self.inside:
                return function(*args, **kwargs)
            start, self.inside = self.mark(), True
            result = function(*args, **kwargs)
            self.pieces.append((start, self.mark()))
            self.inside = False
            return result

        setattr(owner, name, timed)


class Training:
    """A model, its optimizer, and the method, if it has one."""

    def __init__(self, args, density, make=None):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=2048,
            hidden_size=args.hidden,
            intermediate_size=3 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config).to(args.device)
        rule = {"density": density, "block_shape": (args.block, args.block)}
        with contextlib.redirect_stdout(io.StringIO()):
            patcher = BlockSparseModelPatcher()
            patcher.add_pattern(r"model\.layers\.\d+\..*_proj", rule)
            patcher.patch_model(self.model)
        fused = args.device == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=fused)
        self.sparsifier = make(self.model, self.optimizer) if make else None
        self.ids = torch.randint(2048, (args.tokens // 128, 128), device=args.device)
        self.half = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
        self.stopwatch = args.stopwatch

    def steps(self, count):
        """Seconds for so many training steps."""
        start = self.stopwatch.read()
        for _ in range(count):
            with self.half:
                loss = self.model(self.ids, labels=self.ids).loss
            loss.backward()
            self.optimizer.step()
            if self.sparsifier is not None:
                self.sparsifier.step()
            self.optimizer.zero_grad()
        return self.stopwatch.read() - start

    def work(self, count):
        """Seconds of pattern work in so many training steps."""
        self.stopwatch.on = True
        self.steps(count)
        self.stopwatch.on = False
        return self.stopwatch.seconds()

    def jump(self, step, alive):
        """To the step before one with an update, the last one before `step`, and makes that one."""
        every, begin = self.sparsifier.schedule.interval, self.sparsifier.schedule.begin
        state = self.sparsifier.state_dict()
        state["steps"] = step - (step - begin) % every - 1
        if alive is not None:
            threshold = torch.tensor(self.sparsifier.tau(step)).logit()
            below = 3 * torch.special.ndtri(torch.tensor(1 - alive))
            for layer in state["layers"].values():
                layer["score"].normal_(float(threshold - below), 3)
        self.sparsifier.load_state_dict(state)
        return self.steps(1)

    def compact(self):
        """Seconds."""
        start = self.stopwatch.read()
        self.sparsifier.compact()
        return self.stopwatch.read() - start


def train(args, name):
    """The whole training, with all that the method does in it."""
    case = METHODS[name]
    options = {key: value for key, value in case.options.items() if not key.startswith("compact")}
    ours = Training(args, case.density, lambda m, o: case.method(m, o, args.steps, **options))
    ours.stopwatch.on = True
    seconds = work = 0.0
    for begin in range(0, args.steps, args.window):
        seconds += ours.steps(min(args.window, args.steps - begin))
        work += ours.stopwatch.seconds()
        print(f"{name}: {begin} of {args.steps}", end="\r", file=sys.stderr, flush=True)
    ours.stopwatch.on = False
    return {
        "method": name,
        "seconds": seconds,
        "work_seconds": work,
        "updates": len(ours.sparsifier.log),
        "density": ours.sparsifier.density(),
        "share": work / seconds,
    }


def measure(args, name):
    case = METHODS[name]
    plain = Training(args, case.density)
    ours = Training(args, case.density, lambda m, o: case.method(m, o, args.steps, **case.options))
    plain.steps(5)
    ours.steps(5)
    parts = [measure_part(args, part, ours, plain) for part in case.parts]
    compaction = ours.compact() if case.compactions else 0.0
    compacting = case.compactions * compaction / (args.steps * parts[0]["step_ms"] / 1e3)

    active = sum(part["share"] for part in parts)

    def whole(figure):
        return sum(part["share"] * part[figure] for part in parts)

    return {
        "method": name,
        "parts": parts,
        "step_ms": parts[0]["step_ms"],
        "work_ms": whole("work_ms") / active,
        "update_every": ours.sparsifier.schedule.interval,
        "compaction_ms": 1e3 * compaction,
        "active": active,
        "share": whole("measured") + compacting,
        "spread": whole("spread"),
        "difference": whole("difference") + compacting,
        "difference_spread": whole("difference_spread"),
    }


def measure_part(args, part, ours, plain):
    schedule = ours.sparsifier.schedule
    ours.jump(round(part.at * args.steps), part.alive)
    known, before = len(ours.sparsifier.log), ours.sparsifier.steps
    count = schedule.interval * -(-args.window // schedule.interval)
    with_it, without, work = [], [], []
    for _ in range(args.rounds):
        ours_seconds, plain_seconds = in_turn(ours, plain, count)
        with_it.append(ours_seconds / count)
        without.append(plain_seconds / count)
        work.append(ours.work(count) / count)
    updates = [entry["step"] for entry in ours.sparsifier.log[known:]]
    made = range(before + 1, ours.sparsifier.steps + 1)
    assert updates == [step for step in made if schedule.due(step)], updates
    step = statistics.median(without)
    measured, spread = around([seconds / step for seconds in work])
    difference, noise = around([a / b - 1 for a, b in zip(with_it, without, strict=True)])
    return {
        "at": part.at,
        "share": part.share,
        "step_ms": 1e3 * step,
        "work_ms": 1e3 * statistics.median(work),
        "steps_measured": 2 * args.rounds * count,
        "updates": len(updates),
        "density": ours.sparsifier.density(),
        "measured": measured,
        "spread": spread,
        "difference": difference,
        "difference_spread": noise,
    }


def in_turn(ours, plain, count):
    """Seconds of each for so many steps, a few at a time."""
    seconds = [0.0, 0.0]
    for begin in range(0, count, STEPS_IN_TURN):
        for i, training in enumerate((ours, plain)):
            seconds[i] += training.steps(min(STEPS_IN_TURN, count - begin))
    return seconds


def around(figures):
    """Their median, and how far the farthest is from it."""
    median = statistics.median(figures)
    return median, max(abs(figure - median) for figure in figures)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", choices=sorted(SIZES))
    parser.add_argument("--whole", action="store_true", help="all steps instead of windows of them")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=10_000, help="length of the whole training")
    parser.add_argument("--window", type=int, default=100, help="at least so many steps")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, help="of a step, a multiple of 128")
    parser.add_argument("--block", type=int)
    parser.add_argument("--rounds", type=int, help="windows of each of the two")
    parser.add_argument("--json", type=Path)
    early = parser.parse_args()
    parser.set_defaults(**SIZES[early.device])
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    args.stopwatch = Stopwatch(args.device)
    args.stopwatch.watch(Sparsifier, "step")
    args.stopwatch.watch(Sparsifier, "_with_gradients")
    args.stopwatch.watch(GradientWatcher, "_after_forward")
    args.stopwatch.watch(GradientWatcher, "_after_backward")
    columns, how = (WHOLE, train) if args.whole else (WINDOWS, measure)
    lines = []
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in args.methods:
        line = how(args, name)
        lines.append(line)
        print(f"| {' | '.join(cell.format(**line) for cell in columns.values())} |", flush=True)
    if args.json is not None:
        own = ("json", "methods", "stopwatch")
        setup = {key: value for key, value in vars(args).items() if key not in own}
        setup["command"] = shlex.join(["python", "benchmarks/pattern_work.py", *sys.argv[1:]])
        setup["date"] = datetime.date.today().isoformat()
        if args.device == "cuda":
            setup["name"] = torch.cuda.get_device_name()
        args.json.write_text(json.dumps({**setup, "methods": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
