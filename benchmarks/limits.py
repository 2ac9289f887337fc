"""Measurements that linear.py does not make: threads, skewed patterns, and the machine's limits.

Each yields rows ``{"set", "case", "ratio"}``, where the ratio is the one that a bar is about. What
is compared is timed in turn, as in linear.py.
"""

import ctypes
import os
import pathlib
import statistics
import subprocess
import tempfile
import time

import linear
import torch

ops = torch.ops.block_sparse
ROUNDS = 25


def load_machine():
    """machine.cpp, compiled."""
    source = pathlib.Path(__file__).with_name("machine.cpp")
    library = pathlib.Path(tempfile.mkdtemp()) / "machine.so"
    flags = ["-O2", "-mavx2", "-mfma", "-shared", "-fPIC"]
    command = ["c++", *flags, str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    machine = ctypes.CDLL(str(library))
    machine.multiply_add.argtypes = [ctypes.c_int64]
    machine.multiply_add.restype = ctypes.c_int64
    machine.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    machine.read_all.restype = ctypes.c_float
    return machine


def row(name, case, ratio, **more):
    return {"set": name, "case": case, "ratio": ratio, **more}


def operands(shape, density, block, tokens, dtype=torch.float32):
    """Index, values and x of a random pattern."""
    rows, cols = shape[0] // block[0], shape[1] // block[1]
    nnz = round(density * rows * cols)
    values = torch.randn(nnz, *block).to(dtype)
    x = torch.randn(tokens, shape[1]).to(dtype)
    return ops.index_random(rows, cols, nnz, 1, False), values, x


def two_threads(args):
    """Speed on two threads over that on one, by the wall: what a user of the machine sees."""
    for shape in [(3072, 768), (4096, 4096)]:
        index, values, x = operands(shape, 0.25, (32, 32), 512)
        dy = torch.randn(512, shape[0])
        args.block, args.products = (32, 32), ["forward", "prepacked", "grad_input", "grad_weight"]
        for name, call in linear.sparse_calls(args, x, dy, values, index, shape[0]).items():
            yield row("two threads", f"{shape[0]}x{shape[1]} {name}", on_threads(call))


def on_threads(call, other=None):
    """Median wall time of `call` on one thread over that on two; or of two calls, both on two."""
    times = ([], [])
    for repeat in range(-2, ROUNDS):
        for i in (0, 1):
            torch.set_num_threads(2 if other else i + 1)
            start = time.perf_counter()
            (other if other and i == 1 else call)()
            if repeat >= 0:
                times[i].append(time.perf_counter() - start)
    torch.set_num_threads(1)
    return statistics.median(times[0]) / statistics.median(times[1])


def skewed(args):
    """Rate of skewed patterns over that of a balanced one with as many blocks, on two threads."""
    rows = cols = 128
    one_row = torch.zeros(rows, cols, dtype=torch.bool)
    one_row[17] = True
    one_row.view(-1)[torch.randperm(rows * cols)[:300]] = True
    power_law = torch.rand(rows, cols) < (2.0 / torch.arange(1, rows + 1))[:, None].clamp(max=1)
    for name, mask in {"one row with 30 %": one_row, "power law": power_law}.items():
        nnz, shape = int(mask.sum()), (rows * 32, cols * 32)
        index, balanced = ops.index_from_mask(mask), ops.index_random(rows, cols, nnz, 1, True)
        values, x = torch.randn(nnz, 32, 32), torch.randn(512, shape[1])
        dy = torch.randn(512, shape[0])
        args.block, args.products = (32, 32), ["forward", "prepacked", "grad_input", "grad_weight"]
        calls = [linear.sparse_calls(args, x, dy, values, i, shape[0]) for i in (balanced, index)]
        for product in args.products:
            ratio = on_threads(calls[0][product], calls[1][product])
            yield row("skewed", f"{name} {product}", ratio)


def peak(args):
    """Share of the peak of multiply-adds in AVX2 that prepacked forward reaches."""
    machine = load_machine()
    os.environ["BLOCK_SPARSE_ISA"] = "avx2"
    try:
        for shape in map(linear.pair, linear.SHAPES):
            index, values, x = operands(shape, 0.25, (32, 32), 512)
            packed = ops.pack(values)
            operations = machine.multiply_add(1)
            steps = 2 * 512 * values.numel() // operations
            calls = {
                "peak": lambda steps=steps: machine.multiply_add(steps),
                "ours": lambda x=x, packed=packed, index=index, shape=shape: ops.forward_packed(
                    x, packed, index, None, shape[0], 32, 32
                ),
            }
            times = linear.in_turn(args, calls)
            yield row("avx2 peak", f"{shape[0]}x{shape[1]}", times["peak"] / times["ours"])
    finally:
        del os.environ["BLOCK_SPARSE_ISA"]


def bandwidth(args):
    """Share of the bandwidth of plain reads of the same bytes that prepacked forward reaches."""
    machine = load_machine()
    for shape in map(linear.pair, linear.SHAPES):
        for density in (0.5, 0.25, 0.1):
            index, values, _ = operands(shape, density, (32, 32), 1)
            packed = ops.pack(values)
            address, count = packed.data_ptr(), packed.numel()
            calls = {"read": lambda a=address, n=count: machine.read_all(a, n)}
            for tokens in (1, 2, 4, 8):
                x = torch.randn(tokens, shape[1])
                calls[tokens] = lambda x=x, p=packed, i=index, n=shape[0]: ops.forward_packed(
                    x, p, i, None, n, 32, 32
                )
            with torch.inference_mode():
                times = linear.in_turn(args, calls)
            gigabytes = packed.numel() * 4 / times["read"] / 1e9
            for tokens in (1, 2, 4, 8):
                yield row(
                    "bandwidth",
                    f"{shape[0]}x{shape[1]} {tokens} tokens",
                    times["read"] / times[tokens],
                    density=density,
                    read_GB_per_s=gigabytes,
                )


def half(args):
    """Rate in float16 over that in float32."""
    for shape in map(linear.pair, linear.SHAPES):
        calls = {}
        for dtype in (torch.float32, torch.float16):
            index, values, x = operands(shape, 0.25, (32, 32), 512, dtype)
            calls[dtype] = lambda x=x, v=values, i=index, n=shape[0]: ops.forward(x, v, i, None, n)
        times = linear.in_turn(args, calls)
        yield row("float16", f"{shape[0]}x{shape[1]}", times[torch.float32] / times[torch.float16])


ALL = [two_threads, skewed, peak, bandwidth, half]
