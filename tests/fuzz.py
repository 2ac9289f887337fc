"""Feeds the ops corrupt arguments. Run by test_errors.py in a process of its own: a crash is a
failure that it sees. Every tensor ends where a page begins that must not be touched, so that a read
beyond the end is a crash too.

Usage: fuzz.py CASES SEED
"""

import collections
import ctypes
import json
import mmap
import random
import resource
import sys
import warnings

import torch

from pytorch_block_sparse import Pattern
from pytorch_block_sparse.testing import dense_forward, dense_grad_input, dense_grad_weight

namespace = torch.ops.block_sparse
CLEAN = (ValueError, TypeError, RuntimeError)
HUGE = [-1, 0, 1, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63), 2**64]


class Arena:
    """Memory whose last byte is followed by a page that cannot be read or written."""

    BYTES = 1 << 18

    def __init__(self):
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        size = self.BYTES + mmap.PAGESIZE
        start = libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if libc.mprotect(start + self.BYTES, mmap.PAGESIZE, 0) != 0:  # PROT_NONE
            raise OSError("mprotect failed")
        self.memory = (ctypes.c_char * self.BYTES).from_address(start)

    def hold(self, tensor):
        """A copy of `tensor` at the end of the arena."""
        size = tensor.numel() * tensor.element_size()
        if size == 0 or size > self.BYTES:
            return tensor.clone()
        held = torch.frombuffer(self.memory, dtype=torch.uint8)[self.BYTES - size :]
        return held.view(tensor.dtype).view(tensor.shape).copy_(tensor)


ARENAS = [Arena() for _ in range(8)]


def corrupt_entries(rng, tensor):
    """Some entries of an integer tensor become what they must not be."""
    flat = tensor.clone().flatten()
    if flat.numel() == 0 or flat.dtype not in (torch.int32, torch.int64):
        return tensor
    info = torch.iinfo(flat.dtype)
    kind = rng.randrange(6)
    if kind == 0:
        flat = flat.flip(0)
    elif kind == 1:
        flat = flat[torch.randperm(flat.numel())]
    elif kind == 2:
        flat.fill_(rng.choice([info.min, -1, 1, flat.numel(), info.max]))
    else:
        for _ in range(rng.choice([1, 1, 2, 8])):
            near = int(flat[rng.randrange(flat.numel())]) + rng.choice([-1, 1])
            value = rng.choice([info.min, -1, 0, 1, near, flat.numel(), info.max])
            flat[rng.randrange(flat.numel())] = max(info.min, min(info.max, value))
    return flat.view(tensor.shape)


def longer(rng, tensor):
    return torch.cat([tensor.flatten(), tensor.flatten()[: rng.randrange(1, 6)]])


TENSOR_MUTATIONS = [
    corrupt_entries,
    corrupt_entries,
    corrupt_entries,
    longer,
    lambda rng, t: t.to(rng.choice([torch.int32, torch.int64, torch.bool, torch.uint8])),
    lambda rng, t: t.to(rng.choice([torch.float16, torch.bfloat16, torch.float64])),
    lambda rng, t: t.to(torch.complex64),
    lambda rng, t: t.unsqueeze(rng.choice([0, -1])),
    lambda rng, t: t.flatten()[: -rng.randrange(1, 6)],
    lambda rng, t: t[..., :-1] if t.dim() else t,
    lambda rng, t: t[:0] if t.dim() else t,
    lambda rng, t: t[..., :0] if t.dim() else t,
    lambda rng, t: t.sum().to(t.dtype),
    lambda rng, t: (
        t.flatten()[:1].expand(t.shape)
        if t.dim() == 1 and t.numel()
        else t.mT
        if t.dim() >= 2
        else t
    ),
    lambda rng, t: t.repeat_interleave(2)[::2] if t.dim() == 1 else t,
    lambda rng, t: t.to("meta"),
    lambda rng, t: t.to_sparse() if t.dim() else t,
    lambda rng, t: rng.choice([None, "text", 1.5, 7, [], [1, 2], (), {}, object()]),
]


def mutate(rng, argument):
    if isinstance(argument, torch.Tensor):
        if argument.is_meta or argument.layout != torch.strided:
            return argument  # is corrupt already
        return rng.choice(TENSOR_MUTATIONS)(rng, argument)
    if isinstance(argument, list) and argument:
        position = rng.randrange(len(argument))
        corrupt = [*argument[:position], mutate(rng, argument[position]), *argument[position + 1 :]]
        return rng.choice([corrupt, corrupt, corrupt, argument[1:], argument + argument[:1]])
    if isinstance(argument, bool):
        return rng.choice([None, "text", 2, -1, not argument])
    if isinstance(argument, int):
        # Not just under 2^31: a grid of so many block rows is legal, and takes all memory there is.
        near = argument + rng.choice([-1, 1, 4, -4]) if abs(argument) < 2**20 else 3
        return rng.choice([*HUGE, *HUGE, near, near, 1.5, "text", None, torch.ones(2), True])
    return rng.choice([None, "text", 1.5, torch.ones(3), -1])


def held(arenas, argument):
    """The same, but tensors end where the memory does."""
    if isinstance(argument, list):
        return [held(arenas, item) for item in argument]
    if (
        isinstance(argument, torch.Tensor)
        and argument.device.type == "cpu"
        and argument.layout == torch.strided
        and argument.is_contiguous()
    ):
        return next(arenas).hold(argument)
    return argument


def valid_call(rng):
    """(op, valid arguments, what checks the result of unchanged ones)."""
    block = rng.choice([(4, 4), (16, 16), (32, 32), (1, 16), (7, 5)])
    rows, cols = rng.randrange(1, 5), rng.randrange(1, 5)
    shape = (
        rows * block[0] - rng.randrange(block[0]),
        cols * block[1] - rng.randrange(block[1]),
    )
    mask = torch.rand(rows, cols) < rng.choice([0.0, 0.3, 0.6, 1.0])
    pattern = Pattern.from_mask(mask, block, shape)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    leading = rng.choice([(), (0,), (1,), (5,), (40,), (2, 3)])

    def data(*size):
        return torch.randint(-1, 2, size).to(dtype)

    x, dy = data(*leading, shape[1]), data(*leading, shape[0])
    values, bias = data(pattern.nnz, *block), data(shape[0])
    index = pattern.index

    def equal_index(result):
        assert torch.equal(result, index)

    def equal(wanted):
        def compare(result):
            assert result.dtype == dtype and torch.equal(result, wanted().to(dtype))

        return compare

    some = torch.randperm(pattern.nnz)[: rng.randrange(pattern.nnz + 1)]
    blocks = torch.stack([pattern.row_indices, pattern.col_indices], 1).long()
    return rng.choice(
        [
            (
                "forward",
                [x, values, index, bias, shape[0]],
                equal(lambda: dense_forward(x.double(), values.double(), pattern, bias.double())),
            ),
            (
                "forward",
                [x, values, index, None, shape[0]],
                equal(lambda: dense_forward(x.double(), values.double(), pattern, None)),
            ),
            (
                "forward_packed",
                [x, namespace.pack(values), index, None, shape[0], *block],
                equal(lambda: dense_forward(x.double(), values.double(), pattern, None)),
            ),
            (
                "forward_int8",
                [x, values.to(torch.int8), torch.ones(shape[0]), index, bias, shape[0]],
                equal(lambda: dense_forward(x.double(), values.double(), pattern, bias.double())),
            ),
            (
                "unpack",
                [namespace.pack(values), *block],
                equal(lambda: values),
            ),
            ("pack", [values], None),
            (
                "grad_input",
                [dy, values, index, shape[1]],
                equal(lambda: dense_grad_input(dy.double(), values.double(), pattern)),
            ),
            (
                "grad_weight",
                [dy, x, index, pattern.nnz, *block],
                equal(lambda: dense_grad_weight(dy.double(), x.double(), pattern)),
            ),
            ("index_from_bsr", [pattern.crow_indices, pattern.col_indices, cols], equal_index),
            ("with_walks", [index, rows, cols, pattern.nnz, *block], equal_index),
            ("index_from_mask", [mask], equal_index),
            ("index_from_blocks", [blocks, rows, cols], equal_index),
            ("index_random", [rows, cols, rng.randrange(rows * cols + 1), 5, False], None),
            ("index_random", [rows, cols, rng.randrange(rows * cols + 1), 5, True], None),
            ("index_banded", [rows, cols, rng.randrange(4)], None),
            ("explain", [values, "grad_input", 5, *shape, True], None),
            ("zero_blocks_", [[values, x[None, None].flatten(2)], [some, some[:0]]], None),
        ]
    )


def check_pattern(op, args, index):
    """What an index op returned must be the index of a pattern, whatever it was given."""
    if op == "with_walks":
        rows, cols = args[1:3]
    elif op == "index_from_bsr":
        rows, cols = args[0].numel() - 1, args[2]
    elif op == "index_from_mask":
        rows, cols = args[0].shape
    elif op == "index_from_blocks":
        rows, cols = args[1:]
    else:
        rows, cols = args[:2]
    rows, cols = int(rows), int(cols)
    nnz, rest = divmod(index.numel() - rows - cols - 2, 4)
    assert rest == 0 and nnz >= 0
    crow, col = index[: rows + 1], index[rows + 1 : rows + 1 + nnz]
    assert torch.equal(namespace.index_from_bsr(crow.clone(), col.clone(), cols), index)


def main(cases, seed):
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    counts = collections.Counter()
    for case in range(cases):
        op, args, check = valid_call(rng)
        unchanged = rng.random() < 0.1
        if not unchanged:
            for _ in range(rng.choice([1, 1, 1, 2, 3])):
                position = rng.randrange(len(args))
                args[position] = mutate(rng, args[position])
            if rng.random() < 0.02:
                args = args[: rng.randrange(len(args))]
        arenas = iter(ARENAS)
        args = [held(arenas, arg) for arg in args]
        try:
            result = getattr(namespace, op)(*args)
        except CLEAN as error:
            assert not unchanged, (case, op, args, error)
            assert str(error), (case, op)
            counts["refused"] += 1
            counts[f"refused {op}"] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"case {case}: {op}: {type(error).__name__}: {error}") from error
        counts["done"] += 1
        if unchanged and check is not None:
            check(result)
        if op.startswith("index_") and result.device.type == "cpu":
            check_pattern(op, args, result)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
