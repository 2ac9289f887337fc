"""Which method finds the best pattern? Trains one small decoder with each, on the same batches.

A language model like Qwen3 reads the sources of Python's standard library (corpus.py). Each run is
one line of OUT/results.jsonl; runs that are there already are not repeated, so that a study can be
stopped and extended. At the end a table and a picture: held-out loss over density, mean and
standard deviation over the seeds.

    python examples/optimise_pattern.py                   # short form, on two cores: 10 minutes
    python examples/optimise_pattern.py --long --devices cuda:0 cuda:1 cuda:2 cuda:3 --workers 56
    python examples/optimise_pattern.py --quick           # a toy, to see that everything works

What is compared: `dense`; `dense, small`, as many parameters as the sparse models; sparse from the
start (`static`: a fixed random pattern, `SET`, `RigL`); dense at the start, sparse at the end
(`gradual`, `gradual + distillation` from the dense run of the same seed, `movement`). These three
compute more than the ones before: the column of seconds says how much. `gradual's pattern` is
static again, with the pattern that `gradual` ended with: what that pattern alone is worth.

Runs are spread over worker processes (run_pool.py), the most wanted first: what others need, then
densities, blocks and seeds in the order given. On a GPU the layers compute in bfloat16 (autocast).
`--plan` is for other comparisons than this grid.

This file is the command line and the study as a whole; beside it are the methods and the list of
runs (optimise_pattern_runs.py), the decoders (optimise_pattern_models.py), one run
(optimise_pattern_training.py), and the table and the picture (optimise_pattern_report.py).
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

from optimise_pattern_report import draw, print_table
from optimise_pattern_runs import METHODS, NEEDS, Result, Run, kept_by, need, title, wanted_runs
from optimise_pattern_training import prepare_data, worker
from run_pool import run_pool

LONG = {
    "hidden": 512,
    "layers": 4,
    "vocab_size": 2048,
    "length": 128,
    "batch_size": 32,
    "steps": 2000,
    "learning_rate": 2e-3,
    "densities": [0.25, 0.1, 0.5],
    "blocks": [32, 16],
    # Else the text is read several times, and the loss is of overfitting.
    "packages": ["torch", "sympy", "networkx", "numpy"],
}
QUICK = {"steps": 20, "seeds": [0], "hidden": 96, "batch_size": 8}


def study(args: argparse.Namespace, deadline: float) -> list[Result]:
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
    parser.add_argument(
        "--blocks", nargs="+", type=int, default=[16], help="sizes of square blocks"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of each run")
    parser.add_argument("--hidden", type=int, default=192, help="hidden size")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers")
    parser.add_argument("--vocab-size", type=int, default=512, help="size of the vocabulary")
    parser.add_argument("--packages", nargs="*", default=[], help="whose sources are read too")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument(
        "--learning-rate", type=float, default=2e-3, help="of dense weights, at its highest"
    )
    parser.add_argument(
        "--init-std",
        type=float,
        default=0.02,
        help="of initial weights; that of sparse layers is 1 / sqrt(density) times as large",
    )
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of AdamW")
    parser.add_argument("--devices", nargs="+", default=["cpu"], help="cpu, or cuda:0 cuda:1 ...")
    parser.add_argument("--workers", type=int, default=2, help="processes, spread over the devices")
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
