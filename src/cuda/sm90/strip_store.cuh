// From the sums of a strip kernel to the output: bias, rounding, and nothing that lies outside.
#pragma once

#include "cuda/fragment.cuh"
#include "cuda/sm90/strip_fragment.cuh"
#include "cuda/sm90/strip_params.cuh"

namespace block_sparse::cuda::sm90::strips {

template <Config kConfig>
using Element = std::conditional_t<kConfig.dtype == Dtype::bf16, BFloat16, Float16>;

// Of row 8 i + lane / 4 of the fragment of the strip that begins with output `first`.
template <Config kConfig>
__device__ inline float bias_of(const Params& params, int first, int i, int lane) {
  const int output = first + output_of_row<kConfig>(i, lane / 4);
  if (params.bias == nullptr || output >= params.outputs) return 0;
  const Element<kConfig> bias{__ldg(static_cast<const uint16_t*>(params.bias) + output)};
  return load<float>(bias);
}

// A strip's sums of half the tokens, from `token` on. 8 outputs x 8 tokens at a time are transposed
// within the warp; a thread then has four outputs of a token.
template <Config kConfig, int kHalf, int kSums>
__device__ __forceinline__ void store_strip(const float (&sums)[kSums], const Params& params,
                                            int first, int token, int lane) {
  constexpr bool kTransposed = kConfig.piece.transposed;
  constexpr int kEights = kConfig.tile.tokens / 8;
  token += lane / 4;
  const int quad = lane % 4;
  const bool odd = kTransposed ? lane & 1 : lane & 2;
  const int output = first + (kTransposed ? quad / 2 * 4 + (odd ? 8 : 0) : quad * 4);
  const int tokens = output < params.outputs ? params.tokens : 0;
  float bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) bias[i] = bias_of<kConfig>(params, first, i, lane);
  uint16_t* to = static_cast<uint16_t*>(params.output) + token * params.output_stride + output;
#pragma unroll
  for (int j = kHalf * kEights / 2; j < (kHalf + 1) * kEights / 2; ++j) {
    uint32_t pairs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* sum = &sums[j * 4 + i * 2];
      pairs[i] = ptx::transpose_matrix(pack<Element<kConfig>>(sum[0] + bias[i], sum[1] + bias[i]));
    }
    if constexpr (kTransposed) {
      const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? pairs[0] : pairs[1], 1);
      pairs[0] = odd ? got : pairs[0];
      pairs[1] = odd ? pairs[1] : got;
    }
    const uint2 four =
        !kTransposed && odd ? make_uint2(pairs[1], pairs[0]) : make_uint2(pairs[0], pairs[1]);
    if (token + j * 8 < tokens) {
      __stcs(reinterpret_cast<uint2*>(to + j * 8 * params.output_stride), four);
    }
  }
}

}  // namespace block_sparse::cuda::sm90::strips
