"""What is stored, and what a call allocates."""

import pytest
import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from pytorch_block_sparse import BlockSparseLinear, ops
from pytorch_block_sparse.testing import chosen_kernel, kernel_names
from zoo import normal, pattern_of


def stored_bytes(module):
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_a_75_percent_sparse_layer_takes_a_quarter():
    sparse = BlockSparseLinear(1024, 1024, density=0.25, block_shape=(32, 32))
    dense = nn.Linear(1024, 1024)
    assert {"values", "bias"} == {name for name, _ in sparse.named_parameters()}
    assert {"crow_indices", "col_indices", "_index"} == {name for name, _ in sparse.named_buffers()}
    assert stored_bytes(sparse) < 0.26 * stored_bytes(dense)


def allocations(function):
    """Bytes of each allocation of torch's while `function` runs, largest first."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    del result
    stack, sizes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag == _EventType.Allocation and event.extra_fields.alloc_size > 0:
            sizes.append(event.extra_fields.alloc_size)
    return sorted(sizes, reverse=True)


def test_allocations_are_counted():
    x = torch.ones(1000)
    assert allocations(lambda: x.neg().neg()) == [4000, 4000]


OUT, IN = 128, 192
TOKENS = [1, 8, 64, 512]
PRODUCTS = ["forward", "grad_input", "grad_weight"]


def explain(product, tokens):
    values = torch.empty(12, 32, 32)
    return torch.ops.block_sparse.explain(values, product, tokens, OUT, IN, True)


def accepted():
    """Every product and number of tokens that a kernel takes."""
    cases = [
        (kernel, product, tokens)
        for kernel in kernel_names()
        for product in PRODUCTS
        for tokens in TOKENS
        if f"{kernel}: refuses" not in explain(product, tokens)
    ]
    assert {case[0] for case in cases} == set(kernel_names())
    return cases


@pytest.mark.parametrize(("kernel", "product", "tokens"), accepted())
def test_a_product_allocates_its_output_and_the_workspace_that_explain_names(
    kernel, product, tokens, force_kernel
):
    force_kernel(kernel)
    pattern = pattern_of("random", (OUT, IN), (32, 32))
    values, bias = normal(pattern.nnz, 32, 32), normal(OUT)
    x, dy = normal(tokens, IN), normal(tokens, OUT)
    call = {
        "forward": lambda: ops.forward(x, values, pattern.index, bias, OUT),
        "grad_input": lambda: ops.grad_input(dy, values, pattern.index, IN),
        "grad_weight": lambda: ops.grad_weight(dy, x, pattern.index, pattern.nnz, 32, 32),
    }[product]
    explanation = torch.ops.block_sparse.explain(values, product, tokens, OUT, IN, True)
    used, workspace = chosen_kernel(explanation)
    assert used == kernel
    wanted = [call().numel() * 4] + ([workspace] if workspace else [])
    assert allocations(call) == sorted(wanted, reverse=True)


def test_a_layer_allocates_no_more_than_its_product():
    layer = BlockSparseLinear(192, 128, density=0.5)
    x = normal(64, 192)
    _, workspace = chosen_kernel(layer.explain(64))
    with torch.inference_mode():
        sizes = allocations(lambda: layer(x))
    assert sum(sizes) == 64 * 128 * 4 + workspace
