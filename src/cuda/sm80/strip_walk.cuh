// The walking warp of the strip kernel. It follows the block rows of the tile and writes down, some
// stages at a time, at which places along the depth one of them has a block, which strips have, and
// where their pieces lie. Device code.
#pragma once

#include "cuda/sm80/strip_args.cuh"

namespace block_sparse::cuda::sm80 {

// Indices on a GPU are not checked: what is read through them stays inside.
__device__ inline int clamp_index(int32_t index, int bound) { return min(max(index, 0), bound); }

template <class Piece, bool kTransposed>
class Walker {
  static constexpr int kLanes = kWarp / Piece::kStrips;  // of a strip: they take entries in turn
  static constexpr int kBatchDepth = kBatch * kStageDepth;

 public:
  __device__ Walker(const StripArgs& args, StageRing ring, Shared& shared)
      : args_(args), ring_(ring), freed_(ring), shared_(shared) {}

  __device__ void run() {
    for (int tile = blockIdx.x; tile < args_.panels * args_.token_tiles; tile += gridDim.x) {
      start(place_of(args_, tile).panel);
      int stage = 0;
      for (;; stage += kBatch) {
        const int depth = max(depth_of(entry_), stage * kStageDepth);
        stage = __reduce_min_sync(~0u, depth < kNone ? depth / kStageDepth : kNone);
        if (stage == kNone) break;
        plan(stage);
        for (int i = 0; i < kBatch; ++i) emit(stage + i, shared_.masks[i][0], shared_.masks[i][1]);
      }
      hand_out({kNone, 0}, {kNone, 0});  // the end of the tile is a stage too
    }
  }

 private:
  __device__ void start(int panel) {
    entry_ = end_ = 0;
    const int strip = panel * Piece::kStrips + lane_ / kLanes, row = strip / args_.strips;
    if (row >= args_.lines) return;
    offset_ = int64_t{strip % args_.strips} * Piece::kOutputs * (kTransposed ? 1 : args_.pitch);
    entry_ = clamp_index(args_.begin[row], args_.nnz);
    end_ = clamp_index(args_.begin[row + 1], args_.nnz);
  }

  __device__ int depth_of(int entry) const {
    if (entry >= end_) return kNone;
    return clamp_index(__ldg(args_.line + entry), args_.depth_lines - 1) * args_.block_depth;
  }

  // Calls f(entry, depth, stage of the batch, bit) for the pieces of the batch, this lane's entries.
  // Returns how many entries of the strip have ended.
  template <class F>
  __device__ int for_pieces(int begin, const F& f) const {
    const int end = begin + kBatchDepth;
    int ended = 0;
    bool more = true;
    for (int entry = entry_ + lane_ % kLanes; __any_sync(~0u, more); entry += kLanes) {
      const int depth = more ? depth_of(entry) : kNone;
      more = depth < end;
      if (!more) continue;
      const int last = min(depth + args_.block_depth, end);
      for (int at = max(depth, begin); at < last; at += Piece::kDepth) {
        const int part = (at - begin) / Piece::kDepth;
        f(entry, at - depth, part / Piece::kParts,
          part % Piece::kParts * Piece::kWarpStrips + lane_ / kLanes % Piece::kWarpStrips);
      }
      ended += depth + args_.block_depth <= end;
    }
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) ended += __shfl_xor_sync(~0u, ended, d);
    return ended;
  }

  // The masks of a batch, and the sources of its pieces in their order.
  __device__ void plan(int stage) {
    const int group = lane_ / (kWarp / kOutputGroups);
    if (lane_ < kBatch * kOutputGroups) shared_.masks[lane_ / kOutputGroups][lane_ % kOutputGroups] = 0;
    __syncwarp();
    for_pieces(stage * kStageDepth, [&](int, int, int i, int bit) {
      atomicOr(&shared_.masks[i][group], 1u << bit);
    });
    __syncwarp();
    const int ended = for_pieces(stage * kStageDepth, [&](int entry, int in_block, int i, int bit) {
      uint32_t at = planned_ + __popc(shared_.masks[i][group] & ((1u << bit) - 1));
      for (int before = 0; before < i; ++before) at += __popc(shared_.masks[before][group]);
      const int number = args_.number == nullptr
                             ? entry
                             : clamp_index(__ldg(args_.number + entry), args_.nnz - 1);
      const int64_t from = number * args_.block_size + offset_ +
                           int64_t{in_block} * (kTransposed ? args_.pitch : 1);
      shared_.sources[group][at % kQueue<Piece>] = static_cast<int32_t>(from / kSourceUnit);
    });
    entry_ += ended;
    for (int i = 0; i < kBatch; ++i) planned_ += __popc(shared_.masks[i][group]);
    __syncwarp();
  }

  __device__ void emit(int stage, uint32_t mask0, uint32_t mask1) {
    if ((mask0 | mask1) != 0) hand_out({stage, mask0}, {stage, mask1});
  }

  // Waits until the next stage, and so many slots of each ring, have been read.
  __device__ void hand_out(StageWork work0, StageWork work1) {
    constexpr int kSlots = kRing<Piece>;
    const int count0 = __popc(work0.mask), count1 = __popc(work1.mask);
    while (held_ == args_.stages || used_[0] + count0 > kSlots || used_[1] + count1 > kSlots) {
      ptx::wait(freed_.empty(), freed_.phase());
      const int counts = __shfl_sync(~0u, counts_, freed_.at());
      used_[0] -= counts & 0xffff;
      used_[1] -= counts >> 16;
      freed_.advance();
      --held_;
    }
    if (lane_ == ring_.at()) counts_ = count0 | count1 << 16;
    used_[0] += count0;
    used_[1] += count1;
    ++held_;
    if (lane_ == 0) {
      ring_.work(0) = work0;
      ring_.work(1) = work1;
      ptx::arrive(ring_.planned());
    }
    ring_.advance();
  }

  const StripArgs& args_;
  StageRing ring_;   // the stage that is planned
  StageRing freed_;  // the oldest that may still be read
  Shared& shared_;
  const int lane_ = threadIdx.x % kWarp;
  int held_ = 0;                  // stages from freed_ to ring_
  int used_[kOutputGroups] = {};  // slots of them
  int counts_ = 0;                // lane i: slots of stage i, of both rings
  uint32_t planned_ = 0;          // pieces of this lane's group so far

  // This lane's strip.
  int entry_ = 0, end_ = 0;  // the first that has not ended before the next stage
  int64_t offset_ = 0;       // of the strip in a block, elements
};

}  // namespace block_sparse::cuda::sm80
