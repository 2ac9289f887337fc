"""The ops on blocks of many tensors: against torch one by one, autograd's view, bad input."""

import pytest
import torch
from torch.library import opcheck

from pytorch_block_sparse import ops
from pytorch_block_sparse.optim import scores

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


# --- zero_blocks_ ---------------------------------------------------------------------------------


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
def test_opcheck_of_zero_blocks(device):
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


# --- block_dots and what uses it ------------------------------------------------------------------


def lists_of(counts, block, dtype, device, density=0.4):
    """Values, gradients, dead blocks and their weights: small integers, whose sums are exact."""

    def data(nnz):
        return torch.randint(-3, 4, (nnz, *block), device=device).to(dtype)

    dead = [blocks_of(nnz, density, device) for nnz in counts]
    aside = [data(len(positions)) for positions in dead]
    return [data(nnz) for nnz in counts], [data(nnz) for nnz in counts], dead, aside


def sums_of(values, gradients, dead, aside):
    """The definition, in float64."""
    sums = []
    for weight, gradient, positions, kept in zip(values, gradients, dead, aside, strict=True):
        whole = weight.double().index_copy(0, positions, kept.double())
        sums.append((whole * gradient.double()).sum((1, 2)))
    return torch.cat(sums)


@each_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(32, 32), (8, 8), (7, 5), (1, 1), (128, 64)])
def test_effects_of_many_layers(block, dtype, device):
    lists = lists_of([0, 1, 5, 300, *range(80)], block, dtype, device)
    result = scores.effects(*lists)
    assert result.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(result.double(), sums_of(*lists))


@each_device
def test_effects_of_layers_that_differ(device):
    one = lists_of([7], (4, 4), torch.float64, device)
    other = lists_of([9], (8, 2), torch.bfloat16, device)
    lists = [a + b for a, b in zip(one, other, strict=True)]
    assert torch.equal(scores.effects(*lists).double(), sums_of(*lists))
    strided = [tensor.mT.contiguous().mT for tensor in one[1]]
    assert torch.equal(scores.effects(one[0], strided, *one[2:]), sums_of(*one))


@pytest.mark.cuda
def test_block_dots_rounds_little_and_is_the_same_every_time():
    values, gradients = (torch.randn(50, 256, 256, device="cuda") for _ in range(2))
    none = [torch.zeros(0, dtype=torch.int64, device="cuda")], [values[:0]]
    result = ops.block_dots([values], [gradients], *none)
    products = values.double() * gradients.double()
    error = (result.double() - products.sum((1, 2))).abs() / products.abs().sum((1, 2))
    assert error.max() < 4 * torch.finfo(torch.float32).eps
    assert torch.equal(result, ops.block_dots([values], [gradients], *none))


@pytest.mark.cuda
def test_block_dots_of_tensors_that_are_not_aligned():
    whole = torch.randint(-3, 4, (8 * 256 + 3,), device="cuda").float()
    for offset in range(3):
        part = whole[offset : offset + 8 * 256].view(8, 16, 16)
        lists = [part], [part], [torch.tensor([0, 7], device="cuda")], [part[3:5]]
        assert torch.equal(ops.block_dots(*lists).double(), sums_of(*lists))


@pytest.mark.cuda
def test_opcheck_of_block_dots():
    opcheck(ops.block_dots, lists_of([3, 0, 5], (8, 8), torch.float32, "cuda"))


@pytest.mark.cuda
def test_block_dots_skips_entries_that_name_no_block():
    values = torch.ones(4, 16, 16, device="cuda")
    wrong = torch.tensor([-1, 4, 2, 2**62, -(2**63), 2**63 - 1, 2**31], device="cuda")
    instead = 2 * torch.ones(7, 16, 16, device="cuda")
    assert ops.block_dots([values], [values], [wrong], [instead]).tolist() == [256, 256, 512, 256]


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (0, lambda t: t[0], r"values: must be \[nnz"),
        (0, lambda t: t.mT, "values: must be contiguous"),
        (0, lambda t: t.int(), "values: dtype must be"),
        (0, lambda t: t.cpu(), "is on cpu, but|not on a GPU|is on cuda"),
        (1, lambda t: t[1:], "others: must be.*of the shape of the values"),
        (1, lambda t: t.double(), "others: must be.*of one dtype"),
        (1, lambda t: t.cpu(), "others: is on cpu"),
        (2, lambda t: t.int(), "blocks: must be contiguous int64"),
        (2, lambda t: t[1:], "instead: must be.*of the shape"),
        (2, lambda t: t.cpu(), "blocks: is on cpu"),
        (3, lambda t: t[:, :1], "instead: must be.*of the shape"),
    ],
)
def test_block_dots_refuses(position, change, message):
    lists = [*lists_of([4], (2, 3), torch.float32, "cuda", density=1.0)]
    lists[position] = [change(lists[position][0])]
    with pytest.raises(ValueError, match=message):
        ops.block_dots(*lists)
    with pytest.raises(ValueError, match="there must be equally many"):
        ops.block_dots(lists[0] * 2, *lists[1:])
