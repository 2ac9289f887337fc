// int8 values on their way to the multiplication: four at a time become floats, or pairs of sixteen
// bits, in registers. All of them are exact in every type here.
#pragma once

#include <cuda_fp16.h>

#include "block_sparse/dtype.h"

namespace block_sparse::cuda::skinny {

// As 2^23 + 128 + value in float, the last byte of which is the value, its sign bit turned.
__device__ __forceinline__ float4 widen_to_floats(uint32_t values) {
  const uint32_t bytes = values ^ 0x80808080u;
  const auto one = [&](uint32_t byte) {
    return __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7650u + byte)) - 8388736.0f;
  };
  return {one(0), one(1), one(2), one(3)};
}

// The first two and the second two, as mma takes them.
template <class T>
__device__ __forceinline__ uint2 widen_to_pairs(uint32_t values) {
  if constexpr (Traits<T>::dtype == Dtype::bf16) {
    // The lower half of each float is zero.
    const float4 floats = widen_to_floats(values);
    const auto pair = [](float first, float second) {
      return __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632u);
    };
    return {pair(floats.x, floats.y), pair(floats.z, floats.w)};
  } else {
    // As 1024 + 128 + value.
    const uint32_t bytes = values ^ 0x80808080u;
    const auto pair = [&](uint32_t selector) {
      const uint32_t biased = __byte_perm(bytes, 0x64646464u, selector);
      const __half2 exact = __hsub2(reinterpret_cast<const __half2&>(biased),
                                    __half2half2(__ushort_as_half(0x6480u)));
      return reinterpret_cast<const uint32_t&>(exact);
    };
    return {pair(0x4140u), pair(0x4342u)};
  }
}

}  // namespace block_sparse::cuda::skinny
