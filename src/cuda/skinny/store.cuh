// From sums to the output: bias, rounding, and nothing that lies outside.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/skinny/choice.h"
#include "cuda/skinny/params.h"

namespace block_sparse::cuda::skinny {

template <class T>
__device__ __forceinline__ T narrow(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (Traits<T>::dtype == Dtype::bf16) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  } else {
    return {__half_as_ushort(__float2half_rn(value))};
  }
}

template <class T>
__device__ __forceinline__ float bias_of(const Params& params, int output) {
  if (params.bias == nullptr || output >= params.outputs) return 0;
  return load<float>(static_cast<const T*>(params.bias)[output]);
}

// A lane's part of 16 outputs x 8 tokens, from `output` and `token` on.
template <class T>
__device__ __forceinline__ void store(const Params& params, int token, int output, float4 sums,
                                      int lane) {
  token += lane % 4 * 2;
  output += lane / 4;
  T* to = static_cast<T*>(params.output) + token * params.output_stride + output;
  const bool first = token < params.tokens, second = token + 1 < params.tokens;
  const float low = bias_of<T>(params, output), high = bias_of<T>(params, output + 8);
  if (output < params.outputs) {
    if (first) to[0] = narrow<T>(sums.x + low);
    if (second) to[params.output_stride] = narrow<T>(sums.y + low);
  }
  if (output + 8 < params.outputs) {
    if (first) to[8] = narrow<T>(sums.z + high);
    if (second) to[params.output_stride + 8] = narrow<T>(sums.w + high);
  }
}

}  // namespace block_sparse::cuda::skinny
