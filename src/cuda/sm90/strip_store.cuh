// From the sums of a strip kernel to the output: bias, rounding, and nothing that lies outside.
#pragma once

#include "cuda/fragment.cuh"
#include "cuda/sm90/strip_fragment.cuh"
#include "cuda/sm90/strip_params.cuh"

namespace block_sparse::cuda::sm90::strips {

// Where a lane stores what it has of a strip, from `token` on. `T`: the output's elements.
template <class T, bool kTransposed>
class StripStore {
 public:
  // The strip begins with output `first`, which may lie outside. `end`: of the tokens.
  __device__ __forceinline__ StripStore(const Params& params, int first, int token, int end,
                                        int lane)
      : odd_(kTransposed ? lane & 1 : lane & 2), step_(params.output_stride * 8) {
    const int quad = lane % 4;
    const int output = first + (kTransposed ? quad / 2 * 4 + (odd_ ? 8 : 0) : quad * 4);
    left_ = output < params.outputs ? end - token - lane / 4 : 0;
    if (params.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first + output_of_row<kTransposed>(i, lane / 4);
        if (row >= params.outputs) continue;
        bias_[i] = load<float>(T{__ldg(static_cast<const uint16_t*>(params.bias) + row)});
      }
    }
    has_bias_ = params.bias != nullptr;
    to_ = static_cast<uint16_t*>(params.output) + (token + lane / 4) * params.output_stride + output;
  }

  // To the sums of kEights times eight tokens. Before they are stored, since most have none.
  template <int kEights>
  __device__ __forceinline__ void add_bias(float* sums) const {
    if (!has_bias_) return;
#pragma unroll
    for (int i = 0; i < kEights * 4; ++i) sums[i] += bias_[i / 2 % 2];
  }

  // The next eight tokens, the j-th. 8 outputs x 8 tokens at a time are transposed within the warp; a thread
  // then has four outputs of a token.
  __device__ __forceinline__ void eight(const float* sums, int j) {
    uint32_t pairs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* sum = sums + i * 2;
      pairs[i] = ptx::transpose_matrix(pack<T>(sum[0], sum[1]));
    }
    if constexpr (kTransposed) {
      const uint32_t got = __shfl_xor_sync(kAllLanes, odd_ ? pairs[0] : pairs[1], 1);
      pairs[0] = odd_ ? got : pairs[0];
      pairs[1] = odd_ ? pairs[1] : got;
    }
    const uint2 four =
        !kTransposed && odd_ ? make_uint2(pairs[1], pairs[0]) : make_uint2(pairs[0], pairs[1]);
    if (j * 8 < left_) __stcs(reinterpret_cast<uint2*>(to_), four);
    to_ += step_;
  }

 private:
  bool odd_;
  int left_;  // tokens, from this lane's first one on
  float bias_[2] = {};
  bool has_bias_;
  int64_t step_;
  uint16_t* to_;
};

}  // namespace block_sparse::cuda::sm90::strips
