// cuda_sm80_strip: forward and grad_input on any GPU from Ampere on, 16-bit elements, blocks with
// sides that are multiples of 16. What it takes, the table of its tiles and the launch; how it
// works is told in strip.cuh.
#include "cuda/sm80/ampere.h"
#include "cuda/sm80/strip.cuh"
#include "cuda/sm80/strip_plan.cuh"
#include "kernels.h"

namespace block_sparse::cuda::sm80 {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pieces of 32 x 32 are four times the work of pieces of 16 x 16 for the same trouble of finding
// them; those fit any block.
using Wide = Piece<32, 32>;
using Narrow = Piece<16, 16>;

bool is_wide(const ProductDesc& desc) {
  return desc.block.out % 32 == 0 && desc.block.in % 32 == 0;
}

int64_t piece_size(const ProductDesc& desc) {
  return is_wide(desc) ? Wide::kOutputs * Wide::kDepth : Narrow::kOutputs * Narrow::kDepth;
}

Refusal why_not(const ProductDesc& desc) {
  if (desc.product == Product::grad_weight) return "computes forward and grad_input only";
  if (Refusal refusal = why_not_ampere(desc)) return refusal;
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  const int64_t elements = desc.nnz * desc.block.out * desc.block.in;
  if (elements / kSourceUnit > kMax || elements / piece_size(desc) > kMax) {
    return concat("it counts values in 32 bits, ", kSourceUnit, " at a time; there are ", elements);
  }
  const int64_t outputs = std::max(desc.out_features, desc.in_features);
  if (ceil_div(outputs, kTileOutputs) * ceil_div(desc.tokens, kTileTokens) > kMax / 2) {
    return concat("it counts tiles in 30 bits: ", desc.tokens, " tokens x ", outputs,
                  " features are too many");
  }
  return why_dense_on_hopper(desc, {.present = 200, .all = 2800}, {.present = 260, .all = 4500});
}

// The workspace: what is planned.
struct PlanLayout {
  int64_t depth_stages = 0, size = 0;  // of Plan
  int64_t counts_at = 0, sources_at = 0, bytes = 0;
};

PlanLayout plan_layout(const ProductDesc& desc) {
  const bool forward = desc.product == Product::forward;
  const int64_t outputs = forward ? desc.out_features : desc.in_features;
  const int64_t depth = forward ? desc.in_features : desc.out_features;
  const int64_t panels = ceil_div(outputs, kTileOutputs);
  PlanLayout layout;
  layout.depth_stages = ceil_div(depth, kStageDepth);
  layout.size = desc.nnz * (desc.block.out * desc.block.in / piece_size(desc));
  layout.counts_at = panels * 2 * layout.depth_stages * static_cast<int64_t>(sizeof(PlannedStage));
  layout.sources_at = layout.counts_at + panels * static_cast<int64_t>(sizeof(int32_t));
  layout.bytes = layout.sources_at + layout.size * static_cast<int64_t>(sizeof(int32_t));
  return layout;
}

int64_t workspace(const ProductDesc& desc, const Execution&) { return plan_layout(desc).bytes; }

template <class T, class Piece, bool kTransposed>
void launch(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  const PatternView& pattern = args.weight.pattern;
  const ConstDenseView& x = kTransposed ? args.dy : args.x;
  const int64_t outputs = kTransposed ? desc.in_features : desc.out_features;
  const int64_t depth = kTransposed ? desc.out_features : desc.in_features;
  const int64_t block_outputs = kTransposed ? desc.block.in : desc.block.out;
  const int64_t block_depth = kTransposed ? desc.block.out : desc.block.in;
  const int64_t lines = ceil_div(outputs, block_outputs);
  const int64_t panels = ceil_div(outputs, kTileOutputs);
  const int64_t token_tiles = ceil_div(desc.tokens, kTileTokens);
  const auto kernel = strip_kernel<T, Piece, kTransposed>;

  const int stages = stages_in(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  const PlanLayout layout = plan_layout(desc);
  char* work = static_cast<char*>(args.workspace);
  const StripArgs strips{
      .x = x.data,
      .values = args.weight.values,
      .bias = desc.epilogue == Epilogue::bias ? args.bias : nullptr,
      .y = args.output.data,
      .x_stride = x.row_stride,
      .y_stride = args.output.row_stride,
      .begin = kTransposed ? pattern.ccol : pattern.crow,
      .line = kTransposed ? pattern.trow : pattern.col,
      .number = kTransposed ? pattern.perm : nullptr,
      .block_size = desc.block.out * desc.block.in,
      .nnz = static_cast<int>(desc.nnz),
      .pitch = static_cast<int>(desc.block.in),
      .tokens = static_cast<int>(desc.tokens),
      .outputs = static_cast<int>(outputs),
      .depth = static_cast<int>(depth),
      .lines = static_cast<int>(lines),
      .depth_lines = static_cast<int>(ceil_div(depth, block_depth)),
      .strips = static_cast<int>(block_outputs / Piece::kOutputs),
      .block_depth = static_cast<int>(block_depth),
      .panels = static_cast<int>(panels),
      .token_tiles = static_cast<int>(token_tiles),
      .stages = stages,
      .plan = {.stages = reinterpret_cast<PlannedStage*>(work),
               .counts = reinterpret_cast<int32_t*>(work + layout.counts_at),
               .sources = reinterpret_cast<int32_t*>(work + layout.sources_at),
               .depth_stages = static_cast<int>(layout.depth_stages),
               .size = static_cast<int>(layout.size)},
  };
  plan_strips<Piece, kTransposed>
      <<<static_cast<unsigned>(panels), kPlanThreads, 0, stream>>>(strips);
  check_cuda(cudaGetLastError(), "cuda_sm80_strip");
  const int bytes = shared_bytes(stages);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "cudaFuncSetAttribute");
  const int64_t ctas = std::min<int64_t>(panels * token_tiles, multiprocessors());
  kernel<<<static_cast<unsigned>(ctas), kThreads, bytes, stream>>>(strips);
  check_cuda(cudaGetLastError(), "cuda_sm80_strip");
}

template <class T, bool kTransposed>
void launch_for_block(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  if (is_wide(desc)) {
    launch<T, Wide, kTransposed>(desc, args, stream);
  } else {
    launch<T, Narrow, kTransposed>(desc, args, stream);
  }
}

template <class T>
void launch_for_product(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  if (desc.product == Product::forward) {
    launch_for_block<T, false>(desc, args, stream);
  } else {
    launch_for_block<T, true>(desc, args, stream);
  }
}

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  if (desc.tokens == 0) return;
  if (desc.dtype == Dtype::bf16) {
    launch_for_product<BFloat16>(desc, args, stream_of(execution.stream));
  } else {
    launch_for_product<Float16>(desc, args, stream_of(execution.stream));
  }
}

}  // namespace

Kernel strip() { return {"cuda_sm80_strip", why_not, workspace, run}; }

}  // namespace block_sparse::cuda::sm80
