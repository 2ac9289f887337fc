// Launches a strip kernel: what the product asks for becomes the kernel's parameters. Host code.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>

#include "cuda/launch.h"
#include "cuda/sm90/strip.cuh"
#include "cuda/sm90/strip_join.cuh"
#include "cuda/sm90/strip_launch.h"
#include "cuda/sm90/tensor_map.h"

namespace block_sparse::cuda::sm90::strips {

// Tokens whose x stays in L2 while all panels pass over them. Many, so that W is read from memory
// few times; the copies of a wave of CTAs are close to each other in the depth, which helps.
inline int token_group(int64_t tile_tokens, int64_t depth) {
  constexpr int64_t kBytes = 16 << 20;
  return static_cast<int>(std::clamp<int64_t>(kBytes / (tile_tokens * depth * 2), 4, 16));
}

template <Config kConfig>
Params params_of(const ProductDesc& desc, const ProductArgs& args, const Plan& plan) {
  using Size = Sizes<kConfig>;
  constexpr bool kTransposed = kConfig.piece.transposed;
  const PatternView& pattern = args.weight.pattern;
  const Lines lines = lines_of(desc.grid(), desc.block, kTransposed);
  const WalkLayout layout(lines);
  const int32_t* walk = kTransposed ? pattern.col_strips : pattern.row_strips;
  const ConstDenseView& x = kTransposed ? args.dy : args.x;
  const int64_t depth = kTransposed ? desc.out_features : desc.in_features;

  Params params{};
  params.x = tensor_map(
      x.data, desc.dtype, desc.tokens, depth, x.row_stride,
      {.rows = static_cast<uint32_t>(plan.tile_tokens / kCluster), .cols = kStageDepth}, 128);
  const int64_t width = Size::kLineRows * desc.block.in;
  params.values = tensor_map(
      args.weight.values, desc.dtype, desc.nnz * desc.block.out / Size::kLineRows, width, width,
      {.rows = Size::kPieceBytes / Size::kLineBytes, .cols = Size::kLineBytes / 2},
      Size::kLineBytes);
  params.spans = reinterpret_cast<const Span*>(walk + layout.spans);
  params.firsts = walk + layout.firsts;
  params.counts = walk + layout.counts;
  params.records = reinterpret_cast<const StageRecord*>(walk + layout.stages);
  params.items = reinterpret_cast<const uint32_t*>(walk + layout.items);
  params.pieces = walk + layout.pieces;
  params.item_capacity = static_cast<int>(layout.item_capacity);
  params.piece_capacity = static_cast<int>(layout.piece_capacity);
  params.order = kTransposed ? pattern.col_order : pattern.row_order;
  params.lines = static_cast<int>(lines.lines);
  params.places = static_cast<int>(lines.order_places());
  params.log_line_parts = std::countr_zero(static_cast<uint64_t>(lines.line_parts()));
  params.piece_outputs = lines.outputs();
  params.bias = desc.epilogue == Epilogue::bias ? args.bias : nullptr;
  params.factors = args.factors;
  params.output = args.output.data;
  params.output_stride = args.output.row_stride;
  params.tokens = static_cast<int>(desc.tokens);
  params.outputs = static_cast<int>(kTransposed ? desc.in_features : desc.out_features);
  params.stages = static_cast<int>(lines.stages());
  params.tile_tokens = plan.tile_tokens;
  params.raster = {static_cast<int>(lines.panels() / kCluster), plan.token_tiles,
                   token_group(plan.tile_tokens, depth)};
  params.split = plan.split;
  params.parts = static_cast<float4*>(args.workspace);
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

// The kernel may start before the one before it has ended, and waits for it itself.
inline cudaLaunchAttribute overlap() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// Adds up the parts, where there are any.
template <Config kConfig>
void launch_join(const Params& params, cudaStream_t stream) {
  constexpr int kStrips = kConfig.tile.outputs() / kWarpOutputs;
  const int64_t warps = int64_t{params.split.last} * kCluster * kStrips * (params.tile_tokens / 8);
  if (params.split.parts == 1) return;
  cudaLaunchAttribute early = overlap();
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>((warps * 32 + kJoinThreads - 1) / kJoinThreads), 1, 1};
  config.blockDim = {kJoinThreads, 1, 1};
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, join_kernel<Output<kConfig>>, params, kStrips),
             "cuda_sm90_strip");
}

template <class Choice>
void launch(const ProductDesc& desc, const ProductArgs& args, const Plan& plan,
            cudaStream_t stream) {
  const Params params = params_of<Choice::kConfig>(desc, args, plan);
  if (params.split.tasks() == 0) return;
  std::array<cudaLaunchAttribute, 2> attributes{cudaLaunchAttribute{}, overlap()};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = {kCluster, 1, 1};
  config.blockDim = {Choice::kConfig.tile.threads(), 1, 1};
  config.dynamicSmemBytes = sizeof(Shared<Choice::kConfig>) + 1024;  // to align it
  static_assert(sizeof(Shared<Choice::kConfig>) + 1024 <= kMaxSharedBytes);
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = 1;  // of clusters that are resident, only their size matters
  config.gridDim.x = std::min(resident_clusters<Choice>(config), params.split.tasks()) * kCluster;
  config.numAttrs = attributes.size();
  check_cuda(cudaLaunchKernelEx(&config, strip_kernel<Choice>, params), "cuda_sm90_strip");
  launch_join<Choice::kConfig>(params, stream);
}

template <Dtype kDtype, Dtype kOutput, Piece kPiece, Tile kTile, bool kFlexible>
struct Chosen {
  static constexpr Config kConfig{kDtype, kOutput, kPiece, kTile, kFlexible};
};

template <bool kTransposed>
void launch_for_block(const ProductDesc& desc, const ProductArgs& args, const Plan& plan,
                      cudaStream_t stream) {
  const Lines lines = lines_of(desc.grid(), desc.block, kTransposed);
  const auto with_tile = [&]<Piece kPiece, Tile kTile, bool kFlexible>() {
    const auto with_dtypes = [&]<Dtype kDtype, Dtype kOutput>() {
      launch<Chosen<kDtype, kOutput, kPiece, kTile, kFlexible>>(desc, args, plan, stream);
    };
    if (desc.dtype == Dtype::bf16) {
      with_dtypes.template operator()<Dtype::bf16, Dtype::bf16>();
    } else if (desc.rounded) {
      with_dtypes.template operator()<Dtype::f16, Dtype::f32>();
    } else {
      with_dtypes.template operator()<Dtype::f16, Dtype::f16>();
    }
  };
  const auto with_piece = [&]<int kOutputs, int kDepth, bool kStrided>() {
    constexpr Piece kPiece{kOutputs, kDepth, kTransposed, kStrided};
    if constexpr (kDepth == kStepDepth) {
      with_tile.template operator()<kPiece, kTall, true>();
    } else if (plan.tile == kFew) {
      with_tile.template operator()<kPiece, kFew, true>();
    } else if (plan.flexible()) {
      with_tile.template operator()<kPiece, kWide, true>();
    } else {
      with_tile.template operator()<kPiece, kWide, false>();
    }
  };
  // Strided pieces are 32 wide in memory.
  const bool strided = is_strided(desc.block.in);
  if (lines.outputs() == 32 && lines.depth() == 32) {
    strided ? with_piece.template operator()<32, 32, true>()
            : with_piece.template operator()<32, 32, false>();
  } else if (lines.outputs() == 32) {
    strided ? with_piece.template operator()<32, 16, kTransposed>()
            : with_piece.template operator()<32, 16, false>();
  } else if (lines.depth() == 32) {
    strided ? with_piece.template operator()<16, 32, !kTransposed>()
            : with_piece.template operator()<16, 32, false>();
  } else {
    with_piece.template operator()<16, 16, false>();
  }
}

}  // namespace block_sparse::cuda::sm90::strips
