// cuda_dense: the three products by way of a dense W (or dW), for what the kernels with tensor
// cores refuse: any block shape and dtype, int8 values too. A chunk of W is written out in the
// workspace and multiplied by the dense product that the caller lends, cuBLAS in torch; then the
// next one. What it takes and the launches; it multiplies nothing itself.
#include <cstddef>
#include <limits>

#include "cuda/dense/choice.h"
#include "cuda/dense/chunks.h"
#include "cuda/dense/expand.cuh"
#include "cuda/dense/gather.cuh"
#include "cuda/launch.h"
#include "kernels.h"

namespace block_sparse::cuda {
namespace dense_weight {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Refusal why_not(const ProductDesc& desc) {
  if (!desc.dense_product) return "the caller lends no dense product";
  if (desc.packed) return "takes values in canonical order only";
  if (Refusal refusal = why_not_served(desc)) return refusal;
  if (desc.nnz == 0 || desc.tokens == 0) return "there is nothing to multiply";
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() / 2;
  if (std::max({desc.tokens, desc.out_features + desc.block.out,
                desc.in_features + desc.block.in}) > kMax) {
    return concat("it counts tokens and features in 30 bits; there are ", desc.tokens, " tokens, ",
                  desc.out_features, " x ", desc.in_features, " features");
  }
  if (!desc.forced && !is_fastest(desc)) {
    return concat("would write out ", desc.out_features, " x ", desc.in_features, " weights for ",
                  desc.tokens, " tokens at density ", density_of(desc), "; cuda_tiled is faster");
  }
  return std::nullopt;
}

int64_t workspace(const ProductDesc& desc, const Execution&) {
  return bytes_of(chunks_of(desc), desc.dtype);
}

const void* at(const void* data, int64_t element, Dtype dtype) {
  return static_cast<const std::byte*>(data) + element * size_of(dtype);
}
void* at(void* data, int64_t element, Dtype dtype) {
  return static_cast<std::byte*>(data) + element * size_of(dtype);
}

// Units of 16 bytes lie inside a row of a block, or outside all of them.
bool is_wide(const ProductDesc& desc, const void* values) {
  const int64_t unit = 16 / size_of(desc.dtype);
  return desc.block.in % unit == 0 && desc.in_features % unit == 0 &&
         reinterpret_cast<uintptr_t>(values) % 16 == 0;
}

template <class F>
void with_bool(bool value, const F& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

// Rows and columns of W, from and up to.
struct Part {
  int64_t row_begin, row_end, col_begin, col_end;
};

void expand(const ProductDesc& desc, const ProductArgs& args, const Part& part, int64_t pitch,
            cudaStream_t stream) {
  const int64_t block_rows =
      (part.row_end - 1) / desc.block.out - part.row_begin / desc.block.out + 1;
  ExpandArgs expand{
      .values = args.weight.values,
      .scales = args.weight.scales,
      .dense = args.workspace,
      .pitch = pitch,
      .crow = args.weight.pattern.crow,
      .col = args.weight.pattern.col,
      .nnz = desc.nnz,
      .block_out = static_cast<int>(desc.block.out),
      .block_in = static_cast<int>(desc.block.in),
      .row_begin = static_cast<int>(part.row_begin),
      .row_end = static_cast<int>(part.row_end),
      .col_begin = static_cast<int>(part.col_begin),
      .col_end = static_cast<int>(part.col_end),
      .row_groups = static_cast<unsigned>(ceil_div(desc.block.out, kExpandRows)),
      .col_groups = static_cast<unsigned>(ceil_div(part.col_end - part.col_begin, kExpandCols)),
  };
  const auto ctas = static_cast<unsigned>(block_rows * expand.row_groups * expand.col_groups);
  visit(desc.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_bool(is_wide(desc, args.weight.values), [&](auto wide) {
      if (desc.int8) {
        expand_kernel<T, int8_t, wide><<<ctas, kExpandThreads, 0, stream>>>(expand);
      } else {
        expand_kernel<T, T, wide><<<ctas, kExpandThreads, 0, stream>>>(expand);
      }
    });
  });
  check_cuda(cudaGetLastError(), "cuda_dense");
}

void gather(const ProductDesc& desc, const ProductArgs& args, const Part& part, int64_t pitch,
            cudaStream_t stream) {
  const GridShape grid = desc.grid();
  const bool last = part.row_end == desc.out_features;
  const GatherArgs gather{
      .dense = args.workspace,
      .pitch = pitch,
      .values = args.output.data,
      .row = args.weight.pattern.row,
      .col = args.weight.pattern.col,
      .nnz = desc.nnz,
      .block_rows = grid.block_rows,
      .block_cols = grid.block_cols,
      .block_out = desc.block.out,
      .block_in = desc.block.in,
      .out_features = desc.out_features,
      .in_features = desc.in_features,
      .row_begin = part.row_begin,
      .row_end = last ? grid.block_rows * desc.block.out : part.row_end,
  };
  visit(desc.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    with_bool(is_wide(desc, args.output.data), [&](auto wide) {
      const int64_t elements = desc.nnz * desc.block.out * desc.block.in;
      const unsigned ctas = ctas_for(elements / (wide ? kUnitOf<T> : 1), kGatherThreads);
      gather_kernel<T, wide><<<ctas, kGatherThreads, 0, stream>>>(gather);
    });
  });
  check_cuda(cudaGetLastError(), "cuda_dense");
}

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  const cudaStream_t stream = stream_of(execution.stream);
  const Dtype dtype = desc.dtype;
  const Chunks chunks = chunks_of(desc);
  for (int64_t begin = 0; begin < chunks.lines; begin += chunks.step) {
    const int64_t end = std::min(begin + chunks.step, chunks.lines);
    DenseProduct product;
    product.dtype = dtype;
    switch (desc.product) {
      case Product::forward:  // some columns of y
        expand(desc, args, {begin, end, 0, desc.in_features}, chunks.pitch, stream);
        product.rows = desc.tokens;
        product.cols = end - begin;
        product.depth = desc.in_features;
        product.a = {args.x.data, args.x.row_stride, 1};
        product.b = {args.workspace, chunks.pitch, 1};
        if (desc.epilogue == Epilogue::bias) product.bias = at(args.bias, begin, dtype);
        product.out = {at(args.output.data, begin, dtype), args.output.row_stride};
        execution.dense_product(product);
        break;
      case Product::grad_input:  // some columns of dx
        expand(desc, args, {0, desc.out_features, begin, end}, chunks.pitch, stream);
        product.rows = desc.tokens;
        product.cols = end - begin;
        product.depth = desc.out_features;
        product.a = {args.dy.data, args.dy.row_stride, 1};
        product.b = {args.workspace, 1, chunks.pitch};
        product.out = {at(args.output.data, begin, dtype), args.output.row_stride};
        execution.dense_product(product);
        break;
      case Product::grad_weight:  // some rows of dW
        product.rows = end - begin;
        product.cols = desc.in_features;
        product.depth = desc.tokens;
        product.a = {at(args.dy.data, begin, dtype), 1, args.dy.row_stride};
        product.b = {args.x.data, 1, args.x.row_stride};
        product.out = {args.workspace, chunks.pitch};
        execution.dense_product(product);
        gather(desc, args, {begin, end, 0, desc.in_features}, chunks.pitch, stream);
        break;
    }
  }
}

}  // namespace
}  // namespace dense_weight

Kernel dense() {
  return {"cuda_dense", dense_weight::why_not, dense_weight::workspace, dense_weight::run};
}

}  // namespace block_sparse::cuda
