// The plan of the strip kernel: for each panel of strips, at which places along the depth one of
// them has a block, which strips have, and where their pieces lie. A kernel of its own, since it is
// the same for all tokens; one CTA for each panel. Device code.
#pragma once

#include "cuda/sm80/strip_args.cuh"

namespace block_sparse::cuda::sm80 {

constexpr int kPlanThreads = 512;
constexpr int kPlanStages = 1024;  // at once

// Indices on a GPU are not checked: what is read through them stays inside.
__device__ inline int clamp_index(int32_t index, int bound) { return min(max(index, 0), bound); }

// The pieces of kStageDepth of the depth, and the stages they come in: one, or two with half of the
// depth each.
template <class Piece>
class StagePieces {
 public:
  __device__ explicit StagePieces(const uint32_t (&masks)[kHalves])
      : masks_{masks[0], masks[1]}, in_first_(count() > Piece::kRoom ? Piece::kShallow : ~0u) {}

  __device__ int count() const { return __popc(masks_[0]) + __popc(masks_[1]); }
  __device__ bool in_two() const { return in_first_ != ~0u; }
  __device__ uint32_t first(int half) const { return masks_[half] & in_first_; }
  __device__ uint32_t second(int half) const { return masks_[half] & ~in_first_; }
  __device__ int count_first() const { return __popc(first(0)) + __popc(first(1)); }

  // Where a piece comes among all of them.
  __device__ int rank(int half, int bit) const {
    const bool is_first = in_first_ >> bit & 1;
    const uint32_t stage = is_first ? in_first_ : ~in_first_;
    return (is_first ? 0 : count_first()) + (half > 0 ? __popc(masks_[0] & stage) : 0) +
           __popc(masks_[half] & stage & ((1u << bit) - 1));
  }

 private:
  const uint32_t masks_[kHalves];
  const uint32_t in_first_;
};

template <class Piece, bool kTransposed>
__global__ void __launch_bounds__(kPlanThreads)
    plan_strips(const __grid_constant__ StripArgs args) {
  __shared__ uint32_t masks[kPlanStages][kHalves];
  __shared__ int sources[kPlanStages];
  __shared__ int count, next_source;
  constexpr int kHalfStrips = Piece::kStrips / kHalves;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  static_assert(Piece::kStrips <= kPlanThreads / kWarp, "a warp for each strip");

  // This warp's strip.
  const int first_strip = blockIdx.x * Piece::kStrips, strip = first_strip + warp;
  const int row = strip / args.strips, half = warp / kHalfStrips;
  int entry_begin = 0, entry_end = 0;
  if (warp < Piece::kStrips && row < args.lines) {
    entry_begin = clamp_index(args.begin[row], args.nnz);
    entry_end = clamp_index(args.begin[row + 1], args.nnz);
  }
  const int64_t offset =
      int64_t{strip % args.strips} * Piece::kOutputs * (kTransposed ? 1 : args.pitch);

  // Calls f(entry, place in the block, stage, bit) for the pieces of the strip from `begin` on.
  const auto for_pieces = [&](int begin, const auto& f) {
    const int end = min(begin + kPlanStages * kStageDepth, args.depth);
    for (int entry = entry_begin + lane; entry < entry_end; entry += kWarp) {
      const int depth =
          clamp_index(__ldg(args.line + entry), args.depth_lines - 1) * args.block_depth;
      for (int at = max(depth, begin); at < min(depth + args.block_depth, end);
           at += Piece::kDepth) {
        const int part = (at - begin) / Piece::kDepth;
        f(entry, at - depth, part / Piece::kParts,
          Piece::bit(warp % kHalfStrips, part % Piece::kParts));
      }
    }
  };

  if (threadIdx.x == 0) {
    // The pieces of the strips before this panel come first.
    const int first_row = min(first_strip / args.strips, args.lines - 1);
    const int before = clamp_index(args.begin[first_row], args.nnz);
    const int inside = clamp_index(args.begin[first_row + 1], args.nnz) - before;
    const int pieces = args.block_depth / Piece::kDepth;
    next_source = (before * args.strips + inside * (first_strip % args.strips)) * pieces;
    count = 0;
  }
  PlannedStage* planned = args.plan.stages + int64_t{blockIdx.x} * 2 * args.plan.depth_stages;
  for (int first = 0; first < args.plan.depth_stages; first += kPlanStages) {
    for (int i = threadIdx.x; i < kPlanStages; i += kPlanThreads) masks[i][0] = masks[i][1] = 0;
    __syncthreads();
    for_pieces(first * kStageDepth,
               [&](int, int, int i, int bit) { atomicOr(&masks[i][half], 1u << bit); });
    __syncthreads();
    // Stages without pieces are left out, the others and their sources numbered: by one warp.
    for (int i = lane; warp == 0 && i < kPlanStages; i += kWarp) {
      const StagePieces<Piece> pieces(masks[i]);
      int before = pieces.count();
      for (int d = 1; d < kWarp; d *= 2) {
        const int more = __shfl_up_sync(~0u, before, d);
        if (lane >= d) before += more;
      }
      const unsigned present = __ballot_sync(~0u, pieces.count() > 0);
      const unsigned twice = __ballot_sync(~0u, pieces.in_two());
      sources[i] = next_source + before - pieces.count();
      if (pieces.count() > 0) {
        const unsigned lower = (1u << lane) - 1;
        PlannedStage* to = planned + count + __popc(present & lower) + __popc(twice & lower);
        to[0] = {first + i, sources[i], {pieces.first(0), pieces.first(1)}};
        if (pieces.in_two()) {
          to[1] = {
              first + i, sources[i] + pieces.count_first(), {pieces.second(0), pieces.second(1)}};
        }
      }
      __syncwarp();
      if (lane == kWarp - 1) {
        next_source += before;
        count += __popc(present) + __popc(twice);
      }
      __syncwarp();
    }
    __syncthreads();
    for_pieces(first * kStageDepth, [&](int entry, int in_block, int i, int bit) {
      const int at = sources[i] + StagePieces<Piece>(masks[i]).rank(half, bit);
      if (at < 0 || at >= args.plan.size) return;  // in a corrupt index there may be no room
      const int number =
          args.number == nullptr ? entry : clamp_index(__ldg(args.number + entry), args.nnz - 1);
      const int64_t from =
          number * args.block_size + offset + int64_t{in_block} * (kTransposed ? args.pitch : 1);
      args.plan.sources[at] = static_cast<int32_t>(from / kSourceUnit);
    });
    __syncthreads();
  }
  if (threadIdx.x == 0) args.plan.counts[blockIdx.x] = count;
}

}  // namespace block_sparse::cuda::sm80
