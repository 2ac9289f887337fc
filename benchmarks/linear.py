"""The products of a linear layer, block sparse against the best dense call that torch offers.

The best dense call is the fastest, for a shape and dtype, of ``F.linear``, oneDNN with the weight
packed ahead, and oneDNN with a plain weight. All are timed in turn, with ours. The *rate* is useful
(nonzero) flops over time as a share of the best dense rate: 1 means that 75 % sparse is four times
faster than dense. Gradients are held against the best dense *forward* of their shape.

    python benchmarks/linear.py                    # the figures of the README, about 10 minutes
    python benchmarks/linear.py --dtype bfloat16 --tokens 512 2048 --density 0.25
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timing import interleaved, provenance
from torch import Tensor
from torch.nn import functional

from pytorch_block_sparse import BlockSparseLinear, ops

SHAPES = [(3072, 768), (768, 3072), (4096, 4096)]  # (out_features, in_features)
PRODUCTS = ["forward", "grad_input", "grad_weight", "step"]


def dense_calls(x: Tensor, weight: Tensor) -> dict[str, Callable[[], Any]]:
    """The dense calls that torch offers for ``y = x Wt``."""
    onednn = torch.ops.mkldnn
    packed = onednn._reorder_linear_weight(weight, x.shape[0])
    calls: dict[str, Callable[[], Any]] = {
        "F.linear": lambda: functional.linear(x, weight),
        "oneDNN packed": lambda: onednn._linear_pointwise(x, packed, None, "none", [], ""),
        "oneDNN plain": lambda: onednn._linear_pointwise(x, weight, None, "none", [], ""),
    }
    return calls


def sparse_calls(layer: BlockSparseLinear, x: Tensor, dy: Tensor) -> dict[str, Callable[[], Any]]:
    """Ours: the three products as the layer calls them."""
    values, index = layer.values.detach(), layer.pattern.index
    out_features, in_features = layer.out_features, layer.in_features
    return {
        "forward": lambda: ops.forward(x, values, index, None, out_features),
        "grad_input": lambda: ops.grad_input(dy, values, index, in_features),
        "grad_weight": lambda: ops.grad_weight(dy, x, index, *layer.block_shape),
    }


def training_step(layer: torch.nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Forward, both gradients of the layer and the gradient of its input."""
    x = x.detach().clone().requires_grad_()

    def step() -> None:
        with torch.enable_grad():
            layer(x).backward(dy)

    return step


def measure(
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    variants: Iterable[tuple[tuple[int, int], float]],
    repeats: int,
) -> list[dict[str, Any]]:
    """One cell for each variant (block shape, density) and product, and one for each dense call."""
    out_features, in_features = shape
    x, dy = (
        torch.randn(tokens, in_features, dtype=dtype),
        torch.randn(tokens, out_features, dtype=dtype),
    )
    dense = torch.nn.Linear(in_features, out_features, bias=False, dtype=dtype)
    calls = {("dense", name): call for name, call in dense_calls(x, dense.weight.detach()).items()}
    calls["dense", "step"] = training_step(dense, x, dy)
    densities = {}
    for block_shape, density in variants:
        layer = BlockSparseLinear(
            in_features, out_features, False, density, block_shape=block_shape, dtype=dtype
        )
        key = f"{block_shape[0]}x{block_shape[1]}", density
        densities[key] = layer.density
        for name, call in sparse_calls(layer, x, dy).items():
            calls[key, name] = call
        calls[key, "step"] = training_step(layer, x, dy)

    with torch.no_grad():
        seconds = interleaved(calls, repeats)
    cell = {"shape": list(shape), "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    flops = 2 * tokens * out_features * in_features
    forwards = {
        name: s for (kind, name), s in seconds.items() if kind == "dense" and name != "step"
    }
    best = min(forwards.values())
    cells = [
        {**cell, "call": name, "us": s * 1e6, "gflops": flops / s / 1e9}
        for name, s in forwards.items()
    ]
    for key, density in densities.items():
        for name in PRODUCTS:
            s = seconds[key, name]
            row = {
                **cell,
                "call": name,
                "block": key[0],
                "density": key[1],
                "us": s * 1e6,
                "speedup": best / s,
                "rate": best / s * density,
            }
            if name == "step":
                row["speedup"] = seconds["dense", "step"] / s
                row["speedup_over_best"] = 3 * best / s
                row["rate"] = row["speedup_over_best"] * density
            cells.append(row)
    return cells


def geometric_mean(numbers: Iterable[float]) -> float:
    """Of positive numbers."""
    logs = [math.log(number) for number in numbers]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def print_table(cells: list[dict[str, Any]]) -> None:
    """Rate (and speed-up), as the geometric mean over the shapes."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        if "density" in cell:
            key = cell["dtype"], cell["block"], cell["call"], cell["tokens"], cell["density"]
            groups.setdefault(key, []).append(cell)
    densities = sorted({key[-1] for key in groups}, reverse=True)
    rows = dict.fromkeys(key[:-1] for key in groups)
    print("rate of the best dense rate (speed-up over the best dense call); step: over nn.Linear's")
    print(f"{'':44}" + "".join(f"{f'density {d:g}':>18}" for d in densities))
    for row in sorted(rows, key=lambda r: (r[0], r[1], PRODUCTS.index(r[2]), r[3])):
        dtype, block, call, tokens = row
        texts = []
        for density in densities:
            group = groups.get((*row, density), [])
            rate = geometric_mean(c["rate"] for c in group)
            speedup = geometric_mean(c["speedup"] for c in group)
            texts.append(f"{rate:.2f} ({speedup:.1f}x)")
        label = f"{dtype:9} {block:>7} {call:12} {tokens:5} tokens"
        print(f"{label:44}" + "".join(f"{text:>18}" for text in texts))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu"], help="where to measure")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="names of torch dtypes")
    parser.add_argument("--tokens", nargs="+", type=int, default=[32, 64, 512, 2048])
    parser.add_argument("--density", nargs="+", type=float, default=[0.5, 0.25, 0.1])
    parser.add_argument("--block", nargs="+", default=["32x32"], help="out x in")
    parser.add_argument("--repeats", type=int, default=15, help="samples of each call")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table and writes the results."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    blocks = [tuple(int(size) for size in block.split("x")) for block in args.block]
    cells: list[dict[str, Any]] = []
    for name, shape, tokens in product(args.dtype, SHAPES, args.tokens):
        variants = list(product(blocks, args.density))
        cells += measure(shape, tokens, getattr(torch, name), variants, args.repeats)
        print(f"measured {name} {shape[0]}x{shape[1]}, {tokens} tokens", flush=True)
    print_table(cells)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**provenance(), "cells": cells}, indent=1) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
