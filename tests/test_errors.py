"""Bad arguments: a clean exception each time, that says what was wrong and what was wanted.

The bulk is fuzz.py's; here are the messages.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pytorch_block_sparse import ops
from zoo import pattern_of

namespace = torch.ops.block_sparse
FUZZ = Path(__file__).with_name("fuzz.py")


def run_fuzz(cases, seed):
    return subprocess.run(
        [sys.executable, str(FUZZ), str(cases), str(seed)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_fuzz_of_all_ops(seed):
    process = run_fuzz(10_000, seed)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    counts = json.loads(process.stdout)
    assert counts["refused"] > 5_000 and counts["done"] > 1_000
    for op in (
        "forward",
        "forward_packed",
        "forward_int8",
        "pack",
        "unpack",
        "grad_input",
        "grad_weight",
        "index_from_bsr",
        "with_walks",
        "index_from_mask",
        "index_from_blocks",
        "index_random",
        "index_banded",
        "explain",
        "zero_blocks_",
    ):
        assert counts[f"refused {op}"] > 100


def test_the_guard_page_of_the_fuzz_test_catches_a_read_beyond_the_end():
    code = (
        "import ctypes, sys; sys.path.insert(0, sys.argv[1]); import fuzz, torch;"
        "t = fuzz.ARENAS[0].hold(torch.ones(5));"
        "print(t.sum().item(), flush=True);"
        "ctypes.c_float.from_address(t.data_ptr() + 4 * 5).value"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(FUZZ.parent)], capture_output=True, text=True, check=False
    )
    assert process.stdout == "5.0\n" and process.returncode < 0  # ended by a signal


# --- messages: the argument, what it was, what was wanted -----------------------------------------

PATTERN = pattern_of("full", (96, 64), (32, 32))  # 3 x 2 blocks, 6 present, index of 31
X, DY = torch.ones(5, 64), torch.ones(5, 96)
VALUES, BIAS, INDEX = torch.ones(6, 32, 32), torch.ones(96), PATTERN.index


def forward(x=X, values=VALUES, index=INDEX, bias=BIAS, out_features=96):
    return ops.forward(x, values, index, bias, out_features)


def grad_input(dy=DY, values=VALUES, index=INDEX, in_features=64):
    return ops.grad_input(dy, values, index, in_features)


def grad_weight(dy=DY, x=X, index=INDEX, nnz=6, block_out=32, block_in=32):
    return ops.grad_weight(dy, x, index, nnz, block_out, block_in)


def corrupt(position, value):
    index = INDEX.clone()
    index[position] = value
    return index


def ints(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


# The packed index: crow [0:4] col [4:10] row [10:16] ccol [16:19] trow [19:25] perm [25:31].
CASES = {
    "input_dtype": (lambda: forward(X.int()), "input: dtype must be float64.*got Int"),
    "values_dtype": (lambda: forward(values=VALUES.bool()), "values: dtype must be.*got Bool"),
    "mixed_dtypes": (lambda: forward(X.double()), "input: dtype is f64, but values has f32"),
    "bias_dtype": (lambda: forward(bias=BIAS.half()), "bias: dtype is f16, but input has f32"),
    "input_0d": (lambda: forward(X[0, 0]), "input: must have at least one dimension"),
    "values_2d": (
        lambda: forward(values=VALUES[0]),
        r"values: must be \[nnz.*got Float \[32, 32\]",
    ),
    "empty_block": (lambda: forward(values=VALUES[:, :0]), "values: a block must have.*got 0"),
    "bias_size": (
        lambda: forward(bias=BIAS[1:]),
        r"bias: must have shape \[96\].*got Float \[95\]",
    ),
    "bias_2d": (lambda: forward(bias=BIAS[None]), r"bias: must have shape \[96\].*\[1, 96\]"),
    "input_size": (
        lambda: forward(X[:, :32]),
        "index: has 31 entries; 3 x 1 blocks with 6.*need 30",
    ),
    "out_features": (lambda: forward(out_features=-1), r"out_features: is -1; .*\[0, 2\^31\)"),
    "out_features_huge": (
        lambda: forward(out_features=2**62),
        "out_features: is 4611686018427387904",
    ),
    "index_dtype": (
        lambda: forward(index=INDEX.long()),
        r"index: must be a contiguous int32.*Long \[31\]",
    ),
    "index_2d": (
        lambda: forward(index=INDEX[None]),
        r"index: must be.*one dimension, got Int \[1, 31\]",
    ),
    "index_strided": (
        lambda: forward(index=INDEX.repeat_interleave(2)[::2]),
        r"contiguous.*got strided Int \[31\]",
    ),
    "index_short": (lambda: forward(index=INDEX[1:]), "index: has 30 entries;.*need 31"),
    "index_device": (
        lambda: forward(index=INDEX.to("meta")),
        "index: is on meta, but input on cpu",
    ),
    "values_device": (
        lambda: forward(values=VALUES.to("meta")),
        "values: is on meta, but input on cpu",
    ),
    "bias_device": (lambda: forward(bias=BIAS.to("meta")), "bias: is on meta, but input on cpu"),
    "dy_device": (
        lambda: grad_input(values=VALUES.to("meta")),
        "values: is on meta, but grad_output on cpu",
    ),
    "x_device": (lambda: grad_weight(x=X.to("meta")), "input: is on meta, but grad_output on cpu"),
    "crow_start": (
        lambda: forward(index=corrupt(0, 1)),
        "crow_indices must ascend from 0.*from 1 to 6",
    ),
    "crow_end": (
        lambda: forward(index=corrupt(3, 7)),
        "crow_indices must ascend.*6; it goes from 0 to 7",
    ),
    "crow_descends": (
        lambda: grad_input(index=corrupt(1, 5)),
        "crow_indices must.*descends in between",
    ),
    "crow_negative": (
        lambda: forward(index=corrupt(1, -5)),
        "crow_indices must.*descends in between",
    ),
    "col_range": (
        lambda: grad_weight(index=corrupt(5, 2)),
        r"col_indices has an entry outside \[0, 2\)",
    ),
    "col_negative": (
        lambda: forward(index=corrupt(4, -1)),
        r"col_indices has an entry outside \[0, 2\)",
    ),
    "row_range": (
        lambda: grad_weight(index=corrupt(10, 3)),
        r"row of each block has.*outside \[0, 3\)",
    ),
    "ccol_end": (
        lambda: grad_input(index=corrupt(18, 2**31 - 1)),
        "transposed crow_indices must ascend",
    ),
    "trow_range": (
        lambda: grad_input(index=corrupt(19, 3)),
        r"transposed col_indices has.*\[0, 3\)",
    ),
    "perm_range": (
        lambda: grad_input(index=corrupt(30, 6)),
        r"block permutation has.*outside \[0, 6\)",
    ),
    "dy_0d": (lambda: grad_input(DY[0, 0]), "grad_output: must have at least one dimension"),
    "in_features": (lambda: grad_input(in_features=-7), "in_features: is -7"),
    "tokens": (lambda: grad_weight(x=X[1:]), "input: has 4 rows, but grad_output has 5"),
    "block_out": (lambda: grad_weight(block_out=0), "block_out: a block must have.*got 0"),
    "block_in": (
        lambda: grad_weight(block_in=2**31),
        "block_in: a block must have.*got 2147483648",
    ),
    "grad_weight_index": (
        lambda: grad_weight(index=INDEX[2:]),
        "index: has 29 entries; 3 x 2 blocks with 6 present need 31",
    ),
    "mask_dtype": (
        lambda: namespace.index_from_mask(torch.ones(2, 2)),
        r"mask: must be a bool.*Float \[2, 2\]",
    ),
    "mask_1d": (
        lambda: namespace.index_from_mask(torch.ones(2).bool()),
        r"mask: must be.*Bool \[2\]",
    ),
    "blocks_dtype": (
        lambda: namespace.index_from_blocks(ints(0, 0)[None], 2, 2),
        r"blocks: must be an int64.*Int \[1, 2\]",
    ),
    "blocks_outside": (
        lambda: namespace.index_from_blocks(torch.tensor([[0, 2]]), 2, 2),
        r"blocks: \(0, 2\) is outside.*2 x 2",
    ),
    "blocks_twice": (
        lambda: namespace.index_from_blocks(torch.tensor([[1, 0], [1, 0]]), 2, 2),
        r"\(1, 0\) is named twice",
    ),
    "blocks_grid": (
        lambda: namespace.index_from_blocks(torch.zeros(0, 2).long(), -1, 2),
        "-1 x 2 blocks; both must be at least 0",
    ),
    "crow_empty": (lambda: namespace.index_from_bsr(ints(), ints(), 2), "crow_indices: is empty"),
    "crow_first": (
        lambda: namespace.index_from_bsr(ints(1, 1), ints(0), 2),
        "must start at 0, got 1",
    ),
    "crow_last": (
        lambda: namespace.index_from_bsr(ints(0, 2), ints(0), 2),
        "must end at.*1, got 2",
    ),
    "crow_order": (
        lambda: namespace.index_from_bsr(ints(0, 2, 1, 2), ints(0, 1), 2),
        "crow_indices: must ascend",
    ),
    "col_outside": (
        lambda: namespace.index_from_bsr(ints(0, 1), ints(2), 2),
        r"col_indices: entry 0 is 2; .*\[0, 2\)",
    ),
    "col_twice": (
        lambda: namespace.index_from_bsr(ints(0, 2), ints(1, 1), 2),
        "without duplicates.*has 1 before 1",
    ),
    "col_order": (
        lambda: namespace.index_from_bsr(ints(0, 2), ints(1, 0), 2),
        "must ascend within a block row.*1 before 0",
    ),
    "col_device": (
        lambda: namespace.index_from_bsr(ints(0, 1), ints(0).to("meta"), 2),
        "col_indices: is on meta, but crow_indices on cpu",
    ),
    "grid_overflow": (lambda: namespace.index_from_bsr(ints(0), ints(), 2**31), "overflows int32"),
    "random_nnz": (
        lambda: namespace.index_random(2, 2, 5, 0, False),
        "nnz: 5 blocks do not fit.*2 x 2",
    ),
    "random_nnz_negative": (lambda: namespace.index_random(2, 2, -1, 0, True), "nnz: -1"),
    "random_nnz_huge": (
        lambda: namespace.index_random(2, 2, 2**40, 0, False),
        "1099511627776 blocks overflow int32",
    ),
    "bandwidth": (
        lambda: namespace.index_banded(2, 2, -1),
        "bandwidth: must be at least 0, got -1",
    ),
    "product": (
        lambda: namespace.explain(VALUES, "backward", 1, 96, 64, True),
        "product: must be forward, grad_input or grad_weight, got 'backward'",
    ),
    "explain_tokens": (
        lambda: namespace.explain(VALUES, "forward", -1, 96, 64, True),
        "tokens: .*got -1",
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_message(name):
    call, message = CASES[name]
    with pytest.raises(ValueError) as error:
        call()
    assert re.search(message, str(error.value), flags=re.DOTALL), str(error.value)


@pytest.mark.cuda
def test_messages_name_the_devices():
    with pytest.raises(ValueError, match="values: is on cpu, but input on cuda:0"):
        forward(x=X.cuda())
    with pytest.raises((ValueError, RuntimeError), match="GPU"):
        forward(values=VALUES.cuda())
    with pytest.raises(ValueError, match="index: is on cpu, but input on cuda:0"):
        forward(X.cuda(), VALUES.cuda(), bias=None)


def test_the_operands_of_the_cases_above_are_right():
    """Each case changes one of them, and must be refused for that."""
    assert forward().shape == (5, 96)
    assert grad_input().shape == (5, 64)
    assert grad_weight().shape == (6, 32, 32)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["sparse", "quantized", "nested"])
def test_tensors_of_another_kind_are_refused(kind):
    x = {
        "sparse": lambda: X.to_sparse(),
        "quantized": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8),
        "nested": lambda: torch.nested.nested_tensor([X, X[:2]]),
    }[kind]()
    with pytest.raises((ValueError, RuntimeError)):
        forward(x)
