// The kernel cuda_sm90_sampled: what it refuses, the workspace and the launch. grad_weight for any
// blocks of 16, 32 or a multiple of 64 on Hopper, in bf16 and fp16. Device code is in sampled.cuh.
#include "cuda/sm90/hopper.h"
#include "cuda/sm90/retile.cuh"
#include "cuda/sm90/sampled.cuh"
#include "cuda/sm90/tensor_map.h"
#include "kernels.h"

namespace block_sparse::cuda::sm90 {
namespace {

using namespace sampled_product;

Refusal why_not(const ProductDesc& desc) {
  if (desc.product != Product::grad_weight) return "the kernel is for grad_weight only";
  if (unit_of(desc.block.out) == 0 || unit_of(desc.block.in) == 0) {
    return concat("the block is ", desc.block.out, "x", desc.block.in,
                  "; the kernel needs sides of 16, 32 or a multiple of 64");
  }
  if (tiling_of(desc.grid(), desc.block).size == 0) {
    return concat("the grid is ", desc.grid().block_rows, " x ", desc.grid().block_cols,
                  " blocks; the kernel needs at least one and at most ", kMaxUnits,
                  " pieces of up to 64 features a side");
  }
  if (!desc.planned) return "the index has no tiles behind it (the op with_walks plans them)";
  return why_not_hopper(desc);
}

// The slices of a tile, and the workspace, in this order: x retiled, counters and sums of what is
// split.
struct Layout {
  int slices = 1;
  int64_t retiled_cols = 0, counters_at = 0, partials_at = 0, size = 0;
};

Layout layout_of(const ProductDesc& desc, int ctas) {
  constexpr int64_t kAlign = 256;
  const auto align = [](int64_t bytes) { return ceil_div(bytes, kAlign) * kAlign; };
  const Tiling t = tiling_of(desc.grid(), desc.block);
  const int64_t steps = ceil_div(desc.tokens, kStepTokens);
  Layout layout;
  const int64_t tiles = likely_tiles(t, desc.nnz * t.parts_out * t.parts_in);
  layout.slices = best_slices(tiles, ctas, static_cast<int>(steps));
  if (t.unit_in <= kMaxRetiledUnit) {
    layout.retiled_cols = ceil_div(int64_t{t.col_units} * t.unit_in, kRetileCols) * kRetileCols;
    layout.counters_at = align(steps * layout.retiled_cols * kUnitBytes);
  }
  layout.size = layout.partials_at = layout.counters_at;
  if (best_parts(slice_cost(layout.slices), 1, ctas, static_cast<int>(steps)).count > 1) {
    const int64_t items = std::min<int64_t>(t.capacity * layout.slices, ctas - 1);
    const int64_t parts = std::min<int64_t>(items * kMaxParts, kMaxPartRounds * ctas);
    layout.partials_at += align(items * 2 * sizeof(uint32_t));
    layout.size = layout.partials_at + parts * kTileOut * kTileIn / layout.slices * sizeof(float);
  }
  return layout;
}

int64_t workspace(const ProductDesc& desc, const Execution&) {
  return layout_of(desc, multiprocessors()).size;
}

template <class T, class Out, int kUnit, int kSlices>
void launch(const ProductDesc& desc, const ProductArgs& args, const Layout& layout, int ctas,
            cudaStream_t stream) {
  char* workspace = static_cast<char*>(args.workspace);
  SampledArgs sampled{};
  sampled.tiling = tiling_of(desc.grid(), desc.block);
  sampled.tiles = args.weight.pattern.tiles;
  sampled.values = args.output.data;
  sampled.factors = args.factors;
  sampled.nnz = desc.nnz;
  sampled.block_out = desc.block.out;
  sampled.block_in = desc.block.in;
  sampled.steps = static_cast<int>(ceil_div(desc.tokens, kStepTokens));

  const auto map = [&](const ConstDenseView& view, int64_t features, int unit) {
    const Box box{kStepTokens, static_cast<uint32_t>(unit)};
    return tensor_map(view.data, desc.dtype, desc.tokens, features, view.row_stride, box, unit * 2,
                      CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  };
  const CUtensorMap dy =
      map(args.dy, desc.out_features, sampled.tiling.unit_out * sampled.tiling.group);
  CUtensorMap x{};
  if constexpr (kUnit <= kMaxRetiledUnit) {
    auto* retiled = reinterpret_cast<uint16_t*>(workspace);
    const auto grid = static_cast<unsigned>(layout.retiled_cols / kRetileCols * sampled.steps);
    retile<<<grid, kRetileThreads, 0, stream>>>(static_cast<const uint16_t*>(args.x.data),
                                                args.x.row_stride, desc.tokens, desc.in_features,
                                                layout.retiled_cols, retiled);
    sampled.retiled = retiled;
    sampled.retiled_cols = layout.retiled_cols;
  } else {
    x = map(args.x, desc.in_features, kUnit);
  }
  if (layout.partials_at > layout.counters_at) {
    sampled.counters = reinterpret_cast<uint32_t*>(workspace + layout.counters_at);
    sampled.partials = reinterpret_cast<float4*>(workspace + layout.partials_at);
    check_cuda(
        cudaMemsetAsync(sampled.counters, 0,
                        static_cast<size_t>(layout.partials_at - layout.counters_at), stream),
        "cuda_sm90_sampled");
  }
  const auto kernel = sampled_kernel<T, Out, kUnit, kSlices>;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
      "cudaFuncSetAttribute");
  kernel<<<ctas, kThreads, kSharedBytes, stream>>>(dy, x, sampled);
  check_cuda(cudaGetLastError(), "cuda_sm90_sampled");
}

template <class T, class Out, int kUnit>
void launch_slices(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  const int ctas = multiprocessors();
  const Layout layout = layout_of(desc, ctas);
  const auto with = [&]<int kSlices>() {
    launch<T, Out, kUnit, kSlices>(desc, args, layout, ctas, stream_of(execution.stream));
  };
  if (layout.slices == 1) return with.template operator()<1>();
  if (layout.slices == 2) return with.template operator()<2>();
  with.template operator()<kMaxSlices>();
}

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  const auto with_types = [&]<class T, class Out>() {
    switch (unit_of(desc.block.in)) {
      case 16:
        return launch_slices<T, Out, 16>(desc, args, execution);
      case 32:
        return launch_slices<T, Out, 32>(desc, args, execution);
      default:
        return launch_slices<T, Out, 64>(desc, args, execution);
    }
  };
  if (desc.dtype == Dtype::bf16) {
    with_types.template operator()<BFloat16, BFloat16>();
  } else if (desc.rounded) {
    with_types.template operator()<Float16, float>();
  } else {
    with_types.template operator()<Float16, Float16>();
  }
}

}  // namespace

Kernel sampled() { return {"cuda_sm90_sampled", why_not, workspace, run}; }

}  // namespace block_sparse::cuda::sm90
