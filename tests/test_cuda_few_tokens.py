"""Few tokens on a GPU, the kernel cuda_skinny: exact for every count of tokens, kind of pattern and
block shape; the same bits every time; in a CUDA graph; and what it refuses."""

from __future__ import annotations

import pytest
import torch

from cuda_helpers import captured, check_captured
from pytorch_block_sparse import Pattern
from test_cuda import Problem, make_problem

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

block_sparse = torch.ops.block_sparse
TOKENS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64]
BLOCKS = [
    (16, 16),
    (32, 32),
    (64, 64),
    (128, 128),
    (32, 16),
    (16, 32),
    (128, 16),
    (48, 80),
    (112, 64),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = (328, 456)  # (out, in): multiples of 8, and of none of the blocks
PRODUCTS = ["forward", "grad_input"]


def random(mask):
    mask = torch.rand(mask.shape) < 0.3
    mask[-1, -1] = True  # a pattern without blocks is another kernel's
    return mask


def empty_rows(mask):
    mask = random(mask)
    mask[::3] = False
    mask[1, 1] = True
    return mask


def empty_columns(mask):
    mask = random(mask)
    mask[:, ::2] = False
    mask[1, 1] = True
    return mask


def one_block(mask):
    mask[-1, mask.shape[1] // 2] = True
    return mask


def full(mask):
    return ~mask


def skewed(mask):
    mask[mask.shape[0] // 2] = True
    mask[:, 0] = True
    return mask


def banded(mask):
    rows, cols = (torch.arange(n) for n in mask.shape)
    return (cols * len(rows) - rows[:, None] * len(cols)).abs() <= 2 * len(rows)


KINDS = [random, empty_rows, empty_columns, one_block, full, skewed, banded]


@pytest.fixture(autouse=True)
def _few_tokens_kernel(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("BLOCK_SPARSE_KERNEL", "cuda_skinny")


def make_pattern(kind, sizes, block_shape) -> Pattern:
    grid = [-(-size // side) for size, side in zip(sizes, block_shape, strict=True)]
    mask = kind(torch.zeros(grid, dtype=torch.bool))
    return Pattern.from_mask(mask, shape=sizes, block_shape=block_shape)


def poison_outside(problem: Problem, pattern: Pattern) -> None:
    """NaN in all of the values that lie outside the matrix."""
    (out_features, in_features), (height, width) = pattern.shape, pattern.block_shape
    rows = pattern.row_indices.long()[:, None] * height + torch.arange(height)
    cols = pattern.col_indices.long()[:, None] * width + torch.arange(width)
    outside = (rows >= out_features)[:, :, None] | (cols >= in_features)[:, None, :]
    problem.values[outside.to(problem.values.device)] = float("nan")


def run_over_nan(problem: Problem, product: str) -> torch.Tensor:
    """Runs where memory that is allocated next holds NaN: what is not written shows."""
    for size in (problem.input.numel(), problem.grad_output.numel()):
        torch.full((size,), float("nan"), dtype=problem.values.dtype, device="cuda")
    return problem.run(product)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("block_shape", BLOCKS, ids=str)
def test_every_count_of_tokens_equals_the_cpu(block_shape, kind, dtype, product):
    pattern = make_pattern(kind, SIZES, block_shape)
    problem = make_problem((max(TOKENS), *SIZES), block_shape, dtype, pattern)
    expected = problem.run(product)
    on_gpu = problem.to("cuda")
    poison_outside(on_gpu, pattern)
    x, dy = on_gpu.input, on_gpu.grad_output
    for tokens in TOKENS:
        on_gpu.input, on_gpu.grad_output = x[:tokens], dy[:tokens]
        result = run_over_nan(on_gpu, product)
        assert torch.equal(result.cpu(), expected[:tokens]), tokens
        assert torch.equal(run_over_nan(on_gpu, product), result), "the same bits"


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("sizes", [(128, 2**16), (2**16, 128), (4096, 4096)], ids=str)
@pytest.mark.parametrize("block_shape", [(128, 128), (32, 32), (16, 16)], ids=str)
def test_rows_that_many_ctas_share(block_shape, sizes, tokens):
    pattern = make_pattern(random, sizes, block_shape)
    problem = make_problem((tokens, *sizes), block_shape, torch.bfloat16, pattern).to("cuda")
    weight = dense(problem.values.float(), pattern)
    expected = problem.input.float() @ weight.T + problem.bias.float()
    assert torch.equal(problem.run("forward"), expected.bfloat16())
    expected = problem.grad_output.float() @ weight
    assert torch.equal(problem.run("grad_input"), expected.bfloat16())


@pytest.mark.parametrize("tokens", [65, 128, 130])
@pytest.mark.parametrize("block_shape", [(128, 128), (32, 32), (16, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_tokens_in_several_passes(dtype, block_shape, tokens):
    for product, sizes in (("forward", (128, 2**15)), ("grad_input", (2**15, 128))):
        pattern = make_pattern(random, sizes, block_shape)
        problem = make_problem((tokens, *sizes), block_shape, dtype, pattern).to("cuda")
        # Three passes take longer than strips with split sums, which are of 16 bits.
        strips = tokens > 128 and dtype != torch.float32 and block_shape != (128, 128)
        assert ("cuda_skinny" in problem.kernels(product)) != strips
        if strips:
            continue
        wide = torch.randint(-2, 3, (tokens, 2**15 + 64), device="cuda").to(dtype)
        problem.input, problem.grad_output = (  # rows that lie apart: each pass has to find its own
            wide[:, : tensor.shape[1]] for tensor in (problem.input, problem.grad_output)
        )
        weight = dense(problem.values.float(), pattern)
        expected = problem.input.float() @ weight.T + problem.bias.float()
        if product == "grad_input":
            expected = problem.grad_output.float() @ weight
        assert torch.equal(run_over_nan(problem, product), expected.to(dtype))


def dense(values, pattern) -> torch.Tensor:
    blocks = torch.zeros(*pattern.grid, *pattern.block_shape, device=values.device)
    blocks[pattern.row_indices.long(), pattern.col_indices.long()] = values
    return blocks.transpose(1, 2).reshape(pattern.shape)


def test_the_same_bits_every_run():
    pattern = Pattern.random((4096, 4096), 0.25, (64, 64))
    values = torch.randn(pattern.nnz, 64, 64, device="cuda").bfloat16()
    index, x = pattern.index.cuda(), torch.randn(33, 4096, device="cuda").bfloat16()
    first = block_sparse.forward(x, values, index, None, 4096)
    for _ in range(20):
        assert torch.equal(block_sparse.forward(x, values, index, None, 4096), first)


@pytest.mark.parametrize("product", PRODUCTS)
def test_captured_by_a_cuda_graph(product):
    pattern = make_pattern(empty_rows, SIZES, (32, 32))
    first, second = (make_problem((7, *SIZES), (32, 32), torch.bfloat16, pattern) for _ in range(2))
    check_captured(first, second, product)


class Chain:
    """Calls each of which reads what the one before wrote; its values and its index were written
    just before, too."""

    def __init__(self, tokens, block_shape, seed):
        torch.manual_seed(seed)
        self.sizes = (1024, 2048)
        grid = [size // side for size, side in zip(self.sizes, block_shape, strict=True)]
        mask = skewed(torch.zeros(grid, dtype=torch.bool))
        patterns = [
            Pattern.from_mask(some, shape=self.sizes, block_shape=block_shape)
            for some in (mask, mask.roll((1, 1), (0, 1)), mask.flip(0))
        ]
        shape = (patterns[0].nnz, *block_shape)
        self.indices = [pattern.index.cuda() for pattern in patterns]
        self.weights = [torch.randn(shape, device="cuda").bfloat16() / 32 for _ in patterns]
        self.index, self.values = self.indices[0].clone(), self.weights[0].clone()
        self.x = torch.randn(tokens, self.sizes[1], device="cuda").bfloat16()

    def run(self, between=lambda: None):
        x, results = self.x, []
        for index, values in zip(self.indices, self.weights, strict=True):
            self.values.copy_(values)
            self.index.copy_(index)
            between()
            y = block_sparse.forward(x, self.values, self.index, None, self.sizes[0])
            between()
            x = block_sparse.grad_input(y, self.values, self.index, self.sizes[1])
            between()
            results += [y, x]
        return torch.cat(results, 1)


@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("block_shape", [(128, 128), (32, 32), (16, 16)], ids=str)
def test_calls_that_follow_each_other(block_shape, tokens):
    chain = Chain(tokens, block_shape, seed=0)
    expected = chain.run(between=torch.cuda.synchronize)
    assert expected.isfinite().all()
    for _ in range(20):
        assert torch.equal(chain.run(), expected)


@pytest.mark.parametrize("block_shape", [(128, 128), (32, 32)], ids=str)
def test_graphs_again_and_again_on_several_streams(block_shape):
    chains = [Chain(8, block_shape, seed) for seed in range(3)]
    expected = [chain.run(between=torch.cuda.synchronize) for chain in chains]
    graphs = [captured(chain.run) for chain in chains]
    streams = [torch.cuda.Stream() for _ in chains]
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, (graph, result) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                result.fill_(float("nan"))
                for _ in range(10):
                    graph.replay()
        torch.cuda.synchronize()
        for (_, result), right in zip(graphs, expected, strict=True):
            assert torch.equal(result, right)


@pytest.mark.parametrize(
    ("tokens", "block_shape", "dtype", "reason"),
    [
        (8192, (32, 32), torch.bfloat16, "once for every 64 of 8192 tokens"),
        (4, (32, 32), torch.float64, "dtype is f64"),
        (4, (8, 16), torch.bfloat16, "multiples of 16, not 8x16"),
    ],
)
def test_what_it_refuses(tokens, block_shape, dtype, reason):
    problem = make_problem((tokens, *SIZES), block_shape, dtype).to("cuda")
    with pytest.raises(ValueError, match=reason):
        problem.run("forward")


def test_a_pattern_without_blocks_is_refused():
    pattern = Pattern.from_mask(
        torch.zeros(11, 15, dtype=torch.bool), shape=SIZES, block_shape=(32, 32)
    )
    problem = make_problem((4, *SIZES), (32, 32), torch.bfloat16, pattern).to("cuda")
    with pytest.raises(ValueError, match="nothing to multiply"):
        problem.run("forward")


def test_rows_that_are_not_aligned_are_refused():
    problem = make_problem((4, 320, 452), (32, 32), torch.bfloat16).to("cuda")
    with pytest.raises(ValueError, match="need 16"):
        problem.run("forward")
