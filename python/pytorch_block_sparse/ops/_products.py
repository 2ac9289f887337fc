"""The ops that the compiled library defines, as callables."""

import torch

forward = torch.ops.block_sparse.forward.default
grad_input = torch.ops.block_sparse.grad_input.default
grad_weight = torch.ops.block_sparse.grad_weight.default
