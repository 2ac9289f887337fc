// The consumers of a strip kernel: what they wait for, multiply and release, as their lists of
// items say. How a fragment is read and a sum is stored is in strip_fragment.cuh and
// strip_store.cuh.
#pragma once

#include "cuda/sm90/strip_fragment.cuh"
#include "cuda/sm90/strip_item.cuh"
#include "cuda/sm90/strip_params.cuh"
#include "cuda/sm90/strip_store.cuh"

namespace block_sparse::cuda::sm90::strips {

template <Config kConfig>
class Multiply {
 public:
  using Size = Sizes<kConfig>;
  static constexpr Piece kPiece = kConfig.piece;
  static constexpr Tile kTile = kConfig.tile;
  static constexpr int kGroups = kTile.groups;
  static constexpr bool kSharesList = kTile.list_groups > kGroups;
  static_assert(!kSharesList || kGroups == 1);
  using Sums = float[kTile.tokens / 2];  // of a thread, for each group
  static constexpr int kBatch = batch_of(kPiece.depth);
  using Fragments = Fragment[Size::kPieceSteps];

  // Items that are taken together, with all that their products need.
  struct Ready {
    Item items[kBatch];
    Fragments fragments[kBatch];
  };

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
    x_ = static_cast<uint32_t>(descriptor_address(ptx::address_of(shared.x)));
    full_ = ptx::address_of(shared.full);
    const bool speaks = lane_ < kCluster;
    empty_ = speaks ? ptx::at_rank(ptx::address_of(shared.empty), lane_) : 0;
    empty_size_ = speaks ? 8 : 0;
    ptx::keep_in_register(w_);
    ptx::keep_in_register(empty_);
    ptx::keep_in_register(empty_size_);
  }

  __device__ __forceinline__ void run(int first_task, int clusters) {
    Sums sums[kGroups];
    Ready ready[2];
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
      int last = -1;  // stage of the items so far
#pragma unroll 1
      for (int from = 0; from < items_; from += 32) {
        uint32_t word = !kConfig.flexible || from + lane_ < items_ ? next_ : 0;
        next_ = __ldg(list_ + from + 32);
        int count = min(32, items_ - from);
        if constexpr (kSharesList) {
          count =
              pick<kConfig>(word, warpgroup_ % kTile.list_groups, shared_.picked[threadIdx.x / 32]);
          if (count == 0) continue;
        }
        const Item mine =
            item_of<kConfig>(word, count, last, {row_, x_, first_stage_, stages_, stages_before_});
#pragma unroll
        for (int u = 0; u < 2; ++u) read_batch(ready[u].items, mine, u * kBatch);
        is_there_ = false;
        prepare(ready[0]);
        look_for(ready[1]);
#pragma unroll 1
        for (int i = kBatch;; i += kBatch) {
          multiply(ready[0], sums, ready[1]);
          if (i >= count) {  // the next one is to be ready[0] again
            cute::warpgroup_wait<0>();
            keep(ready[0]);
            break;
          }
          prepare(ready[1]);
          i += kBatch;
          read_batch(ready[0].items, mine, i);
          look_for(ready[0]);
          multiply(ready[1], sums, ready[0]);
          if (i >= count) break;
          prepare(ready[0]);
          read_batch(ready[1].items, mine, i + kBatch);
          look_for(ready[1]);
        }
      }
      cute::warpgroup_wait<0>();
      keep(ready[0]);
      keep(ready[1]);
      release(in_use_);
      in_use_ = 0;
      skip_to(stages_);
      stages_before_ = (stages_before_ + stages_) % (2 * kTile.stages);
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

  // Where the results go: first token, first output of each group's piece; or, of a part, its
  // number.
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
      outputs.first[g] = first_output(params_, place, coming_.line[g]);
    }
    return outputs;
  }

  __device__ static void read_batch(Item (&items)[kBatch], const Item& mine, int lane) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      items[i].what = __shfl_sync(kAllLanes, mine.what, lane + i);
      if (i == 0) items[i].when = __shfl_sync(kAllLanes, mine.when, lane + i);
    }
  }

  // What a batch needs: its stage, and its fragments on their way. The batch before it is under
  // way, so a stage that it ends is held until that one is done.
  __device__ __forceinline__ void prepare(Ready& batch) {
    if (batch.items[0].is(Item::kArrives)) arrive_at(batch.items[0]);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t piece = at_piece<kConfig>(w_, batch.items[i].piece());
#pragma unroll
      for (int step = 0; step < Size::kPieceSteps; ++step) {
        ptx::load_matrices<kPiece.transposed>(batch.fragments[i][step],
                                              at_step<kConfig>(piece, step));
      }
    }
  }

  // Whether the stage of the batch that comes next is there: asked while fragments are on their
  // way, since the answer takes as long.
  __device__ __forceinline__ void look_for(const Ready& batch) {
    is_there_ = ptx::is_over(full_ + batch.items[0].slot() * 8, batch.items[0].lap());
  }

  // Starts the products of a batch, and waits for those of the batch before it.
  __device__ __forceinline__ void multiply(const Ready& batch, Sums (&sums)[kGroups],
                                           const Ready& before) {
    multiply_item(batch, 0, sums);
    if (kBatch == 2 && !batch.items[kBatch - 1].is(Item::kNone)) {
      multiply_item(batch, kBatch - 1, sums);
      cute::warpgroup_wait<2>();
    } else {
      cute::warpgroup_wait<1>();
    }
    keep(before);
    release(held_);
    held_ = 0;
  }

  __device__ __forceinline__ static void multiply_item(const Ready& batch, int i,
                                                       Sums (&sums)[kGroups]) {
    static_assert(kGroups <= 2 && kBatch <= 2);
    const uint32_t x = static_cast<uint32_t>(kOperand) + batch.items[i].x();
    if (kGroups == 1 || !batch.items[i].is(Item::kSecondGroup)) {
      multiply_group(sums[0], batch.fragments[i], x);
    } else {
      multiply_group(sums[kGroups - 1], batch.fragments[i], x);
    }
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

  // Makes an item's stage, a later one, the one in use. The one before is held until the batch that
  // is under way is done, but never while waiting: what comes next may go where its pieces are.
  __device__ __forceinline__ void arrive_at(const Item& item) {
    const bool skips = item.is(Item::kSkips);  // what was seen may have been of an earlier lap
    if (!skips && (is_there_ || ptx::is_over_soon(full_ + item.slot() * 8, item.lap()))) {
      held_ = in_use_;
    } else {
      cute::warpgroup_wait<0>();
      release(in_use_);
      if (skips) skip_to(item.stage());
      ptx::wait(full_ + item.slot() * 8, item.lap());
    }
    stage_ = item.stage();
    in_use_ = barrier_of(item.slot());
  }

  // Releases the stages after the one in use that come before `stage`: nothing is needed of them.
  __device__ void skip_to(int stage) {
#pragma unroll 1
    for (++stage_; stage_ < stage; ++stage_) {
      const uint32_t counted = stages_before_ + stage_, slot = counted % kTile.stages;
      ptx::wait(full_ + slot * 8, counted / kTile.stages & 1);
      release(barrier_of(slot));
    }
  }

  // The one that this lane tells that a slot is free; 0: it tells no one.
  __device__ uint32_t barrier_of(uint32_t slot) const { return empty_ + slot * empty_size_; }

  // Lane i tells CTA i of the cluster that this warp is done with a stage; the others have 0.
  __device__ __forceinline__ static void release(uint32_t stage) {
    ptx::arrive_remote_if(stage, stage);
  }

  // A fragment must live until the wait for its products: ptxas does not know that they read it,
  // and would give two items under way the same registers.
  __device__ __forceinline__ static void keep(const Ready& batch) {
#pragma unroll
    for (const Fragments& fragments : batch.fragments) {
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

  // A group's results, or half of the only one's. Tokens beyond the tile's have no sums.
  template <int kPart>
  __device__ __forceinline__ void store(Sums (&sums)[kGroups], const Outputs& outputs) {
    constexpr int kEights = kTile.tokens / 8 / (3 - kGroups), kGroup = kGroups == 2 ? kPart : 0;
    constexpr int kFirst = kGroups == 2 ? 0 : kPart * kEights;
    float* of = sums[kGroup] + kFirst * 4;
    const int token = outputs.token + kFirst * 8;
    int end = params_.tokens;
    if constexpr (kConfig.flexible) end = min(end, outputs.token + params_.tile_tokens);
    if (outputs.piece >= 0) {
      const int strip =
          (warpgroup_ * kGroups + kGroup) * 4 + static_cast<int>(threadIdx.x / 32 % 4);
      float4* to =
          sums_of_part(params_, outputs.piece, rank_, strip, kTile.outputs() / kWarpOutputs, lane_);
#pragma unroll
      for (int j = 0; j < kEights; ++j) {
        if (token + j * 8 >= end) break;
        __stcg(to + (kFirst + j) * 32,
               make_float4(of[j * 4], of[j * 4 + 1], of[j * 4 + 2], of[j * 4 + 3]));
      }
    } else {
      StripStore<kConfig> to(params_, shared_, outputs.first[kGroup], within_piece_ / kWarpOutputs,
                             token, end, lane_);
      to.template finish<kEights>(of);
#pragma unroll
      for (int j = 0; j < kEights / 2; ++j) {
        if (kConfig.flexible && token + j * kStoreTokens >= end) break;
        to.put(of + j * 8, j, buffer_);
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
  uint32_t x_;        // where stage 0 is, as a descriptor has it
  uint32_t full_;     // the barriers
  uint32_t empty_;    // of the CTA that this lane tells; 0: it tells none
  uint32_t empty_size_;

  // Of the task that is next, or being computed: as it was read.
  struct {
    int task;
    Span span;
    int32_t stages;
    int token;
    int place;  // of the first group's row
    int line[kGroups];
  } coming_{};

  uint32_t buffer_ = 0;  // of the staged results, that was used last

  const uint32_t* list_ = nullptr;
  int items_ = 0;
  uint32_t next_ = 0;  // of the list
  int stages_ = 0;     // of the task
  int first_stage_ = 0;

  uint32_t stages_before_ = 0;  // of earlier tasks, in two laps around the slots
  bool is_there_ = false;       // the stage that comes next was, when it was looked at
  int stage_ = -1;              // in use
  // Barriers of the stage in use, and of the one before it while it is still to be released; 0:
  // none, or this lane tells no one.
  uint32_t in_use_ = 0;
  uint32_t held_ = 0;
};

}  // namespace block_sparse::cuda::sm90::strips
