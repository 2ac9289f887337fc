"""A plain torch model, and its patching."""

import warnings

import torch
from torch import nn

from pytorch_block_sparse import BlockSparseLinear, BlockSparseModelPatcher


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Model(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(64, 50, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TOKENS = torch.arange(12).reshape(2, 6)
LINEAR = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "head"]


def patched(model, *rules):
    """Patches `model`, in which a warning is an error, and returns the report."""
    patcher = BlockSparseModelPatcher()
    for rule in rules:
        patcher.add_pattern(*rule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return patcher.patch_model(model)


def sparse_names(model):
    return [name for name, m in model.named_modules() if isinstance(m, BlockSparseLinear)]
