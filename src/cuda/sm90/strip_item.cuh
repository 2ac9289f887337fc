// What a warp of a strip kernel reads of its list of items (strip_walk.h), worked out for 32 of
// them at a time. No waits and no products.
#pragma once

#include "cuda/sm90/strip_params.cuh"

namespace block_sparse::cuda::sm90::strips {

// An item as the warps of one row of pieces see it, with all that can be known of it beforehand: a
// warp is as fast as the chain of instructions from one item to the next is short.
struct Item {
  static constexpr uint32_t kSecondGroup = 1, kNone = 2, kArrives = 4, kSkips = 8;
  static constexpr int kX = 18;  // 14 bits
  // What is to be done: flags; where the piece is, in bytes from slot 0 on; where x is, as a
  // descriptor has it.
  uint32_t what = kNone;
  // The stage it needs, counted from the task's first one (16 bits); its slot (3); its lap (1).
  uint32_t when = 0;

  __device__ bool is(uint32_t flag) const { return (what & flag) != 0; }
  __device__ uint32_t piece() const { return what & ((1u << kX) - 16); }
  __device__ uint32_t x() const { return what >> kX; }
  __device__ int stage() const { return when & 0xffff; }
  __device__ uint32_t slot() const { return when >> 16 & 7; }
  __device__ uint32_t lap() const { return when >> 19; }
};

// What items are seen from.
struct ItemContext {
  int row;                 // of the group's rows, this warp's
  uint32_t x;              // where the first slot of x is, as a descriptor has it
  int first_stage;         // of the task
  int stages;              // of the task
  uint32_t stages_before;  // of earlier tasks, in two laps around the slots
};

template <Config kConfig>
__device__ __forceinline__ uint32_t rows_of(uint32_t word) {
  return word >> kItemRows & ((1u << Sizes<kConfig>::kGroupRows) - 1);
}

// Words of the list, one a lane, `count` of them. What they say may be nonsense, but leads nowhere
// else, and never back to an earlier stage. `last`: the stage of the items so far.
template <Config kConfig>
__device__ __forceinline__ Item item_of(uint32_t word, int count, int& last,
                                        const ItemContext& context) {
  using Size = Sizes<kConfig>;
  constexpr Tile kTile = kConfig.tile;
  constexpr int kBatch = batch_of(kConfig.piece.depth);
  static_assert(kTile.stages <= 8 && Size::kRing * Size::kPieceBytes < 1 << Item::kX);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t rows = rows_of<kConfig>(word);
  const uint32_t depth = (word >> kItemColumn) * kConfig.piece.depth;
  uint32_t slot = (word & 255) + __popc(rows & ((1u << context.row) - 1));
  if (slot >= Size::kRing) slot -= Size::kRing;
  slot = rows >> context.row & 1 ? min(slot, uint32_t{Size::kRing}) : uint32_t{Size::kRing};

  const uint32_t listed = depth / kStageDepth - static_cast<uint32_t>(context.first_stage);
  int stage = rows == 0 ? 0 : static_cast<int>(min(listed, uint32_t(context.stages - 1)));
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int earlier = __shfl_up_sync(kAllLanes, stage, d);
    if (lane >= d) stage = max(stage, earlier);
  }
  stage = max(stage, last);
  int before = __shfl_up_sync(kAllLanes, stage, kBatch);
  if (lane < kBatch) before = last;
  last = __shfl_sync(kAllLanes, stage, count - 1);

  Item item;
  const uint32_t counted = context.stages_before + stage, at = counted % kTile.stages;
  item.when = stage | at << 16 | (counted / kTile.stages & 1) << 19;
  item.what = (context.x + at * (kTile.stage_bytes() / 16) + depth % kStageDepth / 8) << Item::kX |
              slot * Size::kPieceBytes | (stage > before ? Item::kArrives : 0) |
              (stage > before + 1 ? Item::kSkips : 0) | (rows == 0 ? Item::kNone : 0) |
              (word >> kItemGroup & 1 ? Item::kSecondGroup : 0);
  return item;
}

// Of the words that the lanes have, those of a group, in the first lanes; returns how many there
// are. It is the only group then. `words`: room for this warp's.
template <Config kConfig>
__device__ __forceinline__ int pick(uint32_t& word, uint32_t group, uint32_t (&words)[32]) {
  const uint32_t lane = threadIdx.x % 32;
  const bool picked = rows_of<kConfig>(word) != 0 && (word >> kItemGroup & 1) == group;
  const uint32_t lanes = __ballot_sync(kAllLanes, picked);
  if (picked) words[__popc(lanes & ((1u << lane) - 1))] = word & ~(1u << kItemGroup);
  __syncwarp();
  const int count = __popc(lanes);
  word = lane < count ? words[lane] : 0;
  __syncwarp();
  return count;
}

}  // namespace block_sparse::cuda::sm90::strips
