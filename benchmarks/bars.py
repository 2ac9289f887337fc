"""The bars of the CPU kernels: measures what they are about, and says of each whether it holds.

Usage: python benchmarks/bars.py [--json FILE]    # measure and report: about 15 minutes
       python benchmarks/bars.py --from FILE...   # report on results that were written before

A line is a geometric mean over the shapes and tokens named, with the worst cell; no cell may be
more than 0.12 under its bar. The clock is that of the process, so that other users of the machine
disturb little; where two threads are compared it is the wall, and they do.
"""

import argparse
import json
import pathlib
import sys

import limits
import linear
import torch

SLACK = 0.12  # how far a single cell may be under the bar
THIN = ["1x16", "16x1", "1x32", "32x1", "48x80", "128x128"]
THIN_GRID = ["--tokens", "512", "--density", "0.25", "--shapes", "3840x1920"]
THIN_GRID += ["--products", "forward", "grad_input", "grad_weight"]
COMMON = ["--clock", "cpu"]
GRIDS = [
    ["--tokens", "64", "512", "2048", "--products", *linear.PRODUCTS[:-1]],
    ["--tokens", "512", "2048", "--density", "0.25", "--products", "step"],
    ["--tokens", "1", "2", "4", "8", "16", "32", "--products", "forward", "prepacked"],
    *(
        ["--block", block, "--tokens", "512", "2048", "--products", "forward"]
        for block in ("16x16", "64x64")
    ),
    *(["--block", block, *THIN_GRID] for block in THIN),
]
BFLOAT16 = ["--dtype", "bfloat16", "--tokens", "512", "2048"]

# product, tokens, block shapes, dtype, and the bar by density
MANY, FEW = (512, 2048), (1, 2, 4, 8, 16)
BARS = [
    ("prepacked", (64, *MANY), ["32x32"], "float32", {0.5: 0.97, 0.25: 0.95, 0.1: 0.90}),
    ("forward", MANY, ["32x32"], "float32", {0.5: 0.93, 0.25: 0.93, 0.1: 0.85}),
    ("forward", (32, 64), ["32x32"], "float32", {0.5: 0.75, 0.25: 0.75, 0.1: 0.70}),
    ("forward", MANY, ["16x16", "64x64"], "float32", {0.5: 0.90, 0.25: 0.90, 0.1: 0.80}),
    ("grad_input", MANY, ["32x32"], "float32", {0.5: 0.92, 0.25: 0.90, 0.1: 0.80}),
    ("grad_weight", MANY, ["32x32"], "float32", {0.5: 0.88, 0.25: 0.85, 0.1: 0.75}),
    ("forward", MANY, ["32x32"], "bfloat16", {0.5: 0.85, 0.25: 0.85, 0.1: 0.75}),
    ("grad_input", MANY, ["32x32"], "bfloat16", {0.5: 0.80, 0.25: 0.80, 0.1: 0.70}),
    ("grad_weight", MANY, ["32x32"], "bfloat16", {0.5: 0.80, 0.25: 0.80, 0.1: 0.70}),
    *(
        (product, (512,), [block], "float32", {0.25: 0.35})
        for block in THIN
        for product in ("forward", "grad_input", "grad_weight")
    ),
]
# set of limits.py, and its bar
LIMITS = {
    "two threads": 1.85,
    "skewed": 0.85,
    "avx2 peak": 0.80,
    "bandwidth": 0.75,
    "float16": 0.80,
}


def measure(json_file, repeats):
    rows, common = [], [*COMMON, "--repeats", str(repeats)]
    grids = GRIDS + ([BFLOAT16] if torch.cpu._is_avx512_bf16_supported() else [])
    for grid in grids:
        args = linear.arguments([*common, *grid])
        print("linear.py", *grid, file=sys.stderr, flush=True)
        block = "x".join(map(str, args.block))
        rows += [row | {"block": block, "dtype": args.dtype} for row in linear.measure(args)]
    args = linear.arguments(common)
    for limit in limits.ALL:
        print(limit.__name__, file=sys.stderr, flush=True)
        rows += list(limit(args))
    about = linear.machine() | {"clock": "cpu", "command": "python " + " ".join(sys.argv)}
    if json_file:
        json_file.write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")
    return [row | about for row in rows]


def line(label, values, bar, slack=SLACK):
    """One line of the report, and whether the bar holds; None where nothing was measured."""
    if not values:
        return f"{label:58} not measured here", None
    mean, worst = linear.geometric_mean(values), min(values)
    holds = mean >= bar and worst >= bar - slack
    return f"{label:58} {mean:5.2f} (>= {worst:4.2f})  bar {bar:4.2f}  " + (
        "ok" if holds else "MISSED"
    ), holds


def report(rows):
    """(line, holds) of every bar."""
    grid = [row for row in rows if "product" in row]

    def cells(product, tokens, density=None, block="32x32", dtype="float32", key="ratio"):
        wanted = {"product": product, "block": block, "dtype": dtype}
        return [
            row[key]
            for row in grid
            if wanted.items() <= row.items()
            and row["tokens"] in tokens
            and (density is None or row["density"] == density)
        ]

    for product, tokens, blocks, dtype, bars in BARS:
        for density, bar in bars.items():
            values = [v for block in blocks for v in cells(product, tokens, density, block, dtype)]
            label = f"{product} {dtype} {'/'.join(blocks)} {'/'.join(map(str, tokens))} tokens"
            yield line(f"{label} at {density}", values, bar)
    speedups = cells("step", MANY, 0.25, key="speedup over nn.Linear")
    yield line("step at 0.25, times nn.Linear", speedups, 3.5, 0)
    yield line(
        "step at 0.25, times 3 dense forwards", cells("step", MANY, 0.25, key="speedup"), 3.2, 0
    )
    for product in ("forward", "prepacked"):
        for tokens in FEW:
            values = cells(product, (tokens,), key="speedup")
            values = [min(values)] if values else []
            yield line(f"{product}, {tokens} tokens, worst speed-up", values, 1.0, 0)
    for name, bar in LIMITS.items():
        yield line(name, [row["ratio"] for row in rows if row.get("set") == name], bar)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--from", nargs="+", type=pathlib.Path, dest="files", default=[])
    args = parser.parse_args()
    if args.files:
        data = [json.loads(file.read_text()) for file in args.files]
        rows = [row | item["about"] for item in data for row in item["results"]]
    else:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        rows = measure(args.json, args.repeats)
    print(
        ", ".join(
            sorted({f"{row['cpu']}, {row['capability']}, torch {row['torch']}" for row in rows})
        )
    )
    if args.plot:
        tokens = [str(n) for n in (*FEW, 32, 64, *MANY)]
        blocks = {"block": "32x32", "dtype": "float32"}
        cells = [row for row in rows if "product" in row and blocks.items() <= row.items()]
        linear.plot(linear.arguments(["--tokens", *tokens]), cells, args.plot)
    verdicts = []
    for text, holds in report(rows):
        print(text)
        verdicts.append(holds)
    print(f"{verdicts.count(True)} bars hold, {verdicts.count(False)} are missed")
    return 1 if False in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
