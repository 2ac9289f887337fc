// From the sums of a warpgroup to y, a line at a time: tokens by some outputs, held as wgmma leaves
// them (tokens down), go straight to memory.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>

#include "cuda/fragment.cuh"
#include "cuda/sm90/resident_params.cuh"

namespace block_sparse::cuda::sm90::resident_product {

// T: of y. kOrdered: the outputs are in the order of Order.
template <class T, int kWidth, int kHalves, bool kOrdered>
class LineStore {
 public:
  __device__ LineStore(const Params& params, int token)
      : token_(token + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4),
        output_(static_cast<T*>(params.output) + token_ * params.output_stride),
        eight_(8 * params.output_stride),
        end_(min(params.tokens, token + params.tile_tokens)),
        features_(params.features_m),
        bias_(static_cast<const T*>(params.bias)) {}

  // Sum (j * 2 + i) * 2 + t of a half is of token half * 64 + 8 * i, and of output number j * 8 +
  // lane % 4 * 2 + t.
  __device__ __forceinline__ void line(float (&sums)[kHalves][kWidth / 2], int output) const {
#pragma unroll
    for (auto& half : sums) {
#pragma unroll
      for (float& sum : half) cute::warpgroup_fence_operand(sum);
    }
    if (bias_ != nullptr) {
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const int at = output + place(j) + t;
          const float add = at < features_ ? load<float>(bias_[at]) : 0;
#pragma unroll
          for (auto& half : sums) {
            half[j * 4 + t] += add;
            half[j * 4 + 2 + t] += add;
          }
        }
      }
    }
    T* row = output_ + output;
    int token = token_;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        put(row, sums[half], i, token < end_ ? features_ - output : 0);
        row += i == 0 ? eight_ : 7 * eight_;
        token += i == 0 ? 8 : 56;
      }
    }
  }

 private:
  static constexpr int kGroup = Order<kWidth>::kOutputs;
  static constexpr int kTiles = kGroup / 8;

  // Which output of a line sum j * 4 is.
  __device__ static int place(int j) {
    const int quad = threadIdx.x % 4;
    if constexpr (!kOrdered) return j * 8 + quad * 2;
    return j / kTiles * kGroup + quad * Order<kWidth>::kNeighbours + j % kTiles * 2;
  }

  // Sums i of all outputs; those from `end` on are dropped.
  __device__ __forceinline__ static void put(T* row, const float (&sums)[kWidth / 2], int i,
                                             int end) {
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int first = 0; first < kWidth / 8; first += kTiles) {
      uint32_t words[kTiles];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const int at = ((first + m) * 2 + i) * 2;
        words[m] = pack<T>(sums[at], sums[at + 1]);
      }
      if constexpr (!kOrdered) gather(words);
      const int to = first * 8 + quad * (kGroup / 4);
      if (to >= end) continue;
      if constexpr (kTiles == 4) {
        __stcs(reinterpret_cast<uint4*>(row + to),
               make_uint4(words[0], words[1], words[2], words[3]));
      } else {
        __stcs(reinterpret_cast<uint2*>(row + to), make_uint2(words[0], words[1]));
      }
    }
  }

  // Among the lanes of a quad: each gets neighbouring outputs.
  __device__ __forceinline__ static void gather(uint32_t (&words)[4]) { transpose(words); }
  // Of two tiles: lane 0 gets the first half of the first, lane 1 its second half.
  __device__ __forceinline__ static void gather(uint32_t (&words)[2]) {
    const int quad = threadIdx.x % 4, from = quad % 2 * 2;
    const uint32_t a = __shfl_sync(~0u, words[0], from, 4), b = __shfl_sync(~0u, words[1], from, 4);
    const uint32_t c = __shfl_sync(~0u, words[0], from + 1, 4);
    const uint32_t d = __shfl_sync(~0u, words[1], from + 1, 4);
    words[0] = quad < 2 ? a : b;
    words[1] = quad < 2 ? c : d;
  }

  const int64_t token_;
  T* const output_;
  const int64_t eight_;
  const int end_, features_;
  const T* const bias_;
};

}  // namespace block_sparse::cuda::sm90::resident_product
