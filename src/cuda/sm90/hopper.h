// What all Hopper kernels refuse. Host code.
#pragma once

#include <limits>

#include "cuda/launch.h"
#include "kernel.h"

namespace block_sparse::cuda::sm90 {

// The copy engine describes a matrix by 16-byte addresses and strides and 32-bit coordinates.
inline Refusal why_not_hopper(const ProductDesc& desc) {
  if (desc.int8) return "values are int8; it takes those of the dtype of the rest";
  if (desc.dtype != Dtype::bf16 && desc.dtype != Dtype::f16) {
    return concat("dtype is ", to_string(desc.dtype), "; it takes bf16 and f16");
  }
  if (desc.nnz == 0 || desc.tokens == 0) return "there is nothing to multiply";
  if (desc.alignment < 16) {
    return concat("an address or a row stride is a multiple of ", desc.alignment,
                  " bytes only; the copy engine needs 16");
  }
  if (desc.out_features % 8 != 0 || desc.in_features % 8 != 0) {
    return concat("sizes are ", desc.out_features, " x ", desc.in_features,
                  "; both must be multiples of 8");
  }
  constexpr int64_t max = std::numeric_limits<int32_t>::max();
  if (desc.nnz * desc.block.out > max || desc.tokens > max / 2) {
    return concat(desc.nnz * desc.block.out, " rows of blocks or ", desc.tokens,
                  " tokens overflow the copy engine's coordinates");
  }
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  if (major != 9) return concat("compute capability is ", major, ".x; it is written for 9.0");
  return std::nullopt;
}

}  // namespace block_sparse::cuda::sm90
