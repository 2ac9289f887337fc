// Which tile a product of cuda_tiled gets, and the launch.
#pragma once

#include "cuda/launch.h"
#include "cuda/tiled/launch.h"
#include "cuda/tiled/sddmm.cuh"
#include "cuda/tiled/spmm.cuh"

namespace block_sparse::cuda::tiles {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sums in double take twice the registers: half as many for each thread.
template <class T>
constexpr int kMaxOutputs = sizeof(T) == 8 ? 16 : 32;
template <class T>
constexpr int kMaxSide = sizeof(T) == 8 ? 16 : 64;

// Tokens of a thread: many, to read W seldom; few, where else most of the GPU would be idle.
constexpr int kManyTokens = 8, kFewTokens = 2;

// The narrowest of 8, 16, ... that holds a block's side, or the widest.
constexpr int side_of(int64_t block, int max) {
  int side = 8;
  while (side < max && side < block) side *= 2;
  return side;
}

// Calls f(std::integral_constant<int, side>{}).
template <int kMax, class F>
void with_side(int side, const F& f) {
  if constexpr (kMax > 8) {
    if (side < kMax) return with_side<kMax / 2>(side, f);
  }
  f(std::integral_constant<int, kMax>{});
}

template <class F>
void with_bool(bool value, const F& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

// Copies of 16 bytes: rows and blocks begin at such addresses, and end there.
template <class T>
bool is_wide(const ProductDesc& desc) {
  constexpr int kUnit = 16 / sizeof(T);
  return desc.alignment >= 16 && desc.block.out % kUnit == 0 && desc.block.in % kUnit == 0 &&
         desc.out_features % kUnit == 0 && desc.in_features % kUnit == 0;
}

template <class Kernel, class Args>
void launch_kernel(const Kernel& kernel, int64_t ctas, int bytes, const Args& args,
                   cudaStream_t stream) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(ctas), kThreads, bytes, stream>>>(args);
  check_cuda(cudaGetLastError(), "cuda_tiled");
}

template <class T>
void spmm(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  const bool forward = desc.product == Product::forward;
  const PatternView& pattern = args.weight.pattern;
  const ConstDenseView& x = forward ? args.x : args.dy;
  const int64_t block_outputs = forward ? desc.block.out : desc.block.in;
  const int side = side_of(block_outputs, kMaxOutputs<T>);
  const int64_t lines = forward ? desc.grid().block_rows : desc.grid().block_cols;
  SpmmArgs spmm{
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
      .pitch = desc.block.in,
      .strips = ceil_div(block_outputs, side),
      .token_tiles = 0,
  };
  const auto launch_tile = [&](auto transposed, auto wide, auto outputs, auto tokens) {
    spmm.token_tiles = ceil_div(desc.tokens, kTileTokens<tokens>);
    const auto launch_for = [&]<class Value>() {
      launch_kernel(spmm_kernel<T, Value, transposed, wide, outputs, tokens>,
                    lines * spmm.strips * spmm.token_tiles, kSpmmBytes<outputs, tokens>, spmm,
                    stream);
    };
    if constexpr (!transposed) {
      if (desc.int8) return launch_for.template operator()<int8_t>();
    }
    launch_for.template operator()<T>();
  };
  with_bool(!forward, [&](auto transposed) {
    with_bool(is_wide<T>(desc), [&](auto wide) {
      with_side<kMaxOutputs<T>>(side, [&](auto outputs) {
        using Many = std::integral_constant<int, kManyTokens>;
        const int64_t ctas = lines * spmm.strips * ceil_div(desc.tokens, kTileTokens<Many::value>);
        const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
        if (ctas >= multiprocessors() && kSpmmBytes<outputs, Many::value> <= room) {
          launch_tile(transposed, wide, outputs, Many{});
        } else {
          launch_tile(transposed, wide, outputs, std::integral_constant<int, kFewTokens>{});
        }
      });
    });
  });
}

template <class T>
void sddmm(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  const int side = side_of(std::max(desc.block.out, desc.block.in), kMaxSide<T>);
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
  with_bool(is_wide<T>(desc), [&](auto wide) {
    with_side<kMaxSide<T>>(side, [&](auto square) {
      launch_kernel(sddmm_kernel<T, wide, square>, desc.nnz * sddmm.out_tiles * sddmm.in_tiles,
                    kSddmmBytes<T, square>, sddmm, stream);
    });
  });
}

template <class T>
void launch(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  desc.product == Product::grad_weight ? sddmm<T>(desc, args, stream) : spmm<T>(desc, args, stream);
}

}  // namespace block_sparse::cuda::tiles
