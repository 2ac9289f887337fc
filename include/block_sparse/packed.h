// Packed: the order of values that serving reads. It is made once and explicitly (`pack`), holds
// the same elements in the same number of bytes, and serves forward only. It depends on nothing but
// the dtype and the block: what was packed on one machine is read by every instruction set of
// another.
#pragma once

#include <cstdint>

#include "block_sparse/dtype.h"
#include "block_sparse/matrix.h"

namespace block_sparse {

// How the elements of a block lie. Blocks stay in BSR order.
struct PackedOrder {
  BlockShape block;
  // Outputs side by side: the lanes of the widest vectors that there are. Narrower ones take some
  // of a strip, so that they read it in order too. 0: canonical order, where strips do not fit.
  int64_t strip;
  int64_t pair;  // inputs side by side: two where an instruction multiplies pairs

  // Of output n and input k, from the beginning of the block: [out / strip][in /
  // pair][strip][pair].
  constexpr int64_t offset(int64_t n, int64_t k) const {
    if (strip == 0) return n * block.in + k;
    const int64_t step = n / strip * (block.in / pair) + k / pair;
    return (step * strip + n % strip) * pair + k % pair;
  }
};

constexpr PackedOrder packed_order(Dtype dtype, BlockShape block) {
  const int64_t lanes = dtype == Dtype::f64 ? 8 : 16;
  const int64_t pair = dtype == Dtype::bf16 && block.in % 2 == 0 ? 2 : 1;
  return {block, block.out % lanes == 0 ? lanes : 0, pair};
}

// [nnz, block.out, block.in] in canonical order to packed order, and back.
void pack(Dtype dtype, BlockShape block, int64_t nnz, const void* values, void* packed);
void unpack(Dtype dtype, BlockShape block, int64_t nnz, const void* packed, void* values);

}  // namespace block_sparse
