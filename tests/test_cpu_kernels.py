"""Every vectorised CPU kernel, at every instruction set level, against the reference: bit for bit.

Inputs are small integers, so that every sum is exact in every dtype and in any order; but for the
test of long sums, which are held against float64.
"""

import platform
import re
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

from pytorch_block_sparse import BlockSparseMatrix, Pattern
from pytorch_block_sparse.testing import assert_close_to_float64, kernel_names

ops = torch.ops.block_sparse

KERNELS = [name for name in kernel_names() if name != "cpu_reference"]
LEVELS = ["avx512_bf16", "avx512", "avx2", "baseline", "neon"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BLOCKS = [(32, 32), (16, 16), (64, 64), (8, 8), (4, 4), (1, 16), (16, 1), (32, 1), (1, 32)]
BLOCKS += [(48, 80), (128, 128), (24, 40), (5, 7), (1, 1), (2, 6)]
TOKENS = [0, 1, 2, 3, 7, 8, 12, 13, 31, 32, 33, 64, 100, 130]


@pytest.fixture
def run_with(monkeypatch):
    """Runs f with a kernel and a level; None where that kernel refuses."""

    def run(kernel, level, f):
        monkeypatch.setenv("BLOCK_SPARSE_KERNEL", kernel)
        monkeypatch.setenv("BLOCK_SPARSE_ISA", level)
        try:
            return f()
        except ValueError as error:
            if "no kernel accepts" in str(error):
                return None
            raise
        finally:
            monkeypatch.delenv("BLOCK_SPARSE_KERNEL")
            monkeypatch.delenv("BLOCK_SPARSE_ISA")

    return run


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def supported(level):
    message = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCK_SPARSE_ISA", "none")
        patch.setenv("BLOCK_SPARSE_KERNEL", "cpu_simd")
        try:
            index = ops.index_random(1, 1, 1, 0, False)
            ops.forward(torch.zeros(16, 32), torch.zeros(1, 32, 32), index, None, 32)
        except ValueError as error:
            message = str(error)
    return level in message.split(": ")[-1].split(", ")


needs_level = pytest.mark.parametrize(
    "level",
    [
        pytest.param(name, marks=pytest.mark.skipif(not supported(name), reason="not this machine"))
        for name in LEVELS
    ],
)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the flags of /proc/cpuinfo")
def test_all_levels_of_this_machine_were_built():
    flags = set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    needed = {"baseline": set(), "avx2": {"avx2", "fma", "f16c", "bmi2"}}
    needed["avx512"] = needed["avx2"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needed["avx512_bf16"] = needed["avx512"] | {"avx512_bf16"}
    for level, instructions in needed.items():
        assert supported(level) == (instructions <= flags), level


def integers(*shape, dtype):
    return torch.randint(-3, 4, shape).to(dtype)


def products(index, tokens, out_features, in_features, block, dtype):
    """The products, as calls without arguments. Dense operands are parts of wider matrices."""
    nnz = (index.numel() - 2 - -(-out_features // block[0]) - -(-in_features // block[1])) // 4
    values = integers(nnz, *block, dtype=dtype)
    x = integers(tokens, in_features + 3, dtype=dtype)[:, :in_features]
    dy = integers(tokens, out_features + 5, dtype=dtype)[:, :out_features]
    bias = integers(out_features, dtype=dtype)
    return {
        "forward": lambda: ops.forward(x, values, index, None, out_features),
        "forward with bias": lambda: ops.forward(x, values, index, bias, out_features),
        "grad_input": lambda: ops.grad_input(dy, values, index, in_features),
        "grad_weight": lambda: ops.grad_weight(dy, x, index, len(values), *block),
    }


def check(run_with, kernel, level, calls, label):
    """Returns how many of the calls the kernel took; one that it refuses is nothing to compare."""
    compared = 0
    for name, call in calls.items():
        actual = run_with(kernel, level, call)
        if actual is None:
            continue
        expected = run_with("cpu_reference", "", call)
        assert torch.equal(actual, expected), f"{name}: {label}"
        compared += 1
    return compared


@needs_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_reference(run_with, threads, kernel, block, dtype, level):
    rows, cols = (3, 5) if block[0] * block[1] > 64 else (12, 20)
    compared = 0
    for number, (tokens, ragged) in enumerate(product(TOKENS, (False, True))):
        out_features = rows * block[0] - (block[0] // 3 if ragged else 0)
        in_features = cols * block[1] - (block[1] // 3 if ragged else 0)
        nnz = [rows * cols // 4, 1, rows * cols, 0][number % 4]
        index = ops.index_random(rows, cols, nnz, number, False)
        threads(1 + number % 2)
        calls = products(index, tokens, out_features, in_features, block, dtype)
        label = f"{tokens} tokens, ragged: {ragged}, {nnz} blocks"
        compared += check(run_with, kernel, level, calls, label)
    if kernel == "cpu_simd":
        assert compared == len(TOKENS) * 2 * len(calls), "it takes everything"
    if block == (32, 32):
        assert compared > 0, "every kernel takes some of these"


@needs_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [b for b in BLOCKS if b[0] % 16 == 0], ids=str)
def test_packed_values_give_what_canonical_ones_do(run_with, threads, block, dtype, level):
    for number, (tokens, ragged) in enumerate(product(TOKENS, (False, True))):
        out_features = 5 * block[0] - (block[0] // 3 if ragged else 0)
        in_features = 9 * block[1] - (block[1] // 3 if ragged else 0)
        index = ops.index_random(5, 9, [11, 45][number % 2], number, False)
        threads(1 + number % 2)
        values = integers([11, 45][number % 2], *block, dtype=dtype)
        x, bias = integers(tokens, in_features, dtype=dtype), integers(out_features, dtype=dtype)
        packed = ops.pack(values)
        actual = run_with(
            "cpu_panel",
            level,
            lambda x=x, packed=packed, index=index, bias=bias, out_features=out_features: (
                ops.forward_packed(x, packed, index, bias, out_features, *block)
            ),
        )
        expected = run_with(
            "cpu_reference",
            "",
            lambda x=x, values=values, index=index, bias=bias, out_features=out_features: (
                ops.forward(x, values, index, bias, out_features)
            ),
        )
        assert torch.equal(actual, expected), (tokens, ragged)


def masks():
    skewed = torch.zeros(8, 12, dtype=torch.bool)
    skewed[3] = True
    skewed[:, 0] = True
    empty_lines = torch.rand(8, 12) < 0.5
    empty_lines[[0, 4, 7]] = False
    empty_lines[:, [1, 11]] = False
    one = torch.zeros(8, 12, dtype=torch.bool)
    one[7, 11] = True
    return {"skewed": skewed, "empty lines": empty_lines, "one block": one}


@needs_level
@pytest.mark.parametrize("name", ["skewed", "empty lines", "one block", "banded"])
@pytest.mark.parametrize("tokens", [5, 512])
def test_patterns(run_with, threads, name, tokens, level):
    threads(2)
    index = ops.index_banded(8, 12, 1) if name == "banded" else ops.index_from_mask(masks()[name])
    for kernel in KERNELS:
        calls = products(index, tokens, 8 * 32, 12 * 32, (32, 32), torch.float32)
        check(run_with, kernel, level, calls, name)


@needs_level
@pytest.mark.parametrize("block", [(1, 16), (16, 1), (1, 5), (5, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("tokens", [17, 150])
def test_thin_blocks_of_many_outputs(run_with, threads, block, tokens, level):
    """More outputs than a chunk of sums has, more terms than a chain, and parts of either."""
    features = (1300, 1100)
    grid = [-(-size // side) for size, side in zip(features, block, strict=True)]
    index = ops.index_random(*grid, grid[0] * grid[1] // 3, 0, False)
    calls = products(index, tokens, *features, block, torch.float32)
    for count in (1, 2, 3):
        threads(count)
        check(run_with, "cpu_simd", level, calls, f"{count} threads")


@needs_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_tokens_are_added_up_in_chunks(run_with, level, dtype):
    """More tokens than grad_weight takes at a time. Sums stay below what bfloat16 holds exactly."""
    index = ops.index_random(2, 3, 4, 0, False)
    dy = torch.zeros(2100, 64, dtype=dtype)
    dy[::50] = integers(42, 64, dtype=dtype).clamp(-1, 1)
    x = integers(2100, 96, dtype=dtype).clamp(-1, 1)
    call = {"grad_weight": lambda: ops.grad_weight(dy, x, index, 4, 32, 32)}
    check(run_with, "cpu_simd", level, call, "2100 tokens")


@needs_level
@pytest.mark.parametrize("tokens,nnz", [(300, 40), (130, 1024)])
def test_x_or_blocks_larger_than_a_cache(run_with, threads, level, tokens, nnz):
    """cpu_panel takes x in chunks, and fetches large blocks ahead."""
    index = ops.index_random(32, 32, nnz, 0, False)
    threads(2)
    calls = products(index, tokens, 1024, 1024, (32, 32), torch.float32)
    check(run_with, "cpu_panel", level, calls, f"{tokens} tokens, {nnz} blocks")


@needs_level
def test_output_for_which_large_pages_are_asked(run_with, level):
    """More than 32 MB, and no whole number of such pages."""
    index = ops.index_random(65, 1, 20, 0, False)
    calls = products(index, 4100, 2080, 32, (32, 32), torch.float32)
    check(run_with, "cpu_panel", level, {"forward": calls["forward with bias"]}, "34 MB")


@needs_level
@pytest.mark.parametrize("tokens", [4, 256])
@pytest.mark.parametrize("block", [(32, 32), (8, 8), (16, 1), (1, 16)], ids=str)
def test_long_sums_are_as_close_to_float64_as_torch(run_with, block, tokens, level):
    torch.manual_seed(0)
    for out, inputs in ((512, 4096), (4096, 512)):
        pattern = Pattern.random((out, inputs), 0.25, block)
        values = torch.randn(pattern.nnz, *block)
        weight = BlockSparseMatrix(values, pattern).to_dense()
        x = torch.randn(tokens, 4096)
        if inputs == 4096:
            exact, dense = x.double() @ weight.double().T, x @ weight.T
            run = partial(ops.forward, x, values, pattern.index, None, out)
        else:
            exact, dense = x.double() @ weight.double(), x @ weight
            run = partial(ops.grad_input, x, values, pattern.index, inputs)
        for kernel in KERNELS:
            y = run_with(kernel, level, run)
            if y is not None:
                assert_close_to_float64(y, exact, dense)


@needs_level
def test_what_lies_outside_the_matrix_is_never_read(run_with, level):
    index = ops.index_random(2, 2, 4, 0, False)
    for dtype in DTYPES:
        values = integers(4, 32, 32, dtype=dtype)
        outside = values.clone()
        outside[2:, 28:] = float("nan")
        outside[1::2, :, 27:] = float("nan")
        for tokens in (3, 40, 130):
            x, dy = integers(tokens, 59, dtype=dtype), integers(tokens, 60, dtype=dtype)
            for kernel in KERNELS:
                results = [
                    (
                        run_with(
                            kernel, level, lambda v=v, x=x: ops.forward(x, v, index, None, 60)
                        ),
                        run_with(
                            kernel, level, lambda v=v, dy=dy: ops.grad_input(dy, v, index, 59)
                        ),
                    )
                    for v in (values, outside)
                ]
                for clean, dirty in zip(*results, strict=True):
                    assert (clean is None) == (dirty is None)
                    assert clean is None or torch.equal(clean, dirty), (kernel, dtype, tokens)


@pytest.mark.parametrize("name", ["sse9", "AVX2"])
def test_unknown_level_is_an_error_that_lists_the_levels(monkeypatch, name):
    monkeypatch.setenv("BLOCK_SPARSE_ISA", name)
    index = ops.index_random(1, 1, 1, 0, False)
    with pytest.raises(ValueError, match=f"no level '{name}'.*baseline"):
        ops.forward(torch.zeros(16, 32), torch.zeros(1, 32, 32), index, None, 32)
