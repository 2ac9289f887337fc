// Tensor maps: what the copy engine of Hopper is told about a matrix in memory. Host code. The
// driver's function is looked up at run time, so that the library loads where there is no driver.
#pragma once

#include <cuda.h>

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

// A row-major matrix [rows, cols] of bf16, f16 or f32, read or written in boxes. What a box reads
// outside is zero, what it writes there is dropped. `swizzle_bytes`: 32, 64 or 128, or 0 for none.
// `promotion`: how much the L2 cache fetches at once.
inline CUtensorMap tensor_map(
    const void* data, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride, Box box,
    int swizzle_bytes, CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
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
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride * size_of(dtype))};
  const cuuint32_t boxes[] = {box.cols, box.rows};
  const cuuint32_t steps[] = {1, 1};
  const CUtensorMapSwizzle swizzle = swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : swizzle_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                           : CU_TENSOR_MAP_SWIZZLE_NONE;
  CUtensorMap map;
  const CUtensorMapDataType type = dtype == Dtype::bf16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                   : dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const CUresult error =
      encode(&map, type, 2, const_cast<void*>(data), sizes, strides, boxes, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    throw std::runtime_error(concat("block_sparse: cuTensorMapEncodeTiled: error ",
                                    static_cast<int>(error), " for a matrix of ", rows, " x ", cols,
                                    ", row stride ", row_stride));
  }
  return map;
}

}  // namespace block_sparse::cuda::sm90
