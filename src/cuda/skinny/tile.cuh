// How a unit, and the inputs that it meets, lie in shared memory: rows of 16-byte chunks, turned so
// that the reads of multiply.cuh do not collide in the banks.
#pragma once

#include "cuda/skinny/choice.h"

namespace block_sparse::cuda::skinny {

// `kRowBytes` is 16 to 128. Rows that are eights apart are turned alike, so 512 bytes further is what
// a warp copies next, and the same of other rows.
template <int kRowBytes>
struct Rows {
  static constexpr int kChunks = kRowBytes / 16;

  // The same chunk of eight rows is in all banks.
  __device__ static int offset(int row, int chunk) {
    if constexpr (kChunks == 2) chunk ^= row / 4 % 2;
    if constexpr (kChunks == 4) chunk ^= row / 2 % 4;
    return (row * kChunks + chunk) * 16;
  }
};

// A unit: rows are those of the stored block, outputs in forward, the depth in grad_input.
template <class C>
struct Tile : Rows<C::kUnitBytes / (C::kTransposed ? C::kDepth : C::kOutputs)> {
  static constexpr int kRowBytes = C::kUnitBytes / (C::kTransposed ? C::kDepth : C::kOutputs);
};

// Of x: rows are tokens, columns the depth of a unit. Rows past the last token hold anything, columns
// past the depth of the matrix zeros.
template <class C>
struct InputTile : Rows<C::kDepth * static_cast<int>(sizeof(typename C::T))> {
  static constexpr int kRowBytes = C::kDepth * static_cast<int>(sizeof(typename C::T));
  static constexpr int kRowsAtOnce = 512 / kRowBytes;
  static constexpr int kCopies = (C::kTokens + kRowsAtOnce - 1) / kRowsAtOnce;
};

}  // namespace block_sparse::cuda::skinny
