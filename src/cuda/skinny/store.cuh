// From sums to the output: scale, bias, rounding, and nothing that lies outside.
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

// y = sum + bias, and where values are int8: y = scale * sum + bias.
template <class C>
struct OutputEpilogue {
  float scale = 1, bias;

  __device__ __forceinline__ OutputEpilogue(const Params& params, int output)
      : bias(bias_of<typename C::T>(params, output)) {
    if constexpr (C::kScaled) {
      if (output < params.outputs) scale = params.scales[output];
    }
  }
  __device__ __forceinline__ typename C::T operator()(float sum) const {
    return narrow<typename C::T>(C::kScaled ? scale * sum + bias : sum + bias);
  }
};

// A lane's places in 16 outputs x all tokens, from `output` on.
template <class C>
class Outputs {
 public:
  __device__ __forceinline__ Outputs(const Params& params, int output, int lane)
      : low_(params, output + lane / 4),
        high_(params, output + lane / 4 + 8),
        stride_(params.output_stride) {
    const int token = lane % 4 * 2;
    output += lane / 4;
    to_ = static_cast<typename C::T*>(params.output) + token * stride_ + output;
    low_tokens_ = output < params.outputs ? params.tokens - token : 0;
    high_tokens_ = output + 8 < params.outputs ? params.tokens - token : 0;
  }

  // The j-th eight tokens.
  __device__ __forceinline__ void store(int j, float4 sums) const {
    auto* to = to_ + 8 * j * stride_;
    if (8 * j < low_tokens_) to[0] = low_(sums.x);
    if (8 * j + 1 < low_tokens_) to[stride_] = low_(sums.y);
    if (8 * j < high_tokens_) to[8] = high_(sums.z);
    if (8 * j + 1 < high_tokens_) to[stride_ + 8] = high_(sums.w);
  }

 private:
  OutputEpilogue<C> low_, high_;
  int64_t stride_;
  typename C::T* to_;
  int low_tokens_;  // from the lane's first on
  int high_tokens_;
};

// Rows without blocks are the bias alone, or zero. CTAs take rows in turn, and the warps of a CTA
// the tokens.
template <class C>
__device__ void store_empty_rows(const Params& params, int warp, int lane) {
  const int ctas = static_cast<int>(gridDim.x);
  for (int first = static_cast<int>(blockIdx.x); first < params.output_grid; first += 32 * ctas) {
    const int mine = first + lane * ctas;
    const bool empty = mine < params.output_grid && params.starts[mine] >= params.starts[mine + 1];
    for (unsigned lanes = __ballot_sync(~0u, empty); lanes != 0; lanes &= lanes - 1) {
      const int begin = (first + (__ffs(lanes) - 1) * ctas) * params.block_outputs;
      const int end = min(begin + params.block_outputs, params.outputs);
      for (int output = begin + lane; output < end; output += 32) {
        const auto value = narrow<typename C::T>(bias_of<typename C::T>(params, output));
        for (int token = warp; token < params.tokens; token += C::kWarps) {
          static_cast<typename C::T*>(params.output)[token * params.output_stride + output] = value;
        }
      }
    }
  }
}

}  // namespace block_sparse::cuda::skinny
