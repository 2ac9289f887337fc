// cuda_skinny: forward and grad_input with few tokens, where reading W is all that takes time. What
// it takes and what it refuses; how it works is told in kernel.cuh.
#include <algorithm>
#include <cstddef>
#include <limits>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/skinny/launch.h"
#include "cuda/skinny/params.h"
#include "cuda/skinny/plan.h"
#include "cuda/sm90/hopper.h"
#include "kernels.h"

namespace block_sparse::cuda {

namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

Refusal why_not(const ProductDesc& desc) {
  if (desc.product == Product::grad_weight) return "computes forward and grad_input only";
  if (desc.packed) return "takes values in canonical order";
  if (Refusal refusal = why_not_served(desc)) return refusal;
  if (desc.dtype == Dtype::f64) return "dtype is f64; it takes f32, bf16 and f16";
  if (desc.nnz == 0 || desc.tokens == 0) return "there is nothing to multiply";
  if (desc.block.out % 16 != 0 || desc.block.in % 16 != 0) {
    return concat("takes blocks with sides that are multiples of 16, not ", desc.block.out, "x",
                  desc.block.in);
  }
  const skinny::Plan plan = skinny::plan_of(desc, 1);
  const bool hopper = !sm90::why_not_hopper(desc);
  if (!skinny::is_fastest(desc, plan, multiprocessors(), hopper)) {
    return concat("would read W once for every ", skinny::kMaxTokens, " of ", desc.tokens,
                  " tokens; other kernels are faster");
  }
  if (desc.tf32 && desc.tokens > skinny::kMaxTokens && !desc.forced &&
      !sm90::tf32().why_not(desc)) {
    return "cuda_sm90_tf32 is faster";
  }
  if (plan.warps_per_strip == 0) {
    return concat("blocks are ", desc.block.out, "x", desc.block.in, ", ", plan.strips,
                  " strips of ", plan.unit_outputs,
                  " along the outputs are more than it has warps");
  }
  if (desc.alignment < 16) {
    return concat("an address or a row stride is a multiple of ", desc.alignment,
                  " bytes only; its copies need 16");
  }
  if (plan.depth * size_of(desc.dtype) % 16 != 0) {
    return concat("rows of ", plan.depth, " ", to_string(desc.dtype),
                  " to sum over; they must be multiples of 16 bytes");
  }
  if (std::max({plan.units, plan.outputs + plan.block_outputs, plan.depth + plan.block_depth}) >
      kMaxInt) {
    return concat(plan.units, " units of work or ", plan.outputs, " x ", plan.depth,
                  " features overflow 31 bits");
  }
  const int needed =
      skinny::shared_bytes(static_cast<int>(plan.unit_outputs), skinny::padded_tokens(desc.tokens));
  const int shared = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (needed > shared) {
    return concat("needs ", needed, " bytes of shared memory; the device has ", shared);
  }
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  if (major < 8) return concat("compute capability is ", major, ".x; it is written for 8.0 and up");
  return std::nullopt;
}

// For the pass that takes most: the first, or the last one, which has fewer tokens.
int64_t workspace(const ProductDesc& desc, const Execution&) {
  int64_t parts = 0;
  ProductDesc pass = desc;
  for (const int64_t tokens : {desc.tokens, desc.tokens % skinny::kMaxTokens}) {
    pass.tokens = std::min<int64_t>(tokens, skinny::kMaxTokens);
    if (tokens == 0) continue;
    parts = std::max(parts, skinny::plan_of(pass, multiprocessors()).parts(pass.tokens));
  }
  return parts * static_cast<int64_t>(sizeof(skinny::Part));
}

void run_pass(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  if (desc.int8) return skinny::launch_int8(desc, args, stream);
  switch (desc.dtype) {
    case Dtype::bf16:
      return skinny::launch_bf16(desc, args, stream);
    case Dtype::f16:
      return skinny::launch_f16(desc, args, stream);
    default:
      return skinny::launch_f32(desc, args, stream);
  }
}

// More tokens than a kernel has room for are several passes; W comes from L2 after the first.
void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  const cudaStream_t stream = stream_of(execution.stream);
  const auto advance = [&](auto& rows, int64_t tokens) {
    if (rows.data == nullptr) return;
    using Byte = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(rows.data)>>,
                                    const std::byte, std::byte>;
    rows.data = static_cast<Byte*>(rows.data) + tokens * rows.row_stride * size_of(desc.dtype);
  };
  ProductDesc pass = desc;
  ProductArgs rows = args;
  for (int64_t left = desc.tokens; left > 0; left -= pass.tokens) {
    pass.tokens = std::min<int64_t>(left, skinny::kMaxTokens);
    run_pass(pass, rows, stream);
    advance(rows.x, pass.tokens);
    advance(rows.dy, pass.tokens);
    advance(rows.output, pass.tokens);
  }
}

}  // namespace

Kernel few_tokens() { return {"cuda_skinny", why_not, workspace, run}; }

}  // namespace block_sparse::cuda
