// Launches the panel kernel: which products it takes, and in which configuration.
#include "cuda/sm90/hopper.h"
#include "cuda/sm90/order.h"
#include "cuda/sm90/panel.cuh"
#include "cuda/sm90/sides.h"
#include "cuda/sm90/strip_walk.h"
#include "cuda/sm90/tensor_map.h"
#include "kernels.h"

namespace block_sparse::cuda::sm90 {
namespace {

template <class T, class Out, class Config, bool kTransposed>
void launch(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  const Sides s = sides(desc);
  const PatternView& pattern = args.weight.pattern;
  const ConstDenseView& input = kTransposed ? args.dy : args.x;
  constexpr int kSlab = Config::kSlab;
  const auto ceil = [](int64_t count, int64_t by) {
    return static_cast<int>((count + by - 1) / by);
  };

  PanelParams params;
  // Even shares of the tokens, and no more than there are: zeros from outside of an array take the
  // copy engine longer than what is inside.
  constexpr int64_t kTileTokens = int64_t{Config::kTokens} * Config::kCluster;
  const int token_tiles = ceil(desc.tokens, kTileTokens);
  const int shares = token_tiles * Config::kCluster;
  const int granule = shares == 1 ? 8 : Config::kStoreTokens;
  params.tokens = static_cast<int>(desc.tokens);
  params.tile_tokens =
      std::min(Config::kTokens, ceil(ceil(desc.tokens, shares), granule) * granule);
  params.input = tensor_map(input.data, desc.dtype, desc.tokens, s.k, input.row_stride,
                            {static_cast<uint32_t>(params.tile_tokens), kSlab}, kSlab * 2);
  params.values = kTransposed
                      ? tensor_map(args.weight.values, desc.dtype, desc.nnz * s.block_k, s.block_m,
                                   s.block_m, {kSlab, Config::kLineRows}, Config::kLineRows * 2)
                      : tensor_map(args.weight.values, desc.dtype, desc.nnz * s.block_m, s.block_k,
                                   s.block_k, {Config::kLineRows, kSlab}, kSlab * 2);
  using Stored = Store<Out, Config::kLineRows, Config::kStoreTokens>;
  params.output =
      tensor_map(args.output.data, Traits<Out>::dtype, desc.tokens, s.m, args.output.row_stride,
                 {Stored::kTokens, Stored::kBoxRows}, Stored::kPitch);
  const GridShape grid = pattern.grid;
  params.walk = {kTransposed ? pattern.ccol : pattern.crow,
                 kTransposed ? pattern.trow : pattern.col,
                 kTransposed ? pattern.perm : nullptr,
                 kTransposed ? pattern.col_order : pattern.row_order,
                 static_cast<int>(grid.nnz),
                 static_cast<int>(kTransposed ? grid.block_cols : grid.block_rows),
                 static_cast<int>(s.block_m),
                 static_cast<int>(s.block_k)};
  constexpr int64_t kBunchBytes = 20 << 20;  // of x: less than half of L2
  const int64_t bunch = kBunchBytes / (kTileTokens * s.k * size_of(desc.dtype));
  params.raster = {ceil(order_size(params.walk.lines) * s.block_m, kConsumers * kGroupRows),
                   token_tiles, static_cast<int>(std::max<int64_t>(bunch, 1))};
  params.bias = desc.epilogue == Epilogue::bias ? args.bias : nullptr;
  params.factors = args.factors;
  params.features_m = static_cast<int>(s.m);
  params.next_tile = static_cast<int*>(args.workspace);

  const auto kernel = panel_kernel<T, Out, Config, kTransposed>;
  constexpr int kShared = sizeof(PanelShared<Config>);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
             "cuda_sm90_panel");
  const int64_t clusters =
      std::min<int64_t>(params.raster.tiles(), multiprocessors() / Config::kCluster);
  if (params.raster.tiles() > clusters) {  // the counter of the others
    check_cuda(cudaMemsetAsync(params.next_tile, 0, sizeof(int), stream_of(execution.stream)),
               "cuda_sm90_panel");
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Config::kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(clusters * Config::kCluster);
  config.blockDim = kPanelThreads;
  config.dynamicSmemBytes = kShared;
  config.stream = stream_of(execution.stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), "cuda_sm90_panel");
}

// clang-format off
//                                 rows tokens slab stages slots cluster store
using LargeFew    = PanelConfig<     64,   128,  64,     6,   12,      1,   64>;
using LargeSome   = PanelConfig<     64,   256,  64,     4,    8,      1,   64>;
using Large       = PanelConfig<     64,   256,  64,     4,    8,      2,   64>;
using LargeNarrow = PanelConfig<     64,   256,  32,     8,   16,      2,   64>;
using Small       = PanelConfig<     32,   256,  64,     4,    8,      2,   64>;
using SmallNarrow = PanelConfig<     32,   256,  32,     8,   16,      2,   64>;
// clang-format on

// Calls f with the configuration for `desc`. Where one CTA has all tokens, there is nobody to share
// W with, and a cluster would leave half of its CTAs without work.
template <class F>
void with_config(const ProductDesc& desc, const F& f) {
  const Sides s = sides(desc);
  const bool narrow = s.block_k % 64 != 0;
  if (s.block_m % 64 == 0) {
    if (!narrow && desc.tokens <= LargeFew::kTokens) return f(std::type_identity<LargeFew>{});
    if (!narrow && desc.tokens <= LargeSome::kTokens) return f(std::type_identity<LargeSome>{});
    return narrow ? f(std::type_identity<LargeNarrow>{}) : f(std::type_identity<Large>{});
  }
  return narrow ? f(std::type_identity<SmallNarrow>{}) : f(std::type_identity<Small>{});
}

Refusal why_not(const ProductDesc& desc) {
  if (desc.product == Product::grad_weight) return "it computes forward and grad_input";
  if (Refusal refusal = why_not_hopper(desc)) return refusal;
  const Sides s = sides(desc);
  if (s.block_m % 32 != 0 || s.block_k % 32 != 0) {
    return concat("the block is ", desc.block.out, "x", desc.block.in,
                  "; it takes sides that are multiples of 32");
  }
  // Measured at density .25: strips are 5 to 40 % faster where several block rows share a wgmma,
  // except for long blocks in forward, where panels are 13 % faster.
  const bool is_long = desc.product == Product::forward && s.block_k % 128 == 0;
  if (s.block_m % 64 != 0 && !is_long && strips::takes_block(desc.block)) {
    return concat("the block is ", desc.block.out, "x", desc.block.in, "; strips are faster");
  }
  return std::nullopt;
}

int64_t workspace(const ProductDesc&, const Execution&) { return sizeof(int); }

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  with_config(desc, [&](auto type) {
    using Config = typename decltype(type)::type;
    const auto with_types = [&]<class T, class Out>() {
      desc.product == Product::grad_input ? launch<T, Out, Config, true>(desc, args, execution)
                                          : launch<T, Out, Config, false>(desc, args, execution);
    };
    if (desc.dtype == Dtype::bf16) {
      with_types.template operator()<BFloat16, BFloat16>();
    } else if (desc.rounded) {
      with_types.template operator()<Float16, float>();
    } else {
      with_types.template operator()<Float16, Float16>();
    }
  });
}

}  // namespace

Kernel panel() { return {"cuda_sm90_panel", why_not, workspace, run}; }

}  // namespace block_sparse::cuda::sm90
