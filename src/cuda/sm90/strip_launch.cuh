// Launches a strip kernel: what the product asks for becomes the kernel's parameters. Host code.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>

#include "cuda/launch.h"
#include "cuda/sm90/masks.h"
#include "cuda/sm90/strip.cuh"
#include "cuda/sm90/strip_launch.h"
#include "cuda/sm90/tensor_map.h"

namespace block_sparse::cuda::sm90::strips {

// The product without its name: y[tokens, outputs] = x[tokens, depth] Wt.
struct Operands {
  ConstDenseView x;
  int64_t outputs;
  int64_t depth;
  int64_t block_outputs;
  int64_t block_depth;
  int64_t block_rows;  // along the outputs
  int64_t block_cols;  // along the depth
  const int32_t* starts;
  const int32_t* masks;
  const int32_t* blocks;
};

inline Operands operands_of(const ProductDesc& desc, const ProductArgs& args) {
  const PatternView& pattern = args.weight.pattern;
  const GridShape grid = desc.grid();
  if (desc.product == Product::forward) {
    return {args.x,          desc.out_features, desc.in_features, desc.block.out,    desc.block.in,
            grid.block_rows, grid.block_cols,   pattern.crow,     pattern.row_masks, nullptr};
  }
  return {args.dy,         desc.in_features, desc.out_features, desc.block.in,     desc.block.out,
          grid.block_cols, grid.block_rows,  pattern.ccol,      pattern.col_masks, pattern.perm};
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tokens whose x stays in L2 while all panels pass over them. Many, so that W is read from memory
// few times; the copies of a wave of CTAs are close to each other in the depth, which helps.
inline int token_group(int64_t tile_tokens, int64_t depth) {
  constexpr int64_t kBytes = 16 << 20;
  return static_cast<int>(std::clamp<int64_t>(kBytes / (tile_tokens * depth * 2), 4, 16));
}

template <Config kConfig>
Params params_of(const ProductDesc& desc, const ProductArgs& args) {
  using Size = Sizes<kConfig>;
  constexpr Piece kPiece = kConfig.piece;
  const Operands operands = operands_of(desc, args);
  Params params{};
  params.x =
      tensor_map(operands.x.data, desc.dtype, desc.tokens, operands.depth, operands.x.row_stride,
                 {.rows = Size::kTokens / kConfig.tile.cluster, .cols = kStageDepth}, 128);
  // A map needs an address and a size, even of nothing: then it is never used.
  params.values =
      tensor_map(desc.nnz > 0 ? args.weight.values : operands.x.data, desc.dtype,
                 std::max<int64_t>(desc.nnz, 1) * desc.block.out, desc.block.in, desc.block.in,
                 {.rows = static_cast<uint32_t>(kPiece.transposed ? kPiece.depth : kPiece.outputs),
                  .cols = Size::kSwizzleBytes / 2},
                 Size::kSwizzleBytes);
  params.starts = operands.starts;
  params.masks = operands.masks;
  params.mask_words = static_cast<int>(mask_words(operands.block_cols));
  params.blocks = operands.blocks;
  params.bias = desc.epilogue == Epilogue::bias ? args.bias : nullptr;
  params.output = args.output.data;
  params.output_stride = args.output.row_stride;
  params.tokens = static_cast<int>(desc.tokens);
  params.outputs = static_cast<int>(operands.outputs);
  const int64_t row_pieces = operands.block_outputs / kPiece.outputs;
  const int64_t column_pieces = operands.block_depth / kPiece.depth;
  const int64_t rows = operands.block_rows * row_pieces;
  params.rows = static_cast<int>(rows);
  params.nnz = static_cast<int>(desc.nnz);
  params.block_height = static_cast<int>(desc.block.out);
  params.log_row_pieces = std::countr_zero(static_cast<uint64_t>(row_pieces));
  params.log_column_pieces = std::countr_zero(static_cast<uint64_t>(column_pieces));
  params.stages = static_cast<int>(ceil_div(operands.depth, kStageDepth));

  const int64_t strips = ceil_div(rows, Size::kRowsPerStrip);
  const int64_t clusters = ceil_div(ceil_div(strips, kConfig.tile.strips), kConfig.tile.cluster);
  params.raster.panels = static_cast<int>(clusters * kConfig.tile.cluster);
  params.raster.strips = static_cast<int>(strips);
  params.raster.token_tiles = static_cast<int>(ceil_div(desc.tokens, Size::kTokens));
  params.raster.group = token_group(Size::kTokens, operands.depth);
  params.tiles = static_cast<int>(clusters * params.raster.token_tiles);
  params.counter = static_cast<int*>(args.workspace);
  return params;
}

// The grid must be resident at once, and not every SM can be in a cluster: asks once per device.
template <class Choice>
int resident_clusters(cudaLaunchConfig_t& config) {
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> known{};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  std::atomic<int>& clusters = known[device % kDevices];
  if (clusters == 0 || device >= kDevices) {
    const auto kernel = strip_kernel<Choice>;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(config.dynamicSmemBytes)),
               "cuda_sm90_strip: shared memory");
    int found = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&found, kernel, &config),
               "cuda_sm90_strip: clusters");
    clusters = found;
  }
  return clusters;
}

template <class Choice>
void launch(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  constexpr Config kConfig = Choice::kConfig;
  const Params params = params_of<kConfig>(desc, args);
  if (params.tiles == 0) return;
  constexpr unsigned kCluster = kConfig.tile.cluster;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = {kCluster, 1, 1};
  config.blockDim = {Sizes<kConfig>::kThreads, 1, 1};
  config.dynamicSmemBytes = sizeof(Shared<kConfig>) + 1024;  // to align it
  static_assert(sizeof(Shared<kConfig>) + 1024 <= kMaxSharedBytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  config.gridDim.x = std::min(resident_clusters<Choice>(config), params.tiles) * kCluster;
  check_cuda(cudaMemsetAsync(params.counter, 0, sizeof(int), stream), "cuda_sm90_strip");
  check_cuda(cudaLaunchKernelEx(&config, strip_kernel<Choice>, params), "cuda_sm90_strip");
}

template <Dtype kDtype, int kOutputs, int kDepth, bool kTransposed>
struct Chosen {
  static constexpr Piece kPiece{kOutputs, kDepth, kTransposed};
  static constexpr Config kConfig{kDtype, kPiece, tile_of(kPiece)};
};

template <bool kTransposed>
void launch_for_block(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  const Operands operands = operands_of(desc, args);
  const auto with_piece = [&]<int kOutputs, int kDepth>() {
    if (desc.dtype == Dtype::bf16) {
      launch<Chosen<Dtype::bf16, kOutputs, kDepth, kTransposed>>(desc, args, stream);
    } else {
      launch<Chosen<Dtype::f16, kOutputs, kDepth, kTransposed>>(desc, args, stream);
    }
  };
  if (operands.block_outputs >= 32) {
    operands.block_depth >= 32 ? with_piece.template operator()<32, 32>()
                               : with_piece.template operator()<32, 16>();
  } else {
    operands.block_depth >= 32 ? with_piece.template operator()<16, 32>()
                               : with_piece.template operator()<16, 16>();
  }
}

}  // namespace block_sparse::cuda::sm90::strips
