"""For tests on a GPU: what each kernel's tests ask alike. A `Problem` is that of test_cuda.py."""

import pytest
import torch

PRODUCTS = ("forward", "grad_input", "grad_weight")
OPERANDS = ("input", "grad_output", "values", "bias")

on_hopper = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",
    ),
]


def captured(call):
    """A graph of one `call`, and what that returned: each replay writes into it anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch asks for a warm-up beside the default stream
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def check_captured(first, second, product):
    """A graph of the one problem computes the other, once its operands are there."""
    expected = second.run(product)
    static = first.to("cuda")
    graph, result = captured(lambda: static.run(product))
    for name in OPERANDS:
        getattr(static, name).copy_(getattr(second, name))
    for _ in range(2):
        graph.replay()
        assert torch.equal(result.cpu(), expected)


def check_rows_apart(problem, before, after):
    """Rows with so many other elements before and after them."""
    expected = {product: problem.run(product) for product in PRODUCTS}
    on_gpu = problem.to("cuda")
    for name in ("input", "grad_output"):
        rows = getattr(on_gpu, name)
        wide = rows.new_full((len(rows), before + rows.shape[1] + after), float("nan"))
        wide[:, before:-after] = rows
        setattr(on_gpu, name, wide[:, before:-after])
    for product, result in expected.items():
        assert torch.equal(on_gpu.run(product).cpu(), result), product


def check_no_synchronisation(on_gpu):
    """None of the products waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        for product in PRODUCTS:
            on_gpu.run(product)
    finally:
        torch.cuda.set_sync_debug_mode("default")
