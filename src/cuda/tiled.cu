// cuda_tiled: the three products for every dtype, block shape and size, on any GPU: what the fast
// kernels refuse. Which tiles, and the launch; the kernels are in tiled.cuh.
#include "cuda/launch.h"
#include "cuda/tiled.cuh"
#include "kernels.h"

namespace block_sparse::cuda {
namespace {

using namespace tiles;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tiles of a product: sides of 8, 16 or 32, not much more than the block has.
constexpr int side_of(int64_t block) { return block <= 8 ? 8 : block <= 16 ? 16 : 32; }

int64_t ctas_of(const ProductDesc& desc) {
  if (desc.product == Product::grad_weight) {
    const int64_t side = side_of(std::max(desc.block.out, desc.block.in));
    return desc.nnz * ceil_div(desc.block.out, side) * ceil_div(desc.block.in, side);
  }
  const bool forward = desc.product == Product::forward;
  const int64_t lines = forward ? desc.grid().block_rows : desc.grid().block_cols;
  const int64_t block = forward ? desc.block.out : desc.block.in;
  return lines * ceil_div(block, side_of(block)) * ceil_div(desc.tokens, kTokens);
}

Refusal why_not(const ProductDesc& desc) {
  if (desc.packed) return "takes values in canonical order only";
  if (Refusal refusal = why_not_served(desc)) return refusal;
  constexpr int64_t kMax = 0x7fffffff;
  if (const int64_t ctas = ctas_of(desc); ctas > kMax) {
    return concat("needs ", ctas, " tiles; a grid has at most ", kMax);
  }
  return std::nullopt;
}

int64_t workspace(const ProductDesc&, const Execution&) { return 0; }

// Calls f(std::integral_constant<int, side>{}).
template <class F>
void with_side(int side, const F& f) {
  switch (side) {
    case 8:
      return f(std::integral_constant<int, 8>{});
    case 16:
      return f(std::integral_constant<int, 16>{});
    default:
      return f(std::integral_constant<int, 32>{});
  }
}

template <class T, class Value>
void spmm(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  const bool forward = desc.product == Product::forward;
  const PatternView& pattern = args.weight.pattern;
  const ConstDenseView& x = forward ? args.x : args.dy;
  const int64_t block_outputs = forward ? desc.block.out : desc.block.in;
  const int side = side_of(block_outputs);
  const SpmmArgs spmm{
      .x = x.data,
      .values = args.weight.values,
      .scales = args.weight.scales,
      .bias = desc.epilogue == Epilogue::bias ? args.bias : nullptr,
      .y = args.output.data,
      .x_stride = x.row_stride,
      .y_stride = args.output.row_stride,
      .begin = forward ? pattern.crow : pattern.ccol,
      .line = forward ? pattern.col : pattern.trow,
      .number = forward ? nullptr : pattern.perm,
      .nnz = desc.nnz,
      .tokens = desc.tokens,
      .outputs = forward ? desc.out_features : desc.in_features,
      .depth = forward ? desc.in_features : desc.out_features,
      .depth_lines = forward ? desc.grid().block_cols : desc.grid().block_rows,
      .block_outputs = block_outputs,
      .block_depth = forward ? desc.block.in : desc.block.out,
      .output_stride = forward ? desc.block.in : 1,
      .depth_stride = forward ? 1 : desc.block.in,
      .strips = ceil_div(block_outputs, side),
      .token_tiles = ceil_div(desc.tokens, kTokens),
  };
  with_side(side, [&](auto outputs) {
    spmm_kernel<T, Value, outputs>
        <<<static_cast<unsigned>(ctas_of(desc)), kThreads, 0, stream>>>(spmm);
  });
}

template <class T>
void sddmm(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  const int side = side_of(std::max(desc.block.out, desc.block.in));
  const SddmmArgs sddmm{
      .dy = args.dy.data,
      .x = args.x.data,
      .values = args.output.data,
      .dy_stride = args.dy.row_stride,
      .x_stride = args.x.row_stride,
      .row = args.weight.pattern.row,
      .col = args.weight.pattern.col,
      .block_rows = desc.grid().block_rows,
      .block_cols = desc.grid().block_cols,
      .tokens = desc.tokens,
      .out_features = desc.out_features,
      .in_features = desc.in_features,
      .block_out = desc.block.out,
      .block_in = desc.block.in,
      .out_tiles = ceil_div(desc.block.out, side),
      .in_tiles = ceil_div(desc.block.in, side),
  };
  with_side(side, [&](auto sides) {
    sddmm_kernel<T, sides><<<static_cast<unsigned>(ctas_of(desc)), kThreads, 0, stream>>>(sddmm);
  });
}

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  if (ctas_of(desc) == 0) return;  // an empty grid is a launch error
  visit(desc.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (desc.product == Product::grad_weight) {
      sddmm<T>(desc, args, stream_of(execution.stream));
    } else if (desc.int8) {
      spmm<T, int8_t>(desc, args, stream_of(execution.stream));
    } else {
      spmm<T, T>(desc, args, stream_of(execution.stream));
    }
  });
  check_cuda(cudaGetLastError(), "cuda_tiled");
}

}  // namespace

Kernel tiled() { return {"cuda_tiled", why_not, workspace, run}; }

}  // namespace block_sparse::cuda
