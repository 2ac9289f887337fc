// cuda_sm90_strip: forward and grad_input with small blocks on Hopper, 16-bit elements. What it
// takes and what it refuses; how it works is told in strip.cuh.
#include <algorithm>
#include <limits>

#include "cuda/sm90/hopper.h"
#include "cuda/sm90/strip_launch.h"
#include "kernels.h"

namespace block_sparse::cuda::sm90 {

namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

bool takes_side(int64_t side) { return side == 16 || side == 32 || side == 64 || side == 128; }

Refusal why_not(const ProductDesc& desc) {
  if (desc.product == Product::grad_weight) return "computes forward and grad_input only";
  if (Refusal refusal = why_not_hopper(desc)) return refusal;
  if (!desc.planned) return "the index has no masks behind it (the op with_walks makes them)";
  if (!takes_side(desc.block.out) || !takes_side(desc.block.in)) {
    return concat("takes blocks with sides of 16, 32, 64 or 128, not ", desc.block.out, "x",
                  desc.block.in);
  }
  if (std::max({desc.tokens, desc.out_features, desc.in_features}) > kMaxInt / 2) {
    return concat("counts tokens and features in 30 bits: ", desc.tokens, ", ", desc.out_features,
                  " or ", desc.in_features, " is too many");
  }
  return std::nullopt;
}

int64_t workspace(const ProductDesc&, const Execution&) { return strips::kWorkspaceBytes; }

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  if (desc.tokens == 0) return;
  const cudaStream_t stream = stream_of(execution.stream);
  if (desc.product == Product::forward) {
    strips::launch_for_block<false>(desc, args, stream);
  } else {
    strips::launch_for_block<true>(desc, args, stream);
  }
}

}  // namespace

Kernel strip() { return {"cuda_sm90_strip", why_not, workspace, run}; }

}  // namespace block_sparse::cuda::sm90
