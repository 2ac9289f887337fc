"""Small models and oracles for the tests of pytorch_block_sparse.optim."""

import torch
from torch import Tensor, nn

from pytorch_block_sparse import BlockSparseLinear, BlockSparseMatrix, Pattern

ADAPTIVE = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, foreach=False),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
}


def mlp(density: float = 0.25, seed: int = 0, width: int = 64, block: int = 8) -> nn.Sequential:
    torch.manual_seed(seed)
    shape = (block, block)
    return nn.Sequential(
        BlockSparseLinear(width, 2 * width, density=density, block_shape=shape),
        nn.ReLU(),
        BlockSparseLinear(2 * width, width, density=density, block_shape=shape),
    )


def train_step(model, optimizer, sparsifier=None, seed: int = 0, tokens: int = 16):
    """One step on random data; returns what sparsifier.step() returned."""
    generator = torch.Generator().manual_seed(seed)
    layer = next(m for m in model.modules() if isinstance(m, BlockSparseLinear))
    x = torch.randn(tokens, layer.in_features, generator=generator)
    (model(x) - x.roll(1, 1)).square().mean().backward()
    optimizer.step()
    entry = None if sparsifier is None else sparsifier.step()
    optimizer.zero_grad()
    return entry


def dense_of(tensor: Tensor, pattern: Pattern) -> Tensor:
    """A tensor per block, laid out densely: comparisons need not know the order of the blocks."""
    return BlockSparseMatrix(tensor.detach().clone(), pattern).to_dense()


def layers_of(model: nn.Module) -> list[BlockSparseLinear]:
    return [m for m in model.modules() if isinstance(m, BlockSparseLinear)]


def grid_of(mask: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """A mask of blocks as a mask of elements."""
    rows = mask.repeat_interleave(block_shape[0], 0)
    return rows.repeat_interleave(block_shape[1], 1)
