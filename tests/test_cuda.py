"""The three products on a GPU: every kernel against the CPU, exactly.

Run under compute-sanitizer too, which is far too slow for the largest:
``compute-sanitizer python -m pytest -m cuda -k "not outputs"``. The index made on a GPU is in
test_cuda_index.py; streams, graphs and devices are in test_cuda_runtime.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pytorch_block_sparse import Pattern
from pytorch_block_sparse.pattern import grid_shape, with_walks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

block_sparse = torch.ops.block_sparse
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PRODUCTS = {  # and the operands that each reads
    "forward": ("input", "values", "index", "bias"),
    "grad_input": ("grad_output", "values", "index"),
    "grad_weight": ("grad_output", "input", "index"),
}
# (tokens, out, in), block shape: ragged, not square, larger than the matrix, none at all.
SHAPES = [
    ((1, 1, 1), (1, 1)),
    ((5, 70, 90), (32, 32)),
    ((33, 96, 64), (32, 32)),
    ((17, 100, 40), (16, 8)),
    ((2, 130, 60), (1, 64)),
    ((3, 3, 3), (64, 64)),
    ((64, 256, 384), (128, 128)),
    ((9, 200, 328), (64, 64)),
    ((17, 264, 520), (48, 32)),
    ((257, 200, 328), (64, 64)),
    ((65, 264, 520), (32, 64)),
    ((193, 264, 520), (64, 32)),
    ((1000, 512, 768), (16, 16)),
    ((300, 520, 904), (32, 32)),
    ((130, 384, 256), (128, 16)),
    ((255, 240, 400), (48, 80)),
    ((257, 520, 264), (96, 32)),
    ((63, 130, 60), (4, 4)),
    ((7, 33, 47), (3, 5)),
    ((300, 72, 136), (8, 8)),
    ((0, 32, 32), (16, 16)),
    ((4, 0, 32), (16, 16)),
    ((4, 32, 0), (16, 16)),
]


@dataclass
class Problem:
    """The operands of the three products. Small integers: sums are exact in every dtype."""

    input: Tensor
    grad_output: Tensor
    values: Tensor
    bias: Tensor
    index: Tensor

    def to(self, device: str) -> Problem:
        """A copy there, its index with what the kernels of the device plan."""
        moved = Problem(**{name: tensor.to(device) for name, tensor in vars(self).items()})
        sizes = (self.bias.numel(), self.input.shape[1])
        grid = grid_shape(sizes, self.values.shape[1:])
        moved.index = with_walks(moved.index, grid, len(self.values), self.values.shape[1:])
        return moved

    def run(self, product: str) -> Tensor:
        if product == "forward":
            return block_sparse.forward(
                self.input, self.values, self.index, self.bias, self.bias.numel()
            )
        if product == "grad_input":
            return block_sparse.grad_input(
                self.grad_output, self.values, self.index, self.input.shape[1]
            )
        return block_sparse.grad_weight(
            self.grad_output, self.input, self.index, *self.values.shape
        )

    def kernels(self, product: str) -> list[str]:
        """Those of this device's list that accept the product."""
        text = block_sparse.explain(
            self.values, product, len(self.input), len(self.bias), self.input.shape[1], True
        )
        return re.findall(r"^  (\w+): (?:chosen|would accept)", text, re.MULTILINE)


def make_pattern(shape, block_shape, density=0.3) -> Pattern:
    """Random, with the first block row and the last block column empty."""
    rows, cols = -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])
    mask = torch.rand(rows, cols) < density
    mask[:1] = False
    mask[:, -1:] = False
    return Pattern.from_mask(mask, shape=shape, block_shape=block_shape)


def make_problem(sizes, block_shape, dtype, pattern=None) -> Problem:
    tokens, out_features, in_features = sizes
    if pattern is None:
        pattern = make_pattern((out_features, in_features), block_shape)

    def integers(*shape):
        return torch.randint(-2, 3, shape).to(dtype)

    return Problem(
        input=integers(tokens, in_features),
        grad_output=integers(tokens, out_features),
        values=integers(pattern.nnz, *block_shape),
        bias=integers(out_features),
        index=pattern.index,
    )


def corrupted(index: Tensor) -> list[Tensor]:
    """Some entries far out of range; some wrong by little; all of them noise."""
    noise = torch.randint_like(index, -(2**31), 2**31 - 1)
    near = torch.randint_like(index, -2, 40)
    some = torch.rand(index.shape, device=index.device) < 0.1
    return [torch.where(some, noise, index), torch.where(some, near, index), noise]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("sizes", "block_shape"), SHAPES, ids=str)
def test_every_kernel_equals_the_cpu(sizes, block_shape, dtype, product, monkeypatch):
    out_in = sizes[1:]
    for pattern in (make_pattern(out_in, block_shape), Pattern.full(out_in, block_shape)):
        problem = make_problem(sizes, block_shape, dtype, pattern)
        expected = problem.run(product)
        on_gpu = problem.to("cuda")
        names = on_gpu.kernels(product)
        assert names[-1] == "cuda_reference"
        for name in names:
            monkeypatch.setenv("BLOCK_SPARSE_KERNEL", name)
            result = on_gpu.run(product)
            monkeypatch.delenv("BLOCK_SPARSE_KERNEL")
            assert result.device.type == "cuda"
            assert torch.equal(result.cpu(), expected), name


def patterns_of_every_kind(shape, block_shape):
    rows, cols = -(-shape[0] // block_shape[0]), -(-shape[1] // block_shape[1])
    one = torch.zeros(rows, cols, dtype=torch.bool)
    one[-1, cols // 2] = True
    skewed = torch.rand(rows, cols) < 0.05
    skewed[rows // 2] = True
    skewed[:, 0] = True
    for mask in (torch.zeros_like(one), one, skewed):
        yield Pattern.from_mask(mask, shape=shape, block_shape=block_shape)
    yield Pattern.banded(shape, 1, block_shape)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", [(8, 8), (16, 16), (32, 32), (48, 80), (64, 64)], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 129])
def test_patterns_of_every_kind(tokens, block_shape, product, monkeypatch):
    shape = (648, 520)
    for pattern in patterns_of_every_kind(shape, block_shape):
        problem = make_problem((tokens, *shape), block_shape, torch.bfloat16, pattern)
        expected = problem.run(product)
        on_gpu = problem.to("cuda")
        for name in on_gpu.kernels(product):
            monkeypatch.setenv("BLOCK_SPARSE_KERNEL", name)
            assert torch.equal(on_gpu.run(product).cpu(), expected), name
            monkeypatch.delenv("BLOCK_SPARSE_KERNEL")


@pytest.mark.parametrize("product", ["forward", "grad_input"])
@pytest.mark.parametrize("block_shape", [(64, 64), (128, 128), (64, 32), (32, 64)], ids=str)
def test_tokens_that_do_not_fill_a_tile(block_shape, product, monkeypatch):
    shape = (392, 456)
    problem = make_problem((1100, *shape), block_shape, torch.bfloat16)
    expected, on_gpu = problem.run(product), problem.to("cuda")
    x, dy = on_gpu.input, on_gpu.grad_output
    for tokens in (8, 65, 128, 129, 250, 256, 257, 300, 384, 512, 513, 641, 768, 1000, 1100):
        on_gpu.input, on_gpu.grad_output = x[:tokens], dy[:tokens]
        for kernel in on_gpu.kernels(product):
            monkeypatch.setenv("BLOCK_SPARSE_KERNEL", kernel)
            assert torch.equal(on_gpu.run(product).cpu(), expected[:tokens]), (kernel, tokens)
        monkeypatch.delenv("BLOCK_SPARSE_KERNEL")


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block_shape", [(8, 8), (16, 16), (32, 32), (128, 128)], ids=str)
def test_every_element_is_written_and_the_same_twice(block_shape, product, monkeypatch):
    sizes = (257, 520, 392)
    problem = make_problem(sizes, block_shape, torch.float16)
    for name in ("input", "grad_output", "values", "bias"):
        setattr(problem, name, torch.randn_like(getattr(problem, name)))
    on_gpu = problem.to("cuda")
    for name in on_gpu.kernels(product):
        monkeypatch.setenv("BLOCK_SPARSE_KERNEL", name)
        first = on_gpu.run(product)
        assert first.isfinite().all(), name
        for _ in range(3):
            torch.full_like(first, float("nan"))  # the next result gets its memory
            assert torch.equal(on_gpu.run(product), first), name
        monkeypatch.delenv("BLOCK_SPARSE_KERNEL")


def test_a_wrong_element_shows():
    problem = make_problem((33, 96, 64), (32, 32), torch.bfloat16, Pattern.full((96, 64)))
    on_gpu = problem.to("cuda")
    on_gpu.values[0, 2, 3] += 1
    assert not torch.equal(on_gpu.run("forward").cpu(), problem.run("forward"))
    assert not torch.equal(on_gpu.run("grad_input").cpu(), problem.run("grad_input"))
    on_gpu.input[4, 5] += 1
    assert not torch.equal(on_gpu.run("grad_weight").cpu(), problem.run("grad_weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(dtype):
    problem = make_problem((12, 70, 90), (32, 32), dtype)
    expected = {product: problem.run(product) for product in PRODUCTS}
    on_gpu = problem.to("cuda")
    on_gpu.input = on_gpu.input.t().contiguous().t()
    on_gpu.values = on_gpu.values.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((12, 100), float("nan"), dtype=dtype, device="cuda")
    wide[:, :70] = on_gpu.grad_output
    on_gpu.grad_output = wide[:, :70]
    for product in PRODUCTS:
        assert torch.equal(on_gpu.run(product).cpu(), expected[product]), product


@pytest.mark.parametrize("kernel", ["cuda_dense", "cuda_tiled"])
def test_more_than_2_to_the_31_outputs(kernel, monkeypatch):
    monkeypatch.setenv("BLOCK_SPARSE_KERNEL", kernel)
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    tokens, out_features = 2**16 + 3, 2**15 + 1
    pattern = Pattern.full((out_features, 16), (64, 16))
    values = torch.randint(-2, 3, (pattern.nnz, 64, 16), device="cuda").bfloat16()
    x = torch.randint(-2, 3, (tokens, 16), device="cuda").bfloat16()
    y = block_sparse.forward(x, values, pattern.index.cuda(), None, out_features)
    weight = values.reshape(-1, 16)[:out_features]
    for rows in (slice(0, 5), slice(tokens - 5, tokens)):
        assert torch.equal(y[rows].float(), x[rows].float() @ weight.float().t())


def test_gradients_in_float64():
    pattern = Pattern.random((20, 30), 0.5, (8, 16), device="cuda")
    x, values, bias = (
        torch.randn(*shape, dtype=torch.float64, device="cuda", requires_grad=True)
        for shape in ((3, 30), (pattern.nnz, 8, 16), (20,))
    )

    def product(x, values, bias):
        return block_sparse.forward(x, values, pattern.index, bias, 20)

    assert torch.autograd.gradcheck(product, (x, values, bias))
    assert torch.autograd.gradgradcheck(product, (x, values, bias))


@pytest.mark.parametrize("product", PRODUCTS)
def test_operands_on_two_kinds_of_device_are_an_error(product):
    problem = make_problem((5, 70, 90), (32, 32), torch.float32)
    for name in PRODUCTS[product]:
        mixed = problem.to("cuda")
        setattr(mixed, name, getattr(problem, name))
        with pytest.raises(ValueError, match=r"is on cpu, but|not on a GPU"):
            mixed.run(product)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("sizes", "block_shape", "dtype"),
    [
        ((5, 70, 90), (16, 8), torch.float32),
        ((5, 320, 448), (16, 32), torch.float32),
        ((9, 320, 448), (32, 32), torch.bfloat16),
        ((64, 320, 448), (16, 16), torch.float16),
        ((300, 320, 448), (16, 16), torch.bfloat16),
        ((300, 320, 448), (32, 32), torch.bfloat16),
        ((300, 320, 448), (64, 64), torch.float16),
        ((300, 320, 448), (48, 80), torch.bfloat16),
    ],
    ids=str,
)
def test_a_corrupt_index_gives_numbers_and_no_invalid_access(
    product, sizes, block_shape, dtype, monkeypatch
):
    problem = make_problem(sizes, block_shape, dtype)
    for name in problem.to("cuda").kernels(product):
        monkeypatch.setenv("BLOCK_SPARSE_KERNEL", name)
        check_corrupt_indices(problem, product)


def check_corrupt_indices(problem, product):
    """Runs products with a corrupt index, and a good one before and after."""
    good = problem.to("cuda")
    expected = good.run(product)
    for _ in range(20):
        for index in corrupted(good.index):
            bad = problem.to("cuda")
            bad.index = index
            bad.run(product)
    torch.cuda.synchronize()
    assert torch.equal(good.run(product), expected), "the device still works"
