// Sums of products of blocks, for many tensors with few launches.
#pragma once

#include <cstdint>
#include <span>

#include "block_sparse/dtype.h"

namespace block_sparse::cuda {

// sums[block] = sum of a[i] * b[block] over the elements of a block, where block = blocks[i].
struct BlockDots {
  const void* a;          // [count], blocks of so many elements
  const void* b;          // [nnz]
  const int64_t* blocks;  // [count], or null: block i is i
  void* sums;             // [nnz], in the type that the dtype is summed in
  int64_t count, nnz, elements;
};

// On the current device, the same bits in every run. Entries that name no block are skipped.
void block_dots(Dtype dtype, std::span<const BlockDots> tensors, void* stream);

}  // namespace block_sparse::cuda
