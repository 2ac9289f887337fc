// The fragments of W of a strip kernel: how they lie in shared memory, and wgmma with them. No
// waits and no order of work.
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // an N of 176
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <utility>

#include "cuda/sm90/strip_config.h"
#include "cuda/sm90/wgmma.cuh"

namespace block_sparse::cuda::sm90::strips {

using Fragment = uint32_t[4];

// wgmma with W in registers, by element type and tokens.
template <Dtype kDtype, int kTokens>
struct StripMma;
#define BLOCK_SPARSE_STRIP_MMA(n)                                                \
  template <>                                                                    \
  struct StripMma<Dtype::bf16, n>                                                \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32BF16BF16_RS<Major::K, Major::K> {}; \
  template <>                                                                    \
  struct StripMma<Dtype::f16, n>                                                 \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32F16F16_RS<Major::K, Major::K> {};
BLOCK_SPARSE_STRIP_MMA(128)
BLOCK_SPARSE_STRIP_MMA(176)
BLOCK_SPARSE_STRIP_MMA(192)
#undef BLOCK_SPARSE_STRIP_MMA

// sums[64, tokens] += W[64, 16] xt[16, tokens].
template <Dtype kDtype, int kSums>
__device__ __forceinline__ void multiply_strip(float (&sums)[kSums], const Fragment& w,
                                               uint64_t x) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    StripMma<kDtype, 2 * kSums>::fma(w[0], w[1], w[2], w[3], x, sums[I]..., ScaleOut::One);
  }(std::make_index_sequence<kSums>{});
}

// Where a lane's row of a fragment lies in a piece, in bytes: row `lane % 8` of the 8x8 matrix
// `lane / 8`. `first`: the strip's first output in the piece. In memory 16 bytes of a line are
// swapped within the swizzle.
template <Config kConfig>
__device__ __forceinline__ uint32_t fragment_offset(int first, int lane) {
  using Size = Sizes<kConfig>;
  const int g = lane % 8, i = lane / 8 % 2, half = lane / 16;
  int row = 0, chunk = 0;
  if constexpr (kConfig.piece.transposed) {
    row = half * 8 + g;
    chunk = first / 8 + i;
  } else {
    row = first + i * 8 + g;
    chunk = half;
  }
  const int line = row / Size::kLineRows;
  chunk += row % Size::kLineRows * (Size::kRowBytes / 16);
  const int swizzle = Size::kLineBytes == 128 ? line % 8 : line / 2 % 4;
  return line * Size::kLineBytes + ((chunk ^ swizzle) << 4);
}

// The same in another piece of the ring, so many bytes further. The swizzle repeats after 8 lines
// of 128 bytes; half as many make a piece of 512.
template <Config kConfig>
__device__ __forceinline__ uint32_t at_piece(uint32_t fragment, uint32_t bytes) {
  const uint32_t there = fragment + bytes;
  return Sizes<kConfig>::kPieceBytes == 512 ? there ^ (bytes & 512) >> 3 : there;
}

// The same, 16 of the depth further: transposed by rows, which may be half of what the swizzle
// repeats after.
template <Config kConfig>
__device__ __forceinline__ uint32_t at_step(uint32_t fragment, int step) {
  using Size = Sizes<kConfig>;
  if constexpr (kConfig.piece.transposed) {
    constexpr int kBytes = kStepDepth * Size::kRowBytes;
    const uint32_t further = fragment + step * kBytes;
    return kBytes == 512 && Size::kLineBytes == 128 ? further ^ step % 2 << 6 : further;
  } else {
    return fragment ^ step * (kStepDepth * 2);
  }
}

}  // namespace block_sparse::cuda::sm90::strips
