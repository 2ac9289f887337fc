// Matrix: a pattern and the values of its blocks. A view: it owns neither.
#pragma once

#include <cstdint>

#include "block_sparse/pattern.h"

namespace block_sparse {

struct BlockShape {
  int64_t out = 0;
  int64_t in = 0;
};

// A block-sparse weight [out_features, in_features]. Where a size is no multiple of the block, the
// last block row or column reaches outside; what lies outside is stored and never used.
struct MatrixView {
  PatternView pattern;
  const void* values = nullptr;  // [nnz, block.out, block.in], contiguous, in BSR order, or packed
  // [out_features], where values are int8: row n of the weight is scales[n] times what is stored.
  const float* scales = nullptr;
};

// Row-major, elements of a row adjacent. `row_stride` counts elements.
template <class Pointer>
struct DenseView {
  Pointer data = nullptr;
  int64_t row_stride = 0;
};
using ConstDenseView = DenseView<const void*>;
using MutableDenseView = DenseView<void*>;

}  // namespace block_sparse
