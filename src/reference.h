// Reference: the definition of the three products, one output element at a time, for every dtype,
// block shape and size. The CPU and the CUDA reference kernels run these same functions, and every
// other kernel is tested against them. Not fast, and not meant to be.
#pragma once

#include <cstdint>

#include "block_sparse/dtype.h"
#include "block_sparse/packed.h"
#include "block_sparse/product.h"

namespace block_sparse::reference {

template <class T>
BLOCK_SPARSE_HOST_DEVICE inline const T* row(ConstDenseView view, int64_t r) {
  return static_cast<const T*>(view.data) + r * view.row_stride;
}

// Indices are clamped, so that a corrupt pattern on a GPU gives wrong numbers and no invalid read.
// (On the CPU they have been checked, and this changes nothing.)
BLOCK_SPARSE_HOST_DEVICE inline int64_t clamp(int64_t value, int64_t bound) {
  return value < 0 ? 0 : value < bound ? value : bound;
}

// y[token, out] = bias[out] + sum over the blocks of out's block row (times the scale of out, where
// values are int8)
template <class Sum, class T>
BLOCK_SPARSE_HOST_DEVICE T forward(const ProductDesc& desc, const ProductArgs& args, int64_t token,
                                   int64_t out) {
  const PatternView& pattern = args.weight.pattern;
  const T* x = row<T>(args.x, token);
  const int64_t block_row = out / desc.block.out;
  PackedOrder order = packed_order(desc.dtype, desc.block);
  if (!desc.packed) order.strip = 0;
  const int64_t begin = clamp(pattern.crow[block_row], desc.nnz);
  const int64_t end = clamp(pattern.crow[block_row + 1], desc.nnz);
  Sum sum = 0;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = clamp(pattern.col[block], pattern.grid.block_cols) * desc.block.in;
    for (int64_t k = 0; k < desc.block.in && first + k < desc.in_features; ++k) {
      const int64_t at =
          block * desc.block.out * desc.block.in + order.offset(out % desc.block.out, k);
      const Sum w = desc.int8 ? load<Sum>(static_cast<const int8_t*>(args.weight.values)[at])
                              : load<Sum>(static_cast<const T*>(args.weight.values)[at]);
      sum += load<Sum>(x[first + k]) * w;
    }
  }
  if (desc.int8) sum *= load<Sum>(args.weight.scales[out]);
  if (desc.epilogue == Epilogue::bias) sum += load<Sum>(static_cast<const T*>(args.bias)[out]);
  return store<T>(sum);
}

// dx[token, in] = sum over the blocks of in's block column, through the transposed index
template <class Sum, class T>
BLOCK_SPARSE_HOST_DEVICE T grad_input(const ProductDesc& desc, const ProductArgs& args,
                                      int64_t token, int64_t in) {
  const PatternView& pattern = args.weight.pattern;
  const T* dy = row<T>(args.dy, token);
  const int64_t block_col = in / desc.block.in;
  const int64_t begin = clamp(pattern.ccol[block_col], desc.nnz);
  const int64_t end = clamp(pattern.ccol[block_col + 1], desc.nnz);
  Sum sum = 0;
  for (int64_t entry = begin; entry < end; ++entry) {
    const int64_t first = clamp(pattern.trow[entry], pattern.grid.block_rows) * desc.block.out;
    const T* w = static_cast<const T*>(args.weight.values) +
                 clamp(pattern.perm[entry], desc.nnz - 1) * desc.block.out * desc.block.in +
                 in % desc.block.in;
    for (int64_t n = 0; n < desc.block.out && first + n < desc.out_features; ++n) {
      sum += load<Sum>(dy[first + n]) * load<Sum>(w[n * desc.block.in]);
    }
  }
  return store<T>(sum);
}

// dW[block, n, k] = sum over tokens of dy[token, out] x[token, in]; zero outside the matrix
template <class Sum, class T>
BLOCK_SPARSE_HOST_DEVICE T grad_weight(const ProductDesc& desc, const ProductArgs& args,
                                       int64_t block, int64_t n, int64_t k) {
  const PatternView& pattern = args.weight.pattern;
  const int64_t out = clamp(pattern.row[block], pattern.grid.block_rows) * desc.block.out + n;
  const int64_t in = clamp(pattern.col[block], pattern.grid.block_cols) * desc.block.in + k;
  Sum sum = 0;
  if (out < desc.out_features && in < desc.in_features) {
    for (int64_t token = 0; token < desc.tokens; ++token) {
      sum += load<Sum>(row<T>(args.dy, token)[out]) * load<Sum>(row<T>(args.x, token)[in]);
    }
  }
  return store<T>(sum);
}

// Rows and columns of a product's output, in memory order, and one element of it.
BLOCK_SPARSE_HOST_DEVICE inline int64_t output_rows(const ProductDesc& desc) {
  return desc.product == Product::grad_weight ? desc.nnz * desc.block.out : desc.tokens;
}
BLOCK_SPARSE_HOST_DEVICE inline int64_t output_cols(const ProductDesc& desc) {
  return desc.product == Product::forward      ? desc.out_features
         : desc.product == Product::grad_input ? desc.in_features
                                               : desc.block.in;
}

template <class Sum, class T>
BLOCK_SPARSE_HOST_DEVICE void element(const ProductDesc& desc, const ProductArgs& args, int64_t r,
                                      int64_t c) {
  T* output = static_cast<T*>(args.output.data);
  switch (desc.product) {
    case Product::forward:
      output[r * args.output.row_stride + c] = forward<Sum, T>(desc, args, r, c);
      break;
    case Product::grad_input:
      output[r * args.output.row_stride + c] = grad_input<Sum, T>(desc, args, r, c);
      break;
    case Product::grad_weight:
      output[r * desc.block.in + c] =
          grad_weight<Sum, T>(desc, args, r / desc.block.out, r % desc.block.out, c);
      break;
  }
}

}  // namespace block_sparse::reference
