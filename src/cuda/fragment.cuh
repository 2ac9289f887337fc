// Sums as the tensor cores leave them, on their way to memory: what Ampere's and Hopper's kernels
// share. A quad is four neighbouring lanes, which hold two neighbouring columns each of the same
// row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "block_sparse/dtype.h"

namespace block_sparse::cuda {

// Two sums as one word of 16-bit elements.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// A sum as it is stored.
template <class T>
__device__ __forceinline__ T round_to(float sum) {
  if constexpr (std::is_same_v<T, float>) {
    return sum;
  } else {
    return {static_cast<uint16_t>(pack<T>(sum, 0))};
  }
}

// Among the four lanes of a quad: lane q gets everybody's v[q].
__device__ __forceinline__ void transpose(uint32_t (&v)[4]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int d = 1; d <= 2; d *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & d) continue;
      const uint32_t other = __shfl_xor_sync(~0u, q & d ? v[i] : v[i | d], d);
      if (q & d) {
        v[i] = other;
      } else {
        v[i | d] = other;
      }
    }
  }
}

}  // namespace block_sparse::cuda
