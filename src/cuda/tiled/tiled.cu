// cuda_tiled: the three products for every dtype, block shape and size, on any GPU: what the fast
// kernels refuse. Tiles in shared memory and ordinary arithmetic, no tensor cores. What it takes;
// the kernels are in spmm.cuh and sddmm.cuh.
#include <limits>

#include "cuda/launch.h"
#include "cuda/tiled/launch.h"
#include "kernels.h"

namespace block_sparse::cuda {
namespace {

// CTAs at most: in the smallest tiles, 64 tokens x 8 outputs, and 8 x 8 of a block.
int64_t most_ctas(const ProductDesc& desc) {
  const auto tiles = [](int64_t size) { return (size + 7) / 8; };
  if (desc.product == Product::grad_weight) {
    return desc.nnz * tiles(desc.block.out) * tiles(desc.block.in);
  }
  const bool forward = desc.product == Product::forward;
  const int64_t lines = forward ? desc.grid().block_rows : desc.grid().block_cols;
  return lines * tiles(forward ? desc.block.out : desc.block.in) * ((desc.tokens + 63) / 64);
}

Refusal why_not(const ProductDesc& desc) {
  if (desc.packed) return "takes values in canonical order only";
  if (Refusal refusal = why_not_served(desc)) return refusal;
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  if (const int64_t ctas = most_ctas(desc); ctas > kMax) {
    return concat("needs ", ctas, " tiles; a grid has at most ", kMax);
  }
  if (std::max(desc.out_features + desc.block.out, desc.in_features + desc.block.in) > kMax / 2) {
    return concat("it counts features in 30 bits; there are ", desc.out_features, " x ",
                  desc.in_features);
  }
  return std::nullopt;
}

int64_t workspace(const ProductDesc&, const Execution&) { return 0; }

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  if (most_ctas(desc) == 0) return;  // an empty grid is a launch error
  visit(desc.dtype, [&](auto type) {
    tiles::launch<typename decltype(type)::type>(desc, args, stream_of(execution.stream));
  });
}

}  // namespace

Kernel tiled() { return {"cuda_tiled", why_not, workspace, run}; }

}  // namespace block_sparse::cuda
