"""The three products on an NVIDIA GPU, against cuBLAS and torch's own block-sparse layer.

Dense and sparse calls are timed in turn (dense, ours, dense, ours, ...) by events, with L2 emptied
before each; medians. The dense call is the same product with a full weight: ``F.linear``,
``dy @ W`` and ``dyt @ x``. Everything that a call does counts, also what it re-orders inside.

With ``--graph``, as in decoding: a CUDA graph of many calls, each with weights of its own, which
are together several times as large as L2; the time of one call. Nothing is emptied then.

Patterns of equal nnz: ``random``; ``skewed``, block rows by a power law, the largest full or of 16
times as many blocks as the mean; ``banded``.

Usage: python benchmarks/gpu.py [--blocks 64x64 32x32] [--density 0.25] [--shapes 14336x4096]
           [--tokens 8192] [--patterns random skewed] [--tf32] [--bsr] [--kernel NAME...]
           [--json FILE] [--plot FILE]
       python benchmarks/gpu.py --graph --tokens 1 2 4 8 16 32 64 --products forward grad_input
       python benchmarks/gpu.py --graph --tokens 1 8 64 --blocks 32x32 --products int8
       python benchmarks/linear.py --device cuda ... is the same

``int8`` is forward from int8 values, against the dense product in the dtype and, as ``forward_us``,
against forward from values in it.
"""

import argparse
import itertools
import json
import os
import pathlib
import re
import statistics
import sys
from datetime import date

import torch

from pytorch_block_sparse import Pattern
from pytorch_block_sparse.pattern import split_index

ops = torch.ops.block_sparse
PRODUCTS = ["forward", "grad_input", "grad_weight"]
ON_REQUEST = ["int8"]
L2_BYTES = 256 << 20  # written before each call: several times any L2


def banded(rows, cols, nnz):
    """Those nearest to the diagonal."""
    row, col = torch.arange(rows).view(-1, 1), torch.arange(cols).view(1, -1)
    distance = ((row + 0.5) / rows - (col + 0.5) / cols).abs()
    return nearest(distance, nnz)


def skewed(rows, cols, nnz):
    """Rows by a power law, in random order, with random columns."""
    low, high = 0.0, 4.0  # the exponent at which the largest row has 16 times the mean
    for _ in range(40):
        shares = torch.arange(1.0, rows + 1) ** -((low + high) / 2)
        counts = shares / shares.sum() * nnz
        low, high = (
            (low, (low + high) / 2) if counts[0] > 16 * nnz / rows else ((low + high) / 2, high)
        )
    full = torch.zeros(rows)
    for _ in range(40):  # what full rows cannot take goes to the others
        full = (full + counts * (nnz - full.sum()) / counts.sum()).clamp(max=cols)
    # Of a row with n blocks, the n smallest of random numbers: the rank, moved by less than one.
    order = torch.rand(rows, cols).argsort(1).argsort(1)
    return nearest(order - full[torch.randperm(rows)].view(-1, 1), nnz)


def nearest(distance, nnz):
    """A mask of the nnz smallest."""
    mask = torch.zeros(distance.numel(), dtype=torch.bool)
    mask[distance.flatten().argsort()[:nnz]] = True
    return mask.view_as(distance)


MASKS = {"random": None, "skewed": skewed, "banded": banded}


def pattern_of(kind, shape, density, block):
    """On the GPU."""
    pattern = Pattern.random(shape, density, block)
    if kind != "random":
        mask = MASKS[kind](*pattern.grid, pattern.nnz)
        pattern = Pattern.from_mask(mask, block, shape)
    return pattern.to("cuda")


def pair(text):
    first, second = text.split("x")
    return int(first), int(second)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shapes", nargs="+", type=pair, default=[(14336, 4096)])
    parser.add_argument(
        "--blocks", nargs="+", type=pair, default=[(n, n) for n in (128, 64, 32, 16)]
    )
    parser.add_argument("--density", nargs="+", type=float, default=[0.5, 0.25, 0.1])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--products", nargs="+", default=PRODUCTS, choices=PRODUCTS + ON_REQUEST)
    parser.add_argument("--patterns", nargs="+", default=["random"], choices=list(MASKS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tf32", action="store_true", help="let float32 products round to TF32")
    parser.add_argument("--bsr", action="store_true", help="time torch's sparse_bsr too (forward)")
    parser.add_argument("--graph", action="store_true", help="time calls in a CUDA graph")
    parser.add_argument("--kernel", nargs="+", help="time these only, the first that accepts")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path)
    return parser.parse_args(argv)


def in_turn(calls, repeats, flush):
    """Median microseconds of each call."""
    buffer = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda") if flush else None
    times = {name: [] for name in calls}
    for repeat in range(-2, repeats):  # the first rounds warm up
        for name, call in calls.items():
            if flush:
                buffer.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            if repeat >= 0:
                times[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(samples) for name, samples in times.items()}


def graph_of(calls):
    """A call that runs all of them, from a CUDA graph."""
    calls[0]()  # what is set up once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def in_turn_as_graphs(calls, repeats):
    """Median microseconds of one of the calls of each list."""
    times = in_turn({name: graph_of(some) for name, some in calls.items()}, repeats, flush=False)
    return {name: times[name] / len(some) for name, some in calls.items()}


def copies_beyond_l2(weight):
    """The weight and as many copies as L2 cannot hold."""
    size = weight.numel() * weight.element_size()
    return [weight, *(weight.clone() for _ in range(max(2, L2_BYTES // size)))]


def bsr_call(x, values, pattern):
    crow, col = split_index(pattern.index, pattern.grid, pattern.nnz)[:2]
    weight = torch.sparse_bsr_tensor(crow, col, values, pattern.shape)
    return lambda: torch.nn.functional.linear(x, weight)


def kernel_of(values, product, tokens, pattern):
    if product == "int8":
        stored = values.to(torch.int8)
        text = ops.explain(stored, "forward", tokens, *pattern.shape, False, input=values)
    else:
        text = ops.explain(values, product, tokens, *pattern.shape, False)
    return re.search(r"(\w+): chosen", text).group(1)


def dense_calls(x, dy, weight):
    return {
        "forward": lambda: torch.nn.functional.linear(x, weight),
        "int8": lambda: torch.nn.functional.linear(x, weight),
        "grad_input": lambda: dy @ weight,
        "grad_weight": lambda: dy.t() @ x,
    }


def sparse_calls(x, dy, values, pattern, int8=False):
    index, (out_features, in_features) = pattern.index, pattern.shape
    calls = {}
    if int8:
        stored, scales = (50 * values).to(torch.int8), torch.rand(out_features, device="cuda")
        calls["int8"] = lambda: ops.forward_int8(x, stored, scales, index, None, out_features)
    return calls | {
        "forward": lambda: ops.forward(x, values, index, None, out_features),
        "grad_input": lambda: ops.grad_input(dy, values, index, in_features),
        "grad_weight": lambda: ops.grad_weight(dy, x, index, *values.shape),
    }


def normal(dtype, *sizes):
    return torch.randn(sizes, device="cuda").to(getattr(torch, dtype))


def measure(args):
    for shape, tokens in itertools.product(args.shapes, args.tokens):
        x, dy = normal(args.dtype, tokens, shape[1]), normal(args.dtype, tokens, shape[0])
        weight = normal(args.dtype, *shape)
        weights = copies_beyond_l2(weight) if args.graph else [weight]
        dense = [dense_calls(x, dy, weight) for weight in weights]
        for block, density, kind in itertools.product(args.blocks, args.density, args.patterns):
            pattern = pattern_of(kind, shape, density, block)
            values = normal(args.dtype, pattern.nnz, *block)
            layers = copies_beyond_l2(values) if args.graph else [values]
            int8 = "int8" in args.products
            ours = [sparse_calls(x, dy, values, pattern, int8) for values in layers]
            for product in args.products:
                calls = {
                    "dense": [call[product] for call in dense],
                    "ours": [call[product] for call in ours],
                }
                if args.bsr and product == "forward":
                    calls["bsr"] = [bsr_call(x, values, pattern) for values in layers]
                if product == "int8":
                    calls["forward"] = [call["forward"] for call in ours]
                if args.graph:
                    times = in_turn_as_graphs(calls, args.repeats)
                else:
                    first = {name: some[0] for name, some in calls.items()}
                    times = in_turn(first, args.repeats, flush=True)
                yield {
                    "out": shape[0],
                    "in": shape[1],
                    "tokens": tokens,
                    "block": block,
                    "density": density,
                    "pattern": kind,
                    "product": product,
                    "kernel": kernel_of(values, product, tokens, pattern),
                    **{f"{name}_us": time for name, time in times.items()},
                    "speedup": times["dense"] / times["ours"],
                }


def write(path, results, **about):
    """The results as JSON, with on what they were measured and the command that repeats them."""
    about |= {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": "python " + " ".join(sys.argv),
    }
    path.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


def main(argv=None):
    args = arguments(argv)
    if not torch.cuda.is_available():
        sys.exit("gpu.py: there is no NVIDIA GPU here")
    if args.kernel:
        os.environ["BLOCK_SPARSE_KERNEL"] = ",".join(args.kernel)
    torch.backends.cuda.matmul.allow_tf32 = args.tf32
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    results = []
    for row in measure(args):
        results.append(row)
        bsr = f"  (torch bsr {row['dense_us'] / row['bsr_us']:.2f}x)" if "bsr_us" in row else ""
        print(
            f"{row['out']:5}x{row['in']:<5} tokens {row['tokens']:<5} "
            f"block {row['block'][0]:3}x{row['block'][1]:<3} density {row['density']:<5} "
            f"{row['pattern']:7} {row['product']:11} dense {row['dense_us']:7.1f} us, "
            f"ours {row['ours_us']:7.1f} us = {row['speedup']:5.2f}x {row['kernel']}{bsr}",
            flush=True,
        )
    if args.json:
        write(args.json, results, dtype=args.dtype, tf32=args.tf32)
    if args.plot:
        import gpu_plots  # wants matplotlib, which the measurements do not

        about = {"gpu": torch.cuda.get_device_name(), "dtype": args.dtype}
        gpu_plots.plot(results, about, args.plot)


if __name__ == "__main__":
    main()
