// A unit in shared memory, and its way there: rows of 16-byte chunks, turned so that the reads of
// multiply.cuh do not collide in the banks. Rows are those of the stored block: outputs in forward,
// the depth in grad_input. It multiplies nothing.
#pragma once

#include "cuda/skinny/choice.h"
#include "cuda/skinny/ptx.cuh"

namespace block_sparse::cuda::skinny {

template <class C>
struct Tile {
  static constexpr int kRows = C::kTransposed ? C::kDepth : C::kOutputs;
  static constexpr int kRowBytes = C::kUnitBytes / kRows;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kChunkElements = 16 / static_cast<int>(sizeof(typename C::Value));

  alignas(128) unsigned char bytes[C::kUnitBytes];

  // Where a chunk lies. A group of eight lanes reads rows that are kDepth / 4 apart (two of each)
  // when transposed, two or eight neighbouring ones when not.
  __device__ static int offset(int row, int chunk) {
    if constexpr (C::kTransposed) {
      chunk ^= row / (C::kDepth / 4) % (kChunks < 4 ? kChunks : 4);
    } else if constexpr (kChunks == 4) {
      chunk ^= row / 2 % 4;
    }
    return row * kRowBytes + chunk * 16;
  }

  // The element of a block that the lane's first copy begins at, `pitch` elements between rows.
  __device__ static int first_element(int pitch, int lane) {
    return lane / kChunks * pitch + lane % kChunks * kChunkElements;
  }

  // The whole warp; `from`: the unit's first element, first_element further.
  __device__ void copy(const typename C::Value* from, int pitch, int lane) {
    constexpr int kRowsAtOnce = 32 / kChunks;
    const uint32_t to = ptx::address_of(bytes);
    if (kRows < kRowsAtOnce && lane / kChunks >= kRows) return;  // a unit of 16 x 16 int8
#pragma unroll
    for (int row = 0; row < kRows; row += kRowsAtOnce) {
      ptx::copy_16_bytes(to + offset(row + lane / kChunks, lane % kChunks),
                         from + static_cast<int64_t>(row) * pitch);
    }
  }
};

}  // namespace block_sparse::cuda::skinny
