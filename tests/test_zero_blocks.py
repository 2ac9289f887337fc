"""The op zero_blocks_: the same as index_fill_ of each tensor, what autograd sees of it, bad input."""

import pytest
import torch
from torch.library import opcheck

from pytorch_block_sparse import ops

each_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
)


def blocks_of(nnz, density, device="cpu"):
    return (torch.rand(nnz) < density).nonzero().squeeze(1).to(device)


def assert_as_index_fill(values, blocks):
    wanted = [tensor.index_fill(0, which, 0) for tensor, which in zip(values, blocks, strict=True)]
    ops.zero_blocks_(values, blocks)
    for tensor, want in zip(values, wanted, strict=True):
        assert torch.equal(tensor.nan_to_num(7), want.nan_to_num(7))  # NaN stays where it was


@each_device
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(32, 32), (8, 8), (7, 5), (1, 1), (128, 64)])
def test_the_same_as_index_fill(block, dtype, density, device):
    counts = [0, 1, 5, 300]
    values = [torch.randn(nnz, *block, device=device).to(dtype) for nnz in counts]
    values[2][:2] = torch.nan
    assert_as_index_fill(values, [blocks_of(nnz, density, device) for nnz in counts])


@each_device
def test_tensors_of_several_kinds_and_more_of_them_than_a_launch_takes(device):
    kinds = [(torch.float32, (16, 16)), (torch.bfloat16, (3, 5)), (torch.int8, (32, 16))]
    values = [
        torch.randint(-9, 9, (nnz, *block), device=device).to(dtype)
        for nnz in range(50)
        for dtype, block in kinds
    ]
    assert_as_index_fill(values, [blocks_of(len(tensor), 0.5, device) for tensor in values])


@each_device
def test_parts_of_a_tensor_that_are_not_aligned(device):
    whole = torch.randn(8 * 256 + 3, device=device)
    for offset in range(3):
        before = whole.clone()
        part = whole[offset : offset + 8 * 256].view(8, 16, 16)
        assert_as_index_fill([part], [torch.tensor([0, 7], device=device)])
        assert torch.equal(whole[:offset], before[:offset])
        assert torch.equal(whole[offset + 8 * 256 :], before[offset + 8 * 256 :])


@each_device
def test_opcheck(device):
    values = [torch.randn(4, 2, 3, device=device), torch.randn(2, 8, 8, device=device)]
    blocks = [torch.tensor([1, 3], device=device), torch.tensor([], device=device).long()]
    opcheck(torch.ops.block_sparse.zero_blocks_.default, (values, blocks))


@each_device
def test_a_backward_that_saved_the_values_is_an_error(device):
    values = torch.randn(4, 2, 3, device=device, requires_grad=True)
    loss = values.square().sum()
    with torch.no_grad():
        ops.zero_blocks_([values], [torch.tensor([1], device=device)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_with_gradients_enabled_it_is_refused():
    values = torch.randn(4, 2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no gradients, but values require one"):
        ops.zero_blocks_([values], [torch.tensor([1])])
    assert values.all()


VALUES, BLOCKS = torch.ones(4, 2, 3), torch.tensor([1, 3])
CASES = {
    "none": ([], [], "there must be one of each|no tensor arguments|Could not run"),
    "number": ([VALUES], [BLOCKS, BLOCKS], "blocks: has 2 tensors, values has 1"),
    "values_2d": ([VALUES[0]], [BLOCKS], r"values: must be.*got Float \[2, 3\]"),
    "values_strided": ([VALUES.mT], [BLOCKS], r"values: must be contiguous.*strided"),
    "dtype": ([VALUES], [BLOCKS.int()], r"blocks: must be.*int64.*Int \[2\]"),
    "blocks_2d": ([VALUES], [BLOCKS[None]], r"blocks: must be.*Long \[1, 2\]"),
    "blocks_strided": ([VALUES], [BLOCKS.expand(2, 2)[:, 0]], "blocks: must be contiguous"),
    "negative": ([VALUES], [torch.tensor([0, -1])], "there is no block -1 in 4 of them"),
    "beyond": ([VALUES], [torch.tensor([0, 4])], "there is no block 4 in 4 of them"),
    "device": ([VALUES], [BLOCKS.to("meta")], "blocks: are on cpu and meta"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_changes_nothing(name):
    values, blocks, message = CASES[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.zero_blocks_(values, blocks)
    assert VALUES.all()


@pytest.mark.cuda
def test_on_a_gpu_entries_that_name_no_block_are_skipped():
    whole = torch.ones(3, 4, 16, 16, device="cuda")  # what lies around must not be written
    wrong = torch.tensor([-1, 4, 2, 2**62, -(2**63), 2**63 - 1, 2**31], device="cuda")
    ops.zero_blocks_([whole[1]], [wrong])
    assert not whole[1, 2].any()
    whole[1, 2] = 1
    assert whole.all()


@pytest.mark.cuda
def test_tensors_on_two_kinds_of_device_are_an_error():
    for values, blocks in (([VALUES.cuda()], [BLOCKS]), ([VALUES], [BLOCKS.cuda()])):
        with pytest.raises(ValueError, match=r"is on cpu, but|not on a GPU|is on cuda"):
            ops.zero_blocks_(values, blocks)
