// cuda_sm90_strip: forward and grad_input with small blocks on Hopper, 16-bit elements. What it
// takes and what it refuses; how it works is told in strip.cuh.
#include "cuda/dense/choice.h"
#include "cuda/sm90/hopper.h"
#include "cuda/sm90/split.h"
#include "cuda/sm90/strip_launch.h"
#include "cuda/sm90/strip_walk.h"
#include "kernels.h"

namespace block_sparse::cuda::sm90 {

namespace {

Refusal why_not(const ProductDesc& desc) {
  if (desc.product == Product::grad_weight) return "computes forward and grad_input only";
  if (Refusal refusal = why_not_hopper(desc)) return refusal;
  if (!desc.planned) return "the index has no lists behind it (the op with_walks makes them)";
  if (!strips::takes_block(desc.block)) {
    return concat("takes blocks with sides of 16, 32, 64 or 128, one of them under 64, not ",
                  desc.block.out, "x", desc.block.in);
  }
  const bool transposed = desc.product == Product::grad_input;
  if (strips::walk_size(desc.grid(), desc.block, transposed) == 0) {
    return concat("a sum is over more than ", strips::kMaxColumns, " pieces or ",
                  strips::kMaxStages * strips::kStageDepth, " features");
  }
  // Rates measured on an H100.
  const bool narrow = std::min(desc.block.out, desc.block.in) == 16;
  return dense_weight::why_dense(desc, narrow ? dense_weight::Rates{.present = 650, .all = 1480}
                                              : dense_weight::Rates{.present = 1000, .all = 1400});
}

strips::Plan plan_of(const ProductDesc& desc) {
  return strips::plan_of(desc, multiprocessors() / strips::kCluster);
}

int64_t workspace(const ProductDesc& desc, const Execution&) { return plan_of(desc).workspace(); }

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  const cudaStream_t stream = stream_of(execution.stream);
  if (desc.product == Product::forward) {
    strips::launch_for_block<false>(desc, args, plan_of(desc), stream);
  } else {
    strips::launch_for_block<true>(desc, args, plan_of(desc), stream);
  }
}

}  // namespace

Kernel strip() { return {"cuda_sm90_strip", why_not, workspace, run}; }

}  // namespace block_sparse::cuda::sm90
