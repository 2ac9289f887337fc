// The consumers of a strip kernel: what they wait for, multiply and release, as their lists of
// items say. How a fragment is read and a sum is stored is in strip_fragment.cuh and
// strip_store.cuh.
#pragma once

#include "cuda/sm90/strip_fragment.cuh"
#include "cuda/sm90/strip_params.cuh"
#include "cuda/sm90/strip_store.cuh"

namespace block_sparse::cuda::sm90::strips {

// An item as the warps of one row of pieces see it.
struct Item {
  static constexpr int kWithin = 16, kGroup = 19, kNone = 20, kSlot = 24;
  uint32_t bits;  // stage (16), where the column is in it (3, in 16 bytes), group, none, slot (8)

  __device__ int stage() const { return bits & 0xffff; }
  __device__ uint32_t within() const { return bits >> kWithin & 7; }
  __device__ int group() const { return bits >> kGroup & 1; }
  __device__ bool none() const { return bits >> kNone & 1; }
  __device__ uint32_t slot() const { return bits >> kSlot; }
};

template <Config kConfig>
class Multiply {
 public:
  using Size = Sizes<kConfig>;
  static constexpr Piece kPiece = kConfig.piece;
  static constexpr Tile kTile = kConfig.tile;
  static constexpr int kGroups = kTile.groups;
  static constexpr bool kSharesList = kTile.list_groups > kGroups;
  using Sums = float[kTile.tokens / 2];  // of a thread, for each group
  static constexpr int kBatch = batch_of(kPiece.depth);
  using Fragments = Fragment[Size::kPieceSteps];
  using Batch = Fragments[kBatch];

  __device__ Multiply(const Params& params, Shared<kConfig>& shared, int rank)
      : params_(params),
        shared_(shared),
        rank_(rank),
        warpgroup_(threadIdx.x / 128),
        lane_(threadIdx.x % 32) {
    const int warp = threadIdx.x / 32 % 4;
    row_ = warp * kWarpOutputs / kPiece.outputs;
    within_piece_ = warp * kWarpOutputs % kPiece.outputs;
    w_ = ptx::address_of(shared.w) + fragment_offset<kConfig>(within_piece_, lane_);
    x_ = static_cast<uint32_t>(kOperand | descriptor_address(ptx::address_of(shared.x)));
    full_ = ptx::address_of(shared.full);
    empty_ = ptx::at_rank(ptx::address_of(shared.empty), lane_ % kCluster);
    speaks_ = lane_ < kCluster;
    ptx::keep_in_register(w_);
    ptx::keep_in_register(x_);
    ptx::keep_in_register(empty_);
    ptx::keep_in_register(speaks_);
  }

  __device__ __forceinline__ void run(int first_task, int clusters) {
    Sums sums[kGroups];
    Batch fragments[2];
    int task = first_task;
    begin(task);
    begin_list();
    for (; task < tasks_of<kConfig>(params_); task += clusters) {
#pragma unroll
      for (Sums& group : sums) {
#pragma unroll
        for (float& sum : group) sum = 0;
      }
      stage_ = -1;
      held_ = 0;
#pragma unroll 1
      for (int from = 0; from < items_; from += 32) {
        Item mine = item_of(!kConfig.flexible || from + lane_ < items_ ? next_ : 0);
        next_ = __ldg(list_ + from + 32);
        int count = min(32, items_ - from);
        if constexpr (kSharesList) count = pick(mine);
        Item items[2][kBatch];
#pragma unroll
        for (int u = 0; u < 2; ++u) read_batch(items[u], mine, u * kBatch);
#pragma unroll 1
        for (int i = 0; i < count; i += 2 * kBatch) {
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            if (u > 0 && items[u][0].none()) {
              cute::warpgroup_wait<0>();  // fragments[0] comes next again
              break;
            }
            multiply(items[u], sums, fragments[u]);
            read_batch(items[u], mine, i + (2 + u) * kBatch);
          }
        }
      }
      cute::warpgroup_wait<0>();
      keep(fragments[0]);
      keep(fragments[1]);
      release(held_);
      if (stage_ >= 0) release(1);
      skip_to(stages_);
      settled(sums);

      const Outputs outputs = outputs_of_coming();
      begin(task + clusters);
      store<0>(sums, outputs);
      begin_list();  // on its way while the rest is stored
      store<1>(sums, outputs);
    }
  }

 private:
  static constexpr uint64_t kOperand = swizzled_operand<kStageDepth * 2>();
  static constexpr uint32_t kHigh = kOperand >> 32;

  static constexpr int kRows = kGroups * Size::kGroupRows;  // of a warpgroup
  static constexpr int kReadAhead = static_cast<int>(WalkLayout::kItemPadding);

  __device__ static int list_of(int warpgroup) { return warpgroup * kGroups / kTile.list_groups; }

  // Where the results go: first token, first output of each group; or, of a part, its number.
  struct Outputs {
    int token;
    int first[kGroups];
    int piece;
  };

  // Fetches what is known of a tile. Nothing is computed from it yet: that would wait for it.
  __device__ __forceinline__ void begin(int next_task) {
    if (next_task >= tasks_of<kConfig>(params_)) return;
    coming_.task = next_task;
    const Task task = task_of<kConfig>(params_, next_task);
    const Raster::Place place = params_.raster.at(task.tile);
    const int panel = place.panel_cluster * kCluster + rank_;
    const int warpgroup = panel * kTile.warpgroups + warpgroup_;
    const Span* span = params_.spans + list_of(warpgroup);
    coming_.span = {__ldg(&span->first), __ldg(&span->count)};
    coming_.stages = __ldg(params_.counts + place.panel_cluster);
    coming_.token = place.token_tile * tile_tokens_of<kConfig>(params_);
    coming_.place = warpgroup * kRows + row_;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      coming_.line[g] = line_at(params_, coming_.place + g * Size::kGroupRows);
    }
  }

  // Then the first of its items.
  __device__ __forceinline__ void begin_list() {
    const Task task = task_of<kConfig>(params_, coming_.task);
    const int all = stages_of(params_, coming_.stages);
    stages_ = task.stage_count(all);
    first_stage_ = task.first_stage(all);
    Span span = coming_.span;
    if (task.piece >= 0) {
      const int32_t* firsts =
          params_.firsts + int64_t{list_of(coming_.place / kRows)} * params_.stages;
      const auto first_of = [&](int stage) {
        return stage < all ? __ldg(firsts + stage) : coming_.span.count;
      };
      const int before = first_of(first_stage_);
      span = {span.first + before, first_of(first_stage_ + stages_) - before};
    }
    const int first = min(max(span.first, 0), params_.item_capacity - kReadAhead);
    items_ = max(min(span.count, params_.item_capacity - kReadAhead - first), 0);
    if (stages_ == 0) items_ = 0;
    list_ = params_.items + first + lane_;
    next_ = __ldg(list_);
  }

  __device__ __forceinline__ Outputs outputs_of_coming() const {
    Outputs outputs{coming_.token, {}, task_of<kConfig>(params_, coming_.task).piece};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int place = coming_.place + g * Size::kGroupRows;
      outputs.first[g] = first_output(params_, place, coming_.line[g]) + within_piece_;
    }
    return outputs;
  }

  // A word of the list (strip_walk.h). What it says may be nonsense, but leads nowhere else.
  __device__ Item item_of(uint32_t word) const {
    const uint32_t rows = word >> kItemRows & ((1u << Size::kGroupRows) - 1);
    const uint32_t depth = (word >> kItemColumn) * kPiece.depth;
    uint32_t slot = (word & 255) + __popc(rows & ((1u << row_) - 1));
    if (slot >= Size::kRing) slot -= Size::kRing;
    slot = rows >> row_ & 1 ? min(slot, uint32_t{Size::kRing}) : uint32_t{Size::kRing};
    const uint32_t stage = depth / kStageDepth - static_cast<uint32_t>(first_stage_);
    return {min(stage, static_cast<uint32_t>(stages_ - 1)) |
            depth % kStageDepth / 8 << Item::kWithin | (word >> kItemGroup & 1) << Item::kGroup |
            uint32_t{rows == 0} << Item::kNone | slot << Item::kSlot};
  }

  // Of the items that the lanes have, those of this warpgroup's group, in the first lanes; returns
  // how many there are. It is the only group then, but a branch on it must stay, or ptxas
  // serialises (C7513).
  __device__ int pick(Item& item) {
    constexpr uint32_t kGroupBit = 1u << Item::kGroup;
    const int group = warpgroup_ * kGroups % kTile.list_groups;
    const bool picked = !item.none() && item.group() == group;
    const uint32_t lanes = __ballot_sync(kAllLanes, picked);
    uint32_t* words = shared_.picked[threadIdx.x / 32];
    if (picked) words[__popc(lanes & ((1u << lane_) - 1))] = item.bits & ~kGroupBit;
    __syncwarp();
    const int count = __popc(lanes);
    item.bits = lane_ < count ? words[lane_] : 1u << Item::kNone;
    __syncwarp();
    return count;
  }

  __device__ static void read_batch(Item (&items)[kBatch], const Item& mine, int lane) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) items[i].bits = __shfl_sync(kAllLanes, mine.bits, lane + i);
  }

  // One batch is always under way, of as many products as were started: its fragments and its stage
  // are in use until the next one waits.
  __device__ __forceinline__ void multiply(const Item (&items)[kBatch], Sums (&sums)[kGroups],
                                           Batch& fragments) {
    if (under_way_ == kBatch) {
      cute::warpgroup_wait<kBatch>();
    } else {
      cute::warpgroup_wait<1>();
    }
    under_way_ = items[kBatch - 1].none() ? 1 : kBatch;
    keep(fragments);
    release(held_);
    held_ = 0;
    if (items[0].stage() > stage_) arrive_at(items[0].stage());
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t piece = in_slot<kConfig>(w_, items[i].slot());
#pragma unroll
      for (int step = 0; step < Size::kPieceSteps; ++step) {
        ptx::load_matrices<kPiece.transposed>(fragments[i][step], at_step<kConfig>(piece, step));
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (i == 0 || !items[i].none()) multiply(items[i], sums, fragments[i]);
    }
  }

  __device__ __forceinline__ void multiply(const Item& item, Sums (&sums)[kGroups],
                                           const Fragments& fragments) {
    const uint32_t x = x_stage_ + item.within();
    static_assert(kGroups <= 2);
    if (item.group() == 0) multiply_group(sums[0], fragments, x);
    if (kGroups == 2 && item.group() == 1) multiply_group(sums[kGroups - 1], fragments, x);
  }

  // Fence and commit stand in the branch, or ptxas serialises (C7520).
  __device__ __forceinline__ static void multiply_group(Sums& sums, const Fragments& fragments,
                                                        uint32_t x) {
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < Size::kPieceSteps; ++step) {
      multiply_strip<kConfig.dtype>(sums, fragments[step],
                                    uint64_t{kHigh} << 32 | (x + step * (kStepDepth / 8)));
    }
    cute::warpgroup_commit_batch();
  }

  // Makes `stage` the one in use. The stage before it is released when its last item is done,
  // but never held while waiting: its pieces may be where the next ones go.
  __device__ __forceinline__ void arrive_at(int stage) {
    if (stage > stage_ + 1) {
      cute::warpgroup_wait<0>();
      release(stage_ >= 0);
      skip_to(stage);
      wait_for_next();
    } else {
      held_ = stage_ >= 0;
      ++stage_;
      const uint32_t barrier = full_ + at_.slot * 8;
      if (!ptx::is_over(barrier, at_.lap)) {
        cute::warpgroup_wait<0>();
        release(held_);
        held_ = 0;
        ptx::wait(barrier, at_.lap);
      }
      x_stage_ = x_ + at_.slot * (kTile.stage_bytes() / 16);
      at_.advance();
    }
  }

  // Releases all stages before `stage` that nothing is needed of.
  __device__ void skip_to(int stage) {
#pragma unroll 1
    while (stage_ + 1 < stage) {
      wait_for_next();
      release(1);
    }
  }

  __device__ void wait_for_next() {
    ++stage_;
    ptx::wait(full_ + at_.slot * 8, at_.lap);
    x_stage_ = x_ + at_.slot * (kTile.stage_bytes() / 16);
    at_.advance();
  }

  // Lane i tells CTA i of the cluster that this warp is done with the oldest stage it held.
  __device__ __forceinline__ void release(int on) {
    ptx::arrive_remote_if(on & speaks_, empty_ + released_ * 8);
    released_ += on;
    released_ = released_ == kTile.stages ? 0 : released_;
  }

  // A fragment must live until the wait for its products: ptxas does not know that they read it,
  // and would give two items under way the same registers.
  __device__ __forceinline__ static void keep(const Batch& batch) {
#pragma unroll
    for (const Fragments& fragments : batch) {
#pragma unroll
      for (const Fragment& f : fragments) {
        asm volatile("" ::"r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]) : "memory");
      }
    }
  }

  // Plain code may touch the sums from here on, and not before.
  __device__ __forceinline__ static void settled(Sums (&sums)[kGroups]) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (float& sum : sums[g]) asm volatile("" : "+f"(sum)::"memory");
    }
  }

  // Half of the tokens. Those beyond the tile's have no sums.
  template <int kHalf>
  __device__ __forceinline__ void store(const Sums (&sums)[kGroups], const Outputs& outputs) const {
    constexpr int kEights = kTile.tokens / 8;
    int end = params_.tokens;
    if constexpr (kConfig.flexible) end = min(end, outputs.token + params_.tile_tokens);
    const auto each_eight = [&](const auto& store) {
#pragma unroll
      for (int j = kHalf * kEights / 2; j < (kHalf + 1) * kEights / 2; ++j) {
        if (kConfig.flexible && outputs.token + j * 8 >= end) break;
        store(j);
      }
    };
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float (&of)[kTile.tokens / 2] = sums[g];
      if (outputs.piece >= 0) {
        const int strip = (warpgroup_ * kGroups + g) * 4 + static_cast<int>(threadIdx.x / 32 % 4);
        float4* to = sums_of_part(params_, outputs.piece, rank_, strip,
                                  kTile.outputs() / kWarpOutputs, lane_);
        each_eight([&](int j) {
          __stcg(to + j * 32, make_float4(of[j * 4], of[j * 4 + 1], of[j * 4 + 2], of[j * 4 + 3]));
        });
      } else {
        const StripStore<Element<kConfig>, kPiece.transposed> to(params_, outputs.first[g],
                                                                 outputs.token, end, lane_);
        each_eight([&](int j) { to.eight(&of[j * 4], j); });
      }
    }
  }

  const Params& params_;
  Shared<kConfig>& shared_;
  const int rank_;
  const int warpgroup_;
  const int lane_;
  int row_;           // of the group's rows, this warp's
  int within_piece_;  // its first output there
  uint32_t w_;        // of the row of a piece in slot 0 that this lane names to ldmatrix
  uint32_t x_;        // low word of the descriptor of stage 0
  uint32_t full_;     // the barriers
  uint32_t empty_;    // of the CTA that this lane tells
  int speaks_;        // 1: this lane does

  // Of the task that is next, or being computed: as it was read.
  struct {
    int task;
    Span span;
    int32_t stages;
    int token;
    int place;  // of the first group's row
    int line[kGroups];
  } coming_{};

  const uint32_t* list_ = nullptr;
  int items_ = 0;
  uint32_t next_ = 0;  // of the list
  int stages_ = 0;     // of the task
  int first_stage_ = 0;

  Cursor<kTile.stages> at_;  // the next stage to wait for
  uint32_t released_ = 0;    // the slot to release next
  int under_way_ = kBatch;   // products of the batch that was started last
  int stage_ = -1;           // in use
  int held_ = 0;             // 1: the one before it is still to be released
  uint32_t x_stage_ = 0;     // low word of the descriptor of the stage in use
};

}  // namespace block_sparse::cuda::sm90::strips
