// cuda_sm80_sampled: grad_weight on any GPU from Ampere on, 16-bit elements, blocks with sides that
// are multiples of 16. What it takes and the launch; how it works is told in sampled.cuh.
#include "cuda/sm80/ampere.h"
#include "cuda/sm80/sampled.cuh"
#include "kernels.h"

namespace block_sparse::cuda::sm80 {
namespace {

Refusal why_not(const ProductDesc& desc) {
  if (desc.product != Product::grad_weight) return "computes grad_weight only";
  if (Refusal refusal = why_not_ampere(desc)) return refusal;
  return why_dense_on_hopper(desc, {.present = 120, .all = 1150}, {.present = 218, .all = 1900});
}

int64_t workspace(const ProductDesc&, const Execution&) { return 0; }

template <class T>
void launch(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  using namespace sampled_product;
  const PatternView& pattern = args.weight.pattern;
  const GridShape grid = desc.grid();
  Args sampled{
      .dy = args.dy.data,
      .x = args.x.data,
      .dy_stride = args.dy.row_stride,
      .x_stride = args.x.row_stride,
      .tokens = static_cast<int>(desc.tokens),
      .out_features = static_cast<int>(desc.out_features),
      .in_features = static_cast<int>(desc.in_features),
      .tiles = {},
      .row = pattern.row,
      .col = pattern.col,
      .block_rows = static_cast<int>(grid.block_rows),
      .block_cols = static_cast<int>(grid.block_cols),
      .pieces = static_cast<int>(desc.block.in / kUnit),
      .row_groups = static_cast<int>(ceil_div(desc.block.out, kTileOut)),
  };
  sampled.tiles.tiling = sm90::tiling_of(grid, desc.block);
  sampled.tiles.tiles = desc.planned ? pattern.tiles : nullptr;
  sampled.tiles.values = args.output.data;
  sampled.tiles.nnz = desc.nnz;
  sampled.tiles.block_out = desc.block.out;
  sampled.tiles.block_in = desc.block.in;

  constexpr int kBytes = sizeof(sampled_product::Shared);
  static_assert(kBytes <= 99 << 10);
  check_cuda(
      cudaFuncSetAttribute(sampled_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
      "cudaFuncSetAttribute");
  sampled_kernel<T><<<multiprocessors(), kThreads, kBytes, stream>>>(sampled);
  check_cuda(cudaGetLastError(), "cuda_sm80_sampled");
}

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  if (desc.nnz == 0) return;
  if (desc.dtype == Dtype::bf16) {
    launch<BFloat16>(desc, args, stream_of(execution.stream));
  } else {
    launch<Float16>(desc, args, stream_of(execution.stream));
  }
}

}  // namespace

Kernel sampled() { return {"cuda_sm80_sampled", why_not, workspace, run}; }

}  // namespace block_sparse::cuda::sm80
