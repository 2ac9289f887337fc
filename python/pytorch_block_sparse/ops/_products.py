"""The ops that the compiled library defines, as callables."""

import torch

block_dots = torch.ops.block_sparse.block_dots.default
forward = torch.ops.block_sparse.forward.default
forward_int8 = torch.ops.block_sparse.forward_int8.default
forward_packed = torch.ops.block_sparse.forward_packed.default
grad_input = torch.ops.block_sparse.grad_input.default
grad_weight = torch.ops.block_sparse.grad_weight.default
pack = torch.ops.block_sparse.pack.default
unpack = torch.ops.block_sparse.unpack.default
zero_blocks_ = torch.ops.block_sparse.zero_blocks_.default
