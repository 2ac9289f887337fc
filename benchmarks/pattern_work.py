"""What the search for a pattern costs in training: each method against the same model without it.

Usage: python benchmarks/pattern_work.py [--device cuda] [--json FILE]

A Llama-like decoder with random tokens. For each method two models, patched alike, train in turn in
one process; one of them has the method, put into the middle of its schedule at its own cadence. A
window is a whole number of updates, so that all is in it: the updates, what is done in each step,
and what is collected outside `sparsifier.step()`. Both compute with the same number of blocks:
nothing is freed inside the windows. Figures are medians over the windows.

The share of the whole training is that of the windows times the part of the training in which the
method is at work, and compaction (6 times or once in a training, timed apart) over `--steps`.
"""

import argparse
import contextlib
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
from pytorch_block_sparse.optim import BlockMovement, BlockRigL, BlockSET, GradualMagnitude

# density at the start, how to make it, at which share of the training, compactions of a training
METHODS = {
    "SET": (0.25, BlockSET, {}, 0.25, 0),
    "RigL": (0.25, BlockRigL, {}, 0.25, 0),
    "gradual": (1.0, GradualMagnitude, {"density": 0.25, "compactions": 0}, 0.4, 6),
    "movement": (1.0, BlockMovement, {"floor": 0.25, "compact": False}, 0.4, 1),
}
SIZES = {
    "cuda": {"hidden": 2048, "layers": 2, "tokens": 8192, "block": 32, "rounds": 2},
    "cpu": {"hidden": 256, "layers": 2, "tokens": 512, "block": 32, "rounds": 2},
}


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
        self.wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    def steps(self, count):
        """Seconds for so many training steps."""
        self.wait()
        start = time.perf_counter()
        for _ in range(count):
            with self.half:
                loss = self.model(self.ids, labels=self.ids).loss
            loss.backward()
            self.optimizer.step()
            if self.sparsifier is not None:
                self.sparsifier.step()
            self.optimizer.zero_grad()
        self.wait()
        return time.perf_counter() - start

    def jump(self, step):
        """To the step before an update, the last one before `step`, and makes that update."""
        every, begin = self.sparsifier.schedule.interval, self.sparsifier.schedule.begin
        state = self.sparsifier.state_dict()
        state["steps"] = step - (step - begin) % every - 1
        for layer in state["layers"].values():
            if "score" in layer:  # of movement: a quarter of the blocks is under the threshold
                layer["score"].normal_(-0.5, 3.0)
        self.sparsifier.load_state_dict(state)
        return self.steps(1)

    def compact(self):
        """Seconds."""
        self.wait()
        start = time.perf_counter()
        self.sparsifier.compact()
        self.wait()
        return time.perf_counter() - start


def measure(args, name):
    density, method, options, where, compactions = METHODS[name]
    plain = Training(args, density)
    ours = Training(args, density, lambda m, o: method(m, o, args.steps, **options))
    every = ours.sparsifier.schedule.interval
    plain.steps(5)
    ours.steps(5)
    ours.jump(int(where * args.steps))
    count = every * -(-args.window // every)
    pairs = [(ours.steps(count), plain.steps(count)) for _ in range(args.rounds)]
    updates = [entry["step"] for entry in ours.sparsifier.log]
    assert len(updates) == 1 + args.rounds * count // every, updates
    with_it, without = (statistics.median(times) / count for times in zip(*pairs, strict=True))
    spread = max(abs(a / b - with_it / without) for a, b in pairs)
    compaction = ours.compact() if compactions else 0.0
    schedule, total = ours.sparsifier.schedule, args.steps
    active = (schedule.end - schedule.begin) / total
    compacting = compactions * compaction / (total * without)
    share = active * (with_it / without - 1) + compacting
    return {
        "method": name,
        "step_ms": 1e3 * without,
        "step_with_method_ms": 1e3 * with_it,
        "update_every": every,
        "steps_measured": args.rounds * count,
        "density_in_the_end": ours.sparsifier.density(),
        "compaction_ms": 1e3 * compaction,
        "active": active,
        "share_while_active": with_it / without - 1,
        "share": share,
        "spread": active * spread,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cpu", choices=sorted(SIZES))
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
    lines = []
    print(
        "| method | step, ms | with the method | update every | compaction, ms "
        "| while active | active | share of the training | +- |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.methods:
        line = measure(args, name)
        lines.append(line)
        print(
            f"| {name} | {line['step_ms']:.2f} | {line['step_with_method_ms']:.2f} "
            f"| {line['update_every']} | {line['compaction_ms']:.0f} "
            f"| {100 * line['share_while_active']:.2f} % | {100 * line['active']:.0f} % "
            f"| {100 * line['share']:.2f} % | {100 * line['spread']:.2f} |",
            flush=True,
        )
    if args.json is not None:
        setup = {key: value for key, value in vars(args).items() if key not in ("json", "methods")}
        setup["command"] = shlex.join(["python", "benchmarks/pattern_work.py", *sys.argv[1:]])
        setup["date"] = datetime.date.today().isoformat()
        if args.device == "cuda":
            setup["name"] = torch.cuda.get_device_name()
        args.json.write_text(json.dumps({**setup, "methods": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
