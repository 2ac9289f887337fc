// Tensor maps: what the copy engine of Hopper is told about a matrix in memory. Host code. The
// driver's function is looked up at run time, so that the library loads where there is no driver.
#pragma once

#include <cuda.h>

#include <array>

#include "block_sparse/dtype.h"
#include "block_sparse/matrix.h"
#include "cuda/launch.h"

namespace block_sparse::cuda::sm90 {

// The copy engine wants addresses and row strides in multiples of this.
constexpr int64_t kTmaAlignment = 16;

struct Box {
  uint32_t rows;
  uint32_t cols;  // elements; cols * element size is at most the swizzle's width
};

// One dimension of an array in memory, and of the box that is copied at a time.
struct Extent {
  int64_t size;
  int64_t stride;  // elements; that of the first is 1
  uint32_t box;
};

// An array of bf16, f16 or f32, read or written in boxes, the fastest dimension first. What a box
// reads outside is zero, what it writes there is dropped. `swizzle_bytes`: 32, 64 or 128, or 0 for
// none. `promotion`: how much the L2 cache fetches at once.
template <size_t kRank>
CUtensorMap tensor_map(const void* data, Dtype dtype, const std::array<Extent, kRank>& extents,
                       int swizzle_bytes, CUtensorMapL2promotion promotion) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                cudaEnableDefault, &result),
               "cuTensorMapEncodeTiled");
    if (found == nullptr) throw std::runtime_error("block_sparse: the CUDA driver is too old");
    return reinterpret_cast<Encode>(found);
  }();
  std::array<cuuint64_t, kRank> sizes, strides;
  std::array<cuuint32_t, kRank> boxes, steps;
  for (size_t i = 0; i < kRank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(extents[i].size);
    strides[i] = static_cast<cuuint64_t>(extents[i].stride * size_of(dtype));
    boxes[i] = extents[i].box;
    steps[i] = 1;
  }
  const CUtensorMapSwizzle swizzle = swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : swizzle_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                           : CU_TENSOR_MAP_SWIZZLE_NONE;
  CUtensorMap map;
  const CUtensorMapDataType type = dtype == Dtype::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const CUresult error =
      encode(&map, type, kRank, const_cast<void*>(data), sizes.data(), strides.data() + 1,
             boxes.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    const Extent &first = extents.front(), &last = extents.back();
    throw std::runtime_error(concat("block_sparse: cuTensorMapEncodeTiled: error ",
                                    static_cast<int>(error), " for an array of ", last.size, " x ",
                                    first.size, ", stride ", last.stride));
  }
  return map;
}

// A row-major matrix [rows, cols].
inline CUtensorMap tensor_map(
    const void* data, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, Box box,
    int swizzle_bytes, CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
  return tensor_map<2>(data, dtype, {{{cols, 1, box.cols}, {rows, row_stride, box.rows}}},
                       swizzle_bytes, promotion);
}

}  // namespace block_sparse::cuda::sm90
