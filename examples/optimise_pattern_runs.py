"""The methods that optimise_pattern.py compares, what tells one run from another, and which runs it
makes: the grid or a plan, those first whose model another run needs. Trains nothing."""

import argparse
import json
from pathlib import Path
from typing import Any, TypedDict

FROM_SPARSE = ["static", "SET", "RigL", "gradual's pattern"]
FROM_DENSE = ["gradual", "gradual + distillation", "movement"]  # sparse at the end
METHODS = ["dense", "dense, small", *FROM_DENSE, *FROM_SPARSE]
NEEDS = {"gradual + distillation": "dense", "gradual's pattern": "gradual"}  # must run before


class Run(TypedDict):
    """What tells one run from another. A plan may name other options of the command line too."""

    method: str
    density: float  # at the end
    block: int
    seed: int
    learning_rate: float
    weight_decay: float
    init_std: float
    steps: int
    hidden: int
    options: dict[str, Any]  # of the method, where not its defaults


Result = dict[str, Any]  # a run and what came of it: a line of results.jsonl


def make_run(args: argparse.Namespace, method: str, **other: Any) -> Run:
    """A run; what does not matter to the method is the same for all of its runs."""
    run = {
        "method": method,
        "density": args.densities[0],
        "block": args.blocks[0],
        "seed": args.seeds[0],
        "learning_rate": args.learning_rate,
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


def title(run: Run) -> str:
    """A run, in words."""
    options = " ".join(f"{name}={value}" for name, value in run["options"].items())
    return (
        f"{run['method']:24} density {run['density']:<5} block {run['block']:<3} "
        f"seed {run['seed']} rate {run['learning_rate']:g} {options}"
    )
