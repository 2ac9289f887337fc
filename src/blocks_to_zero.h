// Blocks to set to zero, of many tensors at once: what the op `zero_blocks_` tells its device.
#pragma once

#include <cstdint>

namespace block_sparse {

// In one tensor of values. Zero is all bits zero in every dtype, so only the bytes matter.
struct BlocksToZero {
  void* values;           // [nnz], each of block_bytes
  const int64_t* blocks;  // [count]: which of them
  int64_t nnz, block_bytes, count;
};

}  // namespace block_sparse
