"""Where balanced_cuts cuts, and what it refuses. Without processes."""

from itertools import pairwise

import pytest
import torch

from pytorch_block_sparse import BlockSparseLinear, Pattern
from pytorch_block_sparse.distributed import balanced_cuts


def layer_of(mask):
    pattern = Pattern.from_mask(mask, (8, 8))
    return BlockSparseLinear(*pattern.shape[::-1], pattern=pattern)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_no_other_cut_in_two_is_better(density):
    for seed in range(20):
        torch.manual_seed(seed)
        rows = torch.rand(9, 6) < density * torch.rand(9, 1) * 2
        layer = layer_of(rows)
        _, cut, end = balanced_cuts(2, colwise=[layer])
        assert end == 72 and cut % 8 == 0
        larger = [max(int(rows[:i].sum()), int(rows[i:].sum())) for i in range(1, 9)]
        assert larger[cut // 8 - 1] == min(larger)


@pytest.mark.parametrize("ranks", [1, 3, 4, 9])
def test_every_rank_has_a_block_row(ranks):
    rows = torch.zeros(9, 6, dtype=torch.bool)
    rows[4] = True  # all the work in one place
    cuts = balanced_cuts(ranks, colwise=[layer_of(rows)])
    assert len(cuts) == ranks + 1 and (cuts[0], cuts[-1]) == (0, 72)
    assert all(b - a >= 8 and a % 8 == 0 for a, b in pairwise(cuts))


def test_layers_that_share_features_are_balanced_together():
    first, second = torch.zeros(8, 2, dtype=torch.bool), torch.zeros(2, 8, dtype=torch.bool)
    first[0], second[:, 4:] = True, True  # 2 blocks in front, 8 behind
    up, down = layer_of(first), layer_of(second)
    assert balanced_cuts(2, colwise=[up]) == [0, 8, 64]
    assert balanced_cuts(2, colwise=[up], rowwise=[down]) == [0, 40, 64]
    assert balanced_cuts(2, colwise=[up], rowwise=[down], multiple_of=32) == [0, 32, 64]


def test_what_balanced_cuts_refuses():
    layer, other = layer_of(torch.ones(4, 2).bool()), layer_of(torch.ones(3, 2).bool())
    with pytest.raises(ValueError, match="ranks: 5 ranks cannot share 32 features"):
        balanced_cuts(5, colwise=[layer])
    with pytest.raises(ValueError, match="ranks: 2 ranks cannot share 32 features"):
        balanced_cuts(2, colwise=[layer], multiple_of=24 + 8)
    with pytest.raises(ValueError, match=r"same number of features, got \[24, 32\]"):
        balanced_cuts(2, colwise=[layer, other])
    with pytest.raises(ValueError, match="got none"):
        balanced_cuts(2)
    for bad in (0, True, 2.0):
        with pytest.raises(ValueError, match="ranks: must be an int"):
            balanced_cuts(bad, colwise=[layer])
