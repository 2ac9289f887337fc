// What all kernels of this directory refuse. Host code.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/dense/choice.h"
#include "cuda/launch.h"
#include "kernel.h"

namespace block_sparse::cuda::sm80 {

// Hopper's dense products reach twice what these instructions do. `narrow` and `wide`: the rates
// for blocks that are cut into pieces of 16 and of 32, measured on an H100.
inline Refusal why_dense_on_hopper(const ProductDesc& desc, dense_weight::Rates narrow,
                                   dense_weight::Rates wide) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return std::nullopt;
  const bool is_wide = desc.block.out % 32 == 0 && desc.block.in % 32 == 0;
  return dense_weight::why_dense(desc, is_wide ? wide : narrow);
}

// Copies move 16 bytes, the tensor cores multiply 16 x 16, and coordinates are 32-bit.
inline Refusal why_not_ampere(const ProductDesc& desc) {
  if (desc.int8) return "values are int8; it takes those of the dtype of the rest";
  if (desc.dtype != Dtype::bf16 && desc.dtype != Dtype::f16) {
    return concat("dtype is ", to_string(desc.dtype), "; it takes bf16 and f16");
  }
  if (desc.block.out % 16 != 0 || desc.block.in % 16 != 0) {
    return concat("the block is ", desc.block.out, "x", desc.block.in,
                  "; both sides must be multiples of 16");
  }
  if (desc.alignment < 16) {
    return concat("an address or a row stride is a multiple of ", desc.alignment,
                  " bytes only; its copies need 16");
  }
  if (desc.out_features % 8 != 0 || desc.in_features % 8 != 0) {
    return concat("sizes are ", desc.out_features, " x ", desc.in_features,
                  "; both must be multiples of 8");
  }
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() / 4;
  if (std::max({desc.tokens, desc.out_features + desc.block.out,
                desc.in_features + desc.block.in}) > kMax) {
    return concat("it counts tokens and features up to ", kMax, "; there are ", desc.tokens,
                  " tokens, ", desc.out_features, " x ", desc.in_features, " features");
  }
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  if (major < 8) return concat("compute capability is ", major, ".x; it is written for 8.0 and up");
  return std::nullopt;
}

}  // namespace block_sparse::cuda::sm80
