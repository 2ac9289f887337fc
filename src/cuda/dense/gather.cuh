// Gather: the values of the present blocks from a part of a dense dW; zeros outside the matrix.
#pragma once

#include "block_sparse/product.h"
#include "cuda/dense/vector.cuh"

namespace block_sparse::cuda::dense_weight {

constexpr int kGatherThreads = 256;

struct GatherArgs {
  const void* dense;  // rows from row_begin to row_end, where the matrix has them
  int64_t pitch;
  void* values;
  const int32_t* row;
  const int32_t* col;
  int64_t nnz, block_rows, block_cols;
  int64_t block_out, block_in, out_features, in_features;
  int64_t row_begin, row_end;  // the last part goes on to the end of the last block
};

// kWide: as in expand.cuh.
template <class T, bool kWide>
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const GatherArgs args) {
  constexpr int kUnit = kWide ? kUnitOf<T> : 1;
  using Unit = Vector<T, kUnit>;
  const int64_t row_units = args.block_in / kUnit;
  const int64_t block_units = args.block_out * row_units;
  const int64_t step = int64_t{gridDim.x} * kGatherThreads;
  for (int64_t i = int64_t{blockIdx.x} * kGatherThreads + threadIdx.x; i < args.nnz * block_units;
       i += step) {
    const int64_t block = i / block_units;
    const int64_t in_block = i % block_units;
    const int64_t row =
        clamp(args.row[block], args.block_rows - 1) * args.block_out + in_block / row_units;
    if (row < args.row_begin || row >= args.row_end) continue;
    const int64_t col =
        clamp(args.col[block], args.block_cols - 1) * args.block_in + in_block % row_units * kUnit;
    Unit unit{};
    if (row < args.out_features && col < args.in_features) {
      unit = *reinterpret_cast<const Unit*>(static_cast<const T*>(args.dense) +
                                            (row - args.row_begin) * args.pitch + col);
    }
    static_cast<Unit*>(args.values)[i] = unit;
  }
}

}  // namespace block_sparse::cuda::dense_weight
