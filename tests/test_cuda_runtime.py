"""What only a GPU has: streams, graphs, devices; and that nothing waits for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cuda_helpers import captured
from pytorch_block_sparse import BlockSparseLinear
from pytorch_block_sparse.pattern import with_walks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

block_sparse = torch.ops.block_sparse


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_layer(dtype=torch.float32) -> BlockSparseLinear:
    layer = BlockSparseLinear(96, 70, density=0.4, block_shape=(32, 32), dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return layer


def step(layer, x: Tensor, grad_output: Tensor) -> list[Tensor]:
    """A forward and a backward: output, and the gradients of input, values and bias."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, (x, *layer.parameters()), grad_output)]


def integers(*shape, device="cpu") -> Tensor:
    return torch.randint(-2, 3, shape, device=device).float()


def assert_same(result: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_forward_and_backward_are_captured_by_a_cuda_graph():
    layer = make_layer()
    x, grad_output = integers(8, 96), integers(8, 70)
    expected = step(layer, x, grad_output)
    layer = layer.cuda()
    static_x = torch.zeros(8, 96, device="cuda")
    static_grad = torch.zeros(8, 70, device="cuda")
    graph, result = captured(lambda: step(layer, static_x, static_grad))
    static_x.copy_(x)
    static_grad.copy_(grad_output)
    graph.replay()
    assert_same(result, expected)


def test_nothing_synchronises():
    layer = make_layer()
    x, grad_output = integers(8, 96), integers(8, 70)
    expected = step(layer, x, grad_output)
    layer, x, grad_output = layer.cuda(), x.cuda(), grad_output.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(layer, x, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(result, expected)


def test_the_current_stream_is_used():
    layer = make_layer()
    right, grad_output = integers(8, 96), integers(8, 70)
    expected = step(layer, right, grad_output)
    layer, right, grad_output = layer.cuda(), right.cuda(), grad_output.cuda()
    x = torch.zeros_like(right)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # about 0.1 s: on another stream x would still be zero
        x.copy_(right)
        result = step(layer, x, grad_output)
        torch.cuda.current_stream().synchronize()
    assert_same(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    layer = make_layer()
    x, grad_output = integers(8, 96), integers(8, 70)
    expected = step(layer, x, grad_output)
    assert torch.cuda.current_device() == 0
    layer = layer.to("cuda:1")
    result = step(layer, x.to("cuda:1"), grad_output.to("cuda:1"))
    assert all(tensor.device == torch.device("cuda:1") for tensor in result)
    assert_same(result, expected)
    pattern = layer.pattern
    cols = pattern.grid[1]
    index = block_sparse.index_from_bsr(pattern.crow_indices, pattern.col_indices, cols)
    index = with_walks(index, pattern.grid, pattern.nnz, pattern.block_shape)
    assert torch.equal(index, pattern.index)
    assert torch.cuda.current_device() == 0
