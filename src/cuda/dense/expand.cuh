// Expand: a part of W from its blocks, zeros where there is none, in one pass of 16-byte stores.
#pragma once

#include "block_sparse/product.h"
#include "cuda/dense/vector.cuh"

namespace block_sparse::cuda::dense_weight {

// A CTA writes a few rows of one block row, and some columns of them: it looks at the indices of
// the block row once, for all of these rows.
constexpr int kExpandThreads = 256;
constexpr int kExpandRows = 8;
constexpr int kExpandCols = 4096;

struct ExpandArgs {
  const void* values;
  const float* scales;  // where values are int8
  void* dense;          // [row_end - row_begin, pitch]
  int64_t pitch;
  const int32_t* crow;
  const int32_t* col;
  int64_t nnz;
  int block_out, block_in;
  // The part of W.
  int row_begin, row_end, col_begin, col_end;
  unsigned row_groups, col_groups;  // of a block row; of the part
};

// kWide: blocks and the matrix are whole units of 16 bytes of T.
template <class T, class Value, bool kWide>
__global__ void __launch_bounds__(kExpandThreads) expand_kernel(const ExpandArgs args) {
  // Which block lies in each of the block columns, or -1.
  __shared__ int block_in_col[kExpandCols + 1];

  const int col_group = static_cast<int>(blockIdx.x % args.col_groups);
  const int row_group = static_cast<int>(blockIdx.x / args.col_groups % args.row_groups);
  const int block_row = args.row_begin / args.block_out +
                        static_cast<int>(blockIdx.x / args.col_groups / args.row_groups);
  const int first_row = block_row * args.block_out + row_group * kExpandRows;
  const int begin_row = max(first_row, args.row_begin);
  const int end_row =
      min(min(first_row + kExpandRows, (block_row + 1) * args.block_out), args.row_end);
  const int begin_col = args.col_begin + col_group * kExpandCols;
  const int end_col = min(begin_col + kExpandCols, args.col_end);
  if (begin_row >= end_row) return;

  const int first = begin_col / args.block_in;
  const int count = (end_col - 1) / args.block_in + 1 - first;
  for (int i = threadIdx.x; i < count; i += kExpandThreads) block_in_col[i] = -1;
  __syncthreads();
  // Clamped, as everywhere: a corrupt index gives unspecified numbers and no invalid access.
  const int begin = clamp(args.crow[block_row], args.nnz);
  const int end = clamp(args.crow[block_row + 1], args.nnz);
  for (int block = begin + threadIdx.x; block < end; block += kExpandThreads) {
    const unsigned at = static_cast<unsigned>(args.col[block]) - static_cast<unsigned>(first);
    if (at < static_cast<unsigned>(count)) block_in_col[at] = block;
  }
  __syncthreads();

  constexpr int kUnit = kUnitOf<T>;
  const Value* values = static_cast<const Value*>(args.values);
  const int units = (end_col - begin_col + kUnit - 1) / kUnit;
  for (int i = threadIdx.x; i < (end_row - begin_row) * units; i += kExpandThreads) {
    const int row = begin_row + i / units;
    const int col = begin_col + i % units * kUnit;
    const int64_t row_in_block = row - block_row * args.block_out;
    const auto place = [&](int block, int in_block) {
      return values + (int64_t{block} * args.block_out + row_in_block) * args.block_in + in_block;
    };
    float scale = 1;
    if constexpr (!std::is_same_v<T, Value>) scale = args.scales[row];

    int block_col = col / args.block_in;
    int in_block = col - block_col * args.block_in;
    Vector<T, kUnit> unit{};
    if constexpr (kWide) {
      const int block = block_in_col[block_col - first];
      if (block >= 0) {
        const auto stored = *reinterpret_cast<const Vector<Value, kUnit>*>(place(block, in_block));
#pragma unroll
        for (int e = 0; e < kUnit; ++e) unit.of[e] = widened<T>(stored.of[e], scale);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kUnit; ++e) {
        if (col + e < end_col) {
          const int block = block_in_col[block_col - first];
          if (block >= 0) unit.of[e] = widened<T>(*place(block, in_block), scale);
        }
        if (++in_block == args.block_in) {
          in_block = 0;
          ++block_col;
        }
      }
    }
    T* to = static_cast<T*>(args.dense) + (row - args.row_begin) * args.pitch;
    *reinterpret_cast<Vector<T, kUnit>*>(to + (col - args.col_begin)) = unit;
  }
}

}  // namespace block_sparse::cuda::dense_weight
