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

// Rows without blocks are the bias alone, or zero. CTAs take rows in turn, a lane of each warp
// looks at one, and the warps of a CTA take the tokens in turn. Which rows these are is asked for
// long before it is waited for.
template <class C>
class EmptyRows {
 public:
  __device__ EmptyRows(const Params& params, int warp, int lane)
      : params_(params), warp_(warp), lane_(lane) {
    look_up();
  }

  __device__ void store() {
    while (first_ < params_.output_grid) {
      for (unsigned lanes = __ballot_sync(~0u, begin_ >= end_); lanes != 0; lanes &= lanes - 1) {
        store(first_ + (__ffs(lanes) - 1) * ctas());
      }
      first_ += 32 * ctas();
      look_up();
    }
  }

 private:
  __device__ void look_up() {
    const int row = first_ + lane_ * ctas();
    const bool is_one = row < params_.output_grid;
    begin_ = is_one ? params_.starts[row] : 0;
    end_ = is_one ? params_.starts[row + 1] : 1;
  }

  __device__ void store(int row) const {
    using T = typename C::T;
    const int begin = row * params_.block_outputs;
    const int end = min(begin + params_.block_outputs, params_.outputs);
    for (int output = begin + lane_; output < end; output += 32) {
      const T value = narrow<T>(bias_of<T>(params_, output));
      T* const to = static_cast<T*>(params_.output) + output;
      for (int token = warp_; token < params_.tokens; token += C::kWarps) {
        to[token * params_.output_stride] = value;
      }
    }
  }

  __device__ static int ctas() { return static_cast<int>(gridDim.x); }

  const Params& params_;
  const int warp_;
  const int lane_;
  int first_ = static_cast<int>(blockIdx.x);
  int begin_;  // entries of the lane's row
  int end_;
};

}  // namespace block_sparse::cuda::skinny
