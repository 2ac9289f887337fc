// x in the order in which the sampled product reads it for blocks 16 inputs wide: rows of 32 bytes
// are too short for the copy engine, so 64 tokens of a feature are put side by side, and 16
// features are then one piece of memory. A pass of its own, device code.
#pragma once

#include <cstdint>

#include "cuda/sm90/schedule.h"

namespace block_sparse::cuda::sm90::sampled_product {

constexpr int kRetileCols = 64;  // features of a CTA
constexpr int kRetileThreads = 256;

// x [tokens, cols] -> retiled [tokens / 64][features, a multiple of 64][64 tokens], zeros outside.
// The 16-byte pieces of a feature are in the order of a 128-byte swizzle. Within 16 features,
// feature q * 4 + j * 2 + b goes to row j * 8 + q * 2 + b: a lane of wgmma's result then has
// neighbours.
// One CTA for each 64 features of each 64 tokens.
static __global__ void __launch_bounds__(kRetileThreads)
    retile(const uint16_t* x, int64_t row_stride, int64_t tokens, int64_t cols,
           int64_t retiled_cols, uint16_t* retiled) {
  __shared__ uint32_t pairs[kStepTokens][kRetileCols / 2 + 1];
  const int64_t index = int64_t{blockIdx.x} * kRetileCols;
  const int64_t first_col = index % retiled_cols, step = index / retiled_cols;
  const int64_t first_token = step * kStepTokens;
  const int piece = threadIdx.x % 8;
  for (int r = threadIdx.x / 8; r < kStepTokens; r += kRetileThreads / 8) {
    const int64_t token = first_token + r, col = first_col + piece * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (token < tokens && col < cols) {
      v = *reinterpret_cast<const uint4*>(x + token * row_stride + col);
    }
    uint32_t* to = &pairs[r][piece * 4];
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
  }
  __syncthreads();

  const int pair = threadIdx.x / 8;  // of features
  uint32_t low[4], high[4];
  for (int i = 0; i < 4; ++i) {
    const uint32_t a = pairs[piece * 8 + 2 * i][pair], b = pairs[piece * 8 + 2 * i + 1][pair];
    low[i] = __byte_perm(a, b, 0x5410);
    high[i] = __byte_perm(a, b, 0x7632);
  }
  const int within = pair * 2 % 16;
  const int row = pair * 2 / 16 * 16 + within % 4 / 2 * 8 + within / 4 * 2;
  uint4* to =
      reinterpret_cast<uint4*>(retiled + (step * retiled_cols + first_col + row) * kStepTokens);
  to[piece ^ row % 8] = make_uint4(low[0], low[1], low[2], low[3]);
  to[8 + (piece ^ (row + 1) % 8)] = make_uint4(high[0], high[1], high[2], high[3]);
}

}  // namespace block_sparse::cuda::sm90::sampled_product
