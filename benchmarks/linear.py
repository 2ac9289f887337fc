"""The three products of a block-sparse layer against the best dense layer that torch offers.

Dense and sparse calls are timed in turn in one process (dense, ours, dense, ours, ...), medians
compared. "Best dense" is the fastest of ``F.linear``, oneDNN with packed weights and the same with
plain weights; grad_input and grad_weight are held against the dense *forward*, a training step
(forward and both gradients through a layer, everything counted) against three of them, and against
the step of ``nn.Linear``. The ratio is useful flops per second over dense flops per second: 1.0 at
density 0.25 means four times as fast.

With ``--device cuda`` it is gpu.py, which has options of its own.

Usage: python benchmarks/linear.py --device cpu [--dtype bfloat16] [--block 16x16] [--threads 2]
           [--json FILE] [--plot FILE]
       python benchmarks/linear.py --products int8 --tokens 1 2 4 8 16

``int8`` is forward from int8 values, against the dense product in the dtype and against forward
from values in it.
"""

import argparse
import functools
import json
import math
import pathlib
import platform
import statistics
import sys
import time
from datetime import date

import torch

from pytorch_block_sparse import BlockSparseLinear, Pattern
from pytorch_block_sparse.pattern import grid_shape, split_index

ops = torch.ops.block_sparse
SHAPES = ["3072x768", "768x3072", "4096x4096"]  # out x in
MIN_SECONDS = 3e-4  # of a sample
PRODUCTS = ["forward", "prepacked", "grad_input", "grad_weight", "step"]


def pair(text):
    first, second = text.split("x")
    return int(first), int(second)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--block", type=pair, default=(32, 32))
    parser.add_argument("--density", nargs="+", type=float, default=[0.5, 0.25, 0.1])
    parser.add_argument("--tokens", nargs="+", type=int, default=[64, 512, 2048])
    parser.add_argument("--products", nargs="+", default=PRODUCTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: time of the process, for one thread on a machine that others use too",
    )
    parser.add_argument(
        "--sparse-bsr", action="store_true", help="time torch's own too: it takes minutes"
    )
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    return parser.parse_args(argv)


def dense_calls(x, weight):
    """What torch offers for y = x Wt, by name; what does not run here is left out."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    calls = {"F.linear": lambda: torch.nn.functional.linear(x, weight)}
    if x.dtype in (torch.float32, torch.bfloat16):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        calls["oneDNN packed"] = lambda: pointwise(x, packed, None, "none", [], "")
        calls["oneDNN plain"] = lambda: pointwise(x, weight, None, "none", [], "")
    return calls


def sparse_bsr_call(x, values, index, out_features):
    """torch's own block-sparse layer, or None where it does not run."""
    rows, cols = grid_shape((out_features, x.shape[1]), values.shape[1:])
    crow, col = split_index(index, (rows, cols), len(values))[:2]
    weight = torch.sparse_bsr_tensor(crow, col, values, (out_features, x.shape[1]))
    try:
        torch.nn.functional.linear(x, weight)
    except (RuntimeError, NotImplementedError):
        return None
    return lambda: torch.nn.functional.linear(x, weight)


def training_step(layer, x, dy):
    def step():
        with torch.enable_grad():
            layer.zero_grad()
            layer(x.detach().requires_grad_()).backward(dy)

    return step


def sparse_calls(args, x, dy, values, index, out_features):
    packed = ops.pack(values)
    stored, scales = (50 * values).to(torch.int8), torch.rand(out_features)
    calls = {
        "forward": lambda: ops.forward(x, values, index, None, out_features),
        "int8": lambda: ops.forward_int8(x, stored, scales, index, None, out_features),
        "prepacked": lambda: ops.forward_packed(x, packed, index, None, out_features, *args.block),
        "grad_input": lambda: ops.grad_input(dy, values, index, x.shape[1]),
        "grad_weight": lambda: ops.grad_weight(dy, x, index, *values.shape),
    }
    if "step" in args.products:
        shape = (out_features, x.shape[1])
        rows, cols = grid_shape(shape, args.block)
        crow, col = split_index(index, (rows, cols), len(values))[:2]
        pattern = Pattern.from_bsr(crow, col, shape, args.block)
        layer = BlockSparseLinear(*shape[::-1], bias=False, pattern=pattern, dtype=x.dtype)
        calls["step"] = training_step(layer, x, dy)
    return {name: calls[name] for name in args.products}


def in_turn(args, calls):
    """Median seconds of each call; short ones are taken several times in a row."""
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    times = {name: [] for name in calls}
    each = 1
    for repeat in range(-2, args.repeats):  # the first rounds warm up
        start_of_round = clock()
        for name, call in calls.items():
            start = clock()
            for _ in range(each):
                call()
            if repeat >= 0:
                times[name].append((clock() - start) / each)
        if repeat == -2:
            each = math.ceil(MIN_SECONDS * len(calls) / max(1e-7, clock() - start_of_round))
    return {name: statistics.median(samples) for name, samples in times.items()}


def measure(args):
    dtype = getattr(torch, args.dtype)
    for out_features, in_features in map(pair, args.shapes):
        for tokens in args.tokens:
            x = torch.randn(tokens, in_features).to(dtype)
            dy = torch.randn(tokens, out_features).to(dtype)
            dense = dense_calls(x, torch.randn(out_features, in_features).to(dtype))
            linear = torch.nn.Linear(in_features, out_features, bias=False, dtype=dtype)
            seconds = in_turn(args, dense)
            best = min(seconds, key=seconds.get)
            for density in args.density:
                rows, cols = out_features // args.block[0], in_features // args.block[1]
                nnz = round(density * rows * cols)
                index = ops.index_random(rows, cols, nnz, 1, False)
                values = torch.randn(nnz, *args.block).to(dtype)
                sparse = sparse_calls(args, x, dy, values, index, out_features)
                live = functools.partial(ops.forward, x, values, index, None, out_features)
                if args.sparse_bsr:
                    bsr = sparse_bsr_call(x, values, index, out_features)
                    sparse |= {"sparse_bsr": bsr} if bsr is not None else {}
                for product, call in sparse.items():
                    calls = {"dense": dense[best], "ours": call}
                    if product == "int8":
                        calls["forward"] = live
                    if product == "step":
                        calls["nn.Linear"] = training_step(linear, x, dy)
                    times = in_turn(args, calls)
                    share = nnz / (rows * cols)
                    if product == "step":
                        times["dense"] *= 3
                    extra = {
                        f"speedup over {name}": times[name] / times["ours"]
                        for name in times
                        if name not in ("dense", "ours")
                    }
                    yield extra | {
                        "out": out_features,
                        "in": in_features,
                        "tokens": tokens,
                        "density": density,
                        "product": product,
                        "best_dense": best,
                        "dense_us": times["dense"] * 1e6,
                        "F.linear_us": seconds["F.linear"] * 1e6,
                        "ours_us": times["ours"] * 1e6,
                        "speedup": times["dense"] / times["ours"],
                        "ratio": times["dense"] / times["ours"] * share,
                    }


def geometric_mean(values):
    return math.exp(statistics.fmean(map(math.log, values)))


def machine():
    model = platform.processor() or platform.machine()
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":")[1].strip() if names else model
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def summary(args, results):
    """Lines of a table: geometric mean and worst of the ratio, per product, tokens and density."""
    yield "product      tokens  " + "  ".join(f"density {d:<4}  " for d in args.density)
    for product in sorted({row["product"] for row in results}):
        for tokens in args.tokens:
            cells = []
            for density in args.density:
                ratios = [
                    row["ratio"]
                    for row in results
                    if (row["product"], row["tokens"], row["density"]) == (product, tokens, density)
                ]
                cells.append(f"{geometric_mean(ratios):.2f} (>= {min(ratios):.2f})")
            yield f"{product:12} {tokens:6}  " + "  ".join(cells)


def plot(args, results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_density, by_tokens) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    axes = [
        (by_density, "density", args.density, "tokens", max(args.tokens)),
        (
            by_tokens,
            "tokens",
            args.tokens,
            "density",
            min(args.density, key=lambda d: abs(d - 0.25)),
        ),
    ]
    for axis, along, points, fixed, at in axes:
        for product in args.products:
            ratios = {
                point: [
                    row["ratio"]
                    for row in results
                    if row["product"] == product and row[along] == point and row[fixed] == at
                ]
                for point in points
            }
            measured = {point: geometric_mean(cells) for point, cells in ratios.items() if cells}
            axis.plot(measured.keys(), measured.values(), marker="o", label=product)
        axis.axhline(1, color="black", linewidth=1, label="best dense")
        axis.set(xscale="log", xlabel=along, title=f"{fixed} {at}", ylim=(0, 1.2))
        axis.set_xticks(points, [str(point) for point in points], minor=False)
    by_density.set_ylabel("useful rate / dense rate")
    by_tokens.legend(loc="lower right")
    figure.suptitle(
        f"{args.dtype}, blocks {args.block[0]}x{args.block[1]}, {args.threads} thread(s)"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device")
    known, others = device.parse_known_args()
    if known.device == "cuda":
        import gpu

        return gpu.main(others)
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    results = []
    for row in measure(args):
        results.append(row)
        print(
            f"{row['out']:5}x{row['in']:<5} tokens {row['tokens']:<5} density {row['density']:<5} "
            f"{row['product']:12} {row['ours_us']:10.1f} us  {row['speedup']:5.2f}x "
            f"{row['best_dense']} (ratio {row['ratio']:.2f})",
            flush=True,
        )
    about = machine() | {
        "threads": args.threads,
        "dtype": args.dtype,
        "block": args.block,
        "clock": args.clock,
        "command": "python " + " ".join(sys.argv),
    }
    print("\n" + ", ".join(f"{key}: {value}" for key, value in about.items()))
    print("\n".join(summary(args, results)))
    if args.json:
        args.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    if args.plot:
        plot(args, results, args.plot)


if __name__ == "__main__":
    main()
