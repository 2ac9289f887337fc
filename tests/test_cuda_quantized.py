"""Int8 values on a GPU: exact with each kernel that takes them, as close as torch, and in a CUDA
graph."""

import copy

import pytest
import torch

from cuda_helpers import captured
from pytorch_block_sparse import BlockSparseMatrix
from pytorch_block_sparse.testing import assert_close_to_float64, chosen_kernel, kernel_names
from quantized_helpers import each_dtype, exact_layer, inputs, layer_of_normals, served_layer
from zoo import BLOCK_SHAPES, block_id, normal, pattern_of

pytestmark = pytest.mark.cuda

BLOCKS = [*BLOCK_SHAPES, (64, 64), (128, 64), (32, 16), (16, 32)]


@each_dtype
@pytest.mark.parametrize("block_shape", BLOCKS, ids=block_id)
def test_on_a_gpu_it_is_exact(block_shape, dtype):
    for kind in ("random", "empty_row", "skewed", "full", "one_block", "no_block"):
        pattern = pattern_of(kind, (328, 456), block_shape)
        layer = exact_layer(pattern, dtype=torch.float64)
        served = layer.quantize().to(dtype)
        on_gpu = copy.deepcopy(served).to("cuda")
        for tokens in (0, 1, 3, 8, 9, 16, 33, 64, 65, 200):
            x = inputs(layer, tokens, dtype=torch.float64)
            y = on_gpu(x.to("cuda", dtype))
            assert torch.equal(y.cpu(), layer(x).detach().to(dtype)), (kind, tokens)


@each_dtype
def test_on_a_gpu_each_kernel_that_takes_it(dtype, force_kernel):
    layer = exact_layer(pattern_of("random", (256, 320), (32, 32)), dtype=torch.float64)
    served = layer.quantize().to(dtype).to("cuda")
    taken = set()
    for kernel in kernel_names("cuda"):
        for tokens in (3, 40, 130):
            force_kernel(kernel)  # which need not be the fastest
            if f"{kernel}: refuses" in served.explain(tokens):
                continue
            x = inputs(layer, tokens, dtype=torch.float64)
            assert torch.equal(served(x.to("cuda", dtype)).cpu(), layer(x).detach().to(dtype))
            force_kernel("")
            taken.add(kernel)
    assert taken >= {"cuda_dense", "cuda_tiled", "cuda_reference"}
    assert ("cuda_skinny" in taken) == (dtype != torch.float64)


@each_dtype
@pytest.mark.parametrize("kernel", ["", "cuda_dense"])
def test_on_a_gpu_it_is_as_close_as_torch(kernel, dtype, force_kernel):
    force_kernel(kernel)
    for tokens in (1, 7, 33, 200):
        layer = layer_of_normals(pattern_of("random", (512, 768), (32, 32)), dtype)
        served = layer.quantize()
        x = normal(tokens, 768, dtype=dtype)
        # In float64 a weight is rounded when it is dequantized: here only sums are.
        whole = BlockSparseMatrix(served.values.double(), served.pattern).to_dense()
        with torch.inference_mode():
            exact = served.scales.double() * (x.double() @ whole.T) + served.bias.double()
            dense = served.dequantize(dtype).to_dense().to("cuda")
            y = copy.deepcopy(served).to("cuda")(x.to("cuda"))
            assert_close_to_float64(y.cpu(), exact, dense(x.to("cuda")).cpu())


def test_on_a_gpu_it_takes_a_kernel_with_tensor_cores():
    pattern = pattern_of("random", (2048, 2048), (32, 32))
    served = layer_of_normals(pattern, torch.bfloat16).quantize().to("cuda")
    for tokens, kernel in ((1, "cuda_skinny"), (64, "cuda_skinny"), (8192, "cuda_dense")):
        assert chosen_kernel(served.explain(tokens))[0] == kernel
    assert served.values.device.type == "cuda"


def test_in_a_cuda_graph():
    served = served_layer(dtype=torch.bfloat16).to("cuda")
    x = torch.randn(4, 160, device="cuda", dtype=torch.bfloat16)
    graph, y = captured(lambda: served(x))
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, served(x))
