"""The ops under torch.compile and torch.export."""

import pytest
import torch

from op_helpers import SHAPE, Case, namespace
from pytorch_block_sparse import BlockSparseLinear
from zoo import normal, pattern_of


def _train(function, *operands):
    operands = [tensor.detach().clone().requires_grad_() for tensor in operands]
    y = function(*operands)
    y.pow(2).sum().backward()
    return [y.detach(), *(tensor.grad for tensor in operands)]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Frames:
    """A backend that counts what it is given to compile."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_is_one_frame_for_all_token_counts():
    case, frames = Case(dtype=torch.float32), Frames()
    compiled = torch.compile(case.linear, fullgraph=True, dynamic=True, backend=frames)
    for tokens in (5, 3, 7, 16, 64):  # not 2, the number of blocks: torch would tie the two
        x = normal(tokens, SHAPE[1], seed=tokens)
        ours = _train(compiled, x, case.values, case.bias)
        for got, wanted in zip(ours, _train(case.dense, x, case.values, case.bias), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert frames.count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_with_automatic_shapes_recompiles_once():
    case, frames = Case(dtype=torch.float32), Frames()
    compiled = torch.compile(case.linear, fullgraph=True, backend=frames)
    for tokens in (3, 7, 16, 64, 65):
        _train(compiled, normal(tokens, SHAPE[1]), case.values, case.bias)
    assert frames.count == 2  # the first size, then any


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_a_layer_by_inductor():
    layer = BlockSparseLinear(13, 11, density=0.5, block_shape=(4, 4))
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(5, 13)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.no_grad():
        layer.values.mul_(2)  # a step of an optimizer must be seen
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_under_autocast():
    case, frames = Case(dtype=torch.float32), Frames()
    compiled = torch.compile(case.linear, fullgraph=True, backend=frames)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(case.x, case.values, case.bias)
        eager = case.linear(case.x, case.values, case.bias)
    assert y.dtype == torch.bfloat16 and torch.equal(y, eager)
    y.sum().backward()
    assert case.values.grad.dtype == torch.float32


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_making_a_pattern():
    def nnz_and_index(mask):
        index = namespace.index_from_mask(mask)
        return index * 1

    mask = pattern_of("random", (96, 160), (16, 16)).mask()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(nnz_and_index, fullgraph=True, backend=Frames())
        assert torch.equal(compiled(mask), namespace.index_from_mask(mask))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    layer = BlockSparseLinear(13, 11, density=0.5, block_shape=(4, 4))
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(
        layer, (torch.randn(5, 13),), dynamic_shapes=({0: tokens},), strict=strict
    )
    targets = [node.target for node in program.graph.nodes]
    assert namespace.forward.default in targets
    for count in (2, 5, 33):
        x = torch.randn(count, 13)
        torch.testing.assert_close(program.module()(x), layer(x))
