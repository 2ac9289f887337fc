// The panel kernel: y[tokens, M] = x[tokens, K] W for blocks whose side along M is a multiple of
// 64, computed as yt = Wt xt, so that 64 rows of W are the M of a wgmma and tokens its N. One
// template for forward (M = out) and grad_input (M = in, through the transposed index; the blocks
// are read where they lie). Not for small blocks: strip.cuh.
//
// A tile is a panel (two groups of 64 rows of M, each of one or two block rows) times kTokens
// tokens. Its steps are the block columns that any of its block rows has: x is loaded once for all
// of them (their union), W for the groups that have the block. Four roles:
//   walker    merges the sorted column lists of the groups, straight from the pattern's index, and
//             sends a Step to each CTA of the cluster. It takes tiles from a counter: patterns are
//             uneven, and whoever is free goes on.
//   loader    waits for room, has the copy engine fetch x and W, and says in a Stage what came.
//   consumers two warpgroups; each multiplies its groups, skips those that lack the block, and
//             stores its part of y through shared memory.
// The CTAs of a cluster work on the same panel at neighbouring tokens: each fetches a share of W
// for all of them.
//
// What limits it is traffic from L2 into shared memory (an SM takes in about 38 bytes a clock):
// hence large tiles, and W shared within the cluster.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <climits>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "block_sparse/product.h"
#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/store.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace block_sparse::cuda::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups, each with a group of 64 rows of M
constexpr int kGroupRows = 64;
constexpr int kMaxLines = 4;  // of a panel: block rows, or 64 rows of a larger one

// Rows that a line gives to a group (64, or 32: then two lines share one), tokens of a tile, width
// of a step along K, stages of x, slots for the 64-row pieces of W, CTAs of a cluster, tokens that
// are stored at a time.
template <int kLineRows_, int kTokens_, int kSlab_, int kStages_, int kSlots_, int kCluster_,
          int kStoreTokens_>
struct PanelConfig {
  static constexpr int kLineRows = kLineRows_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kSlab = kSlab_;
  static constexpr int kStages = kStages_;
  static constexpr int kSlots = kSlots_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kStoreTokens = kStoreTokens_;

  static constexpr int kGroupLines = kGroupRows / kLineRows;
  static constexpr int kLines = kConsumers * kGroupLines;  // of a panel
  static constexpr int kSums = kTokens / 2;                // of one thread
  static constexpr int kSteps = 16;
  static constexpr uint32_t kInputBytes = kTokens * kSlab * 2;
  static constexpr uint32_t kPieceBytes = kGroupRows * kSlab * 2;

  static_assert(kTokens <= 256 && kTokens % kStoreTokens == 0 && kLines <= kMaxLines);
  // A consumer holds one stage while it waits for the next: both must find room.
  static_assert(kSlots >= 2 * kConsumers && kStages >= 2);
};

constexpr int kEnd = -1;  // instead of a panel: no more tiles

// One block column of a tile, on its way from the walker to the loaders.
struct Step {
  int panel;   // or kEnd
  int token;   // the tile's first
  int column;  // of x, in elements
  int within;  // first element along K within the block, times two; plus one: the tile's last step
  int row[kMaxLines];  // of the array of all blocks, where each line's part is; or -1
};

// What a stage holds, for the consumers.
struct Stage {
  int panel;  // or kEnd
  int token;
  uint32_t slots;  // a byte for each group: where its piece of W is, or kAbsent
  int last;
};
constexpr uint32_t kAbsent = 0xff;

template <class Config>
struct alignas(1024) PanelShared {
  unsigned char input[Config::kStages][Config::kInputBytes];
  unsigned char pieces[Config::kSlots][Config::kPieceBytes];
  StoreBuffers<Config::kStoreTokens> output[kConsumers];
  Step steps[Config::kSteps];
  Stage stages[Config::kStages];
  uint64_t full[Config::kStages], empty[Config::kStages];
  uint64_t step_full[Config::kSteps], step_empty[Config::kSteps];
};

// The M side of the pattern: block rows for forward, block columns for grad_input.
struct PanelWalk {
  const int32_t* start;  // [lines + 1]
  const int32_t* cross;  // [nnz] block index along K, ascending within a line
  const int32_t* perm;   // [nnz] block number, or null: the entry itself
  const int32_t* order;  // in which lines come into panels, or null: as they are
  int nnz;
  int lines;
  int block_m, block_k;

  __device__ int clamp(int entry) const { return min(max(entry, 0), nnz); }

  // Which rows stand at a place of the panels: those from `part` on of a line; line -1: none.
  struct Rows {
    int line, part;
  };
  __device__ Rows at(int place, int line_rows) const {
    const int parts = block_m / line_rows;
    int line = place / parts;
    if (line < (lines + 3) / 4 * 4 && order != nullptr) line = order[line];
    if (line < 0 || line >= lines) line = -1;
    return {line, place % parts * line_rows};
  }
};

// In which order tiles are taken: token tiles in bunches, so that their x stays in L2 while all
// panels pass; within a bunch panel after panel.
struct PanelRaster {
  int panels, token_tiles, bunch;

  __host__ __device__ int64_t tiles() const { return int64_t{panels} * token_tiles; }
  __device__ void at(int tile, int& panel, int& tokens) const {
    const int of_bunch = tile % (bunch * panels), first = tile / (bunch * panels) * bunch;
    const int here = min(bunch, token_tiles - first);
    panel = of_bunch / here;
    tokens = first + of_bunch % here;
  }
};

struct PanelParams {
  CUtensorMap input;   // x  [tokens, K]
  CUtensorMap values;  // all blocks, one under the other
  CUtensorMap output;  // y  [tokens, M]
  PanelWalk walk;
  PanelRaster raster;
  const void* bias;  // [M] or null
  int features_m;
  int* next_tile;
};

template <class T, class Config, bool kTransposed>
class Panel {
  static constexpr int kCluster = Config::kCluster;
  static constexpr int kLines = Config::kLines;
  static constexpr int kGroupLines = Config::kGroupLines;

 public:
  using Shared = PanelShared<Config>;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;

  __device__ Panel(const PanelParams& params, Shared& shared)
      : params_(params), shared_(shared), rank_(cute::block_rank_in_cluster()) {}

  __device__ void run() {
    init();
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == kConsumers) {
      cutlass::arch::warpgroup_reg_dealloc<40>();
      const int warp = threadIdx.x / 32 % 4;
      if (warp == 0) load();
      if (warp == 1 && rank_ == 0) walk();
    } else {
      cutlass::arch::warpgroup_reg_alloc<232>();
      consume(warpgroup);
    }
    cute::cluster_arrive();  // nobody leaves while others may still write into it
    cute::cluster_wait();
  }

 private:
  __device__ void init() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Config::kStages; ++i) {
        ptx::init(ptx::address_of(&shared_.full[i]), 1);
        ptx::init(ptx::address_of(&shared_.empty[i]), kConsumers * 4 * kCluster);  // warps
      }
      for (int i = 0; i < Config::kSteps; ++i) {
        ptx::init(ptx::address_of(&shared_.step_full[i]), 1);
        ptx::init(ptx::address_of(&shared_.step_empty[i]), kCluster);
      }
      cutlass::arch::fence_barrier_init();
      for (int i = 0; i < Config::kSteps; ++i) {
        ptx::arrive_and_expect(ptx::address_of(&shared_.step_full[i]), sizeof(Step));
      }
    }
    cute::cluster_arrive();
    cute::cluster_wait();
  }

  // --- walker
  // -------------------------------------------------------------------------------------

  __device__ void walk() {
    const int lane = threadIdx.x % 32;
    const PanelWalk& w = params_.walk;
    const int tiles = static_cast<int>(params_.raster.tiles());
    int slot = 0;
    uint32_t parity = 1;
    auto emit = [&](int4 head, int row) {  // `row`: lane i has that of line i
      int4 rows;
      rows.x = __shfl_sync(~0u, row, 0);
      rows.y = __shfl_sync(~0u, row, 1);
      rows.z = kLines > 2 ? __shfl_sync(~0u, row, 2) : -1;
      rows.w = kLines > 3 ? __shfl_sync(~0u, row, 3) : -1;
      ptx::wait(ptx::address_of(&shared_.step_empty[slot]), parity);
      if (lane < 2 * kCluster) {  // half a step to each CTA
        const int rank = lane / 2, half = lane % 2;
        ptx::send(
            ptx::at_rank(ptx::address_of(&shared_.steps[slot]) + half * 16, rank),
            half == 0 ? make_int4(head.x, head.y + rank * Config::kTokens, head.z, head.w) : rows,
            ptx::at_rank(ptx::address_of(&shared_.step_full[slot]), rank));
      }
      if (++slot == Config::kSteps) {
        slot = 0;
        parity ^= 1;
      }
    };
    auto take = [&] {
      return __shfl_sync(~0u, lane == 0 ? atomicAdd(params_.next_tile, 1) : 0, 0);
    };
    for (int tile = take(), next; tile < tiles; tile = next) {
      next = take();
      int panel, tokens;
      params_.raster.at(tile, panel, tokens);
      const int token = tokens * kCluster * Config::kTokens;
      int entry = 0, end = 0, part = 0;
      if (lane < kLines) {
        const auto rows = w.at(panel * kLines + lane, Config::kLineRows);
        part = rows.part;
        if (rows.line >= 0) {
          entry = w.clamp(w.start[rows.line]);
          end = w.clamp(w.start[rows.line + 1]);
        }
      }
      auto cross = [&] { return entry < end ? w.cross[entry] : INT_MAX; };
      auto block = [&] { return entry >= end ? -1 : kTransposed ? w.perm[entry] : entry; };
      int mine = cross(), my_block = block();
      for (int now = __reduce_min_sync(~0u, mine), after = 0; after != INT_MAX; now = after) {
        const bool present = mine == now && now != INT_MAX;
        const int present_block = present ? my_block : -1;
        if (present) {
          ++entry;
          mine = cross();
          my_block = block();
        }
        after = __reduce_min_sync(~0u, mine);
        // Unsigned: a corrupt index may overflow. The copy engine reads zeros where there is
        // nothing.
        const unsigned first = static_cast<unsigned>(now) * w.block_k;
        const unsigned rows =
            static_cast<unsigned>(present_block) * (kTransposed ? w.block_k : w.block_m);
        for (int within = 0; within < w.block_k; within += Config::kSlab) {
          const bool last = after == INT_MAX && within + Config::kSlab >= w.block_k;
          emit(make_int4(panel, token, static_cast<int>(first + within), within * 2 + last),
               present_block < 0 ? -1 : static_cast<int>(rows + (kTransposed ? within : part)));
        }
      }
    }
    emit(make_int4(kEnd, 0, 0, 1), -1);
  }

  // --- loader
  // -------------------------------------------------------------------------------------

  __device__ void load() {
    const int lane = threadIdx.x % 32;
    const int parts = params_.walk.block_m / Config::kLineRows;
    int step_slot = 0, head = 0, tail = 0, in_flight = 0;
    int free = Config::kSlots, next_slot = 0;
    uint32_t step_parity = 0, empty_parity = 0;
    uint32_t taken = 0;  // slots of the stages in flight, four bits each, the newest lowest
    int panel = kNoPanel, part = 0;
    while (panel != kEnd) {
      const uint32_t step_full = ptx::address_of(&shared_.step_full[step_slot]);
      ptx::wait(step_full, step_parity);
      const Step step = shared_.steps[step_slot];
      __syncwarp();
      if (lane == 0) {
        ptx::arrive_and_expect(step_full, sizeof(Step));
        ptx::arrive_remote(ptx::at_rank(ptx::address_of(&shared_.step_empty[step_slot]), 0));
      }
      if (++step_slot == Config::kSteps) {
        step_slot = 0;
        step_parity ^= 1;
      }
      if (step.panel != panel) {
        panel = step.panel;
        part = (panel * kLines + lane) % parts * Config::kLineRows;
      }

      // The pieces go to the next slots, in the order of groups; the CTAs fetch them in turn. Where
      // one line of a group lacks the block, zeros come from outside of the array.
      uint32_t slots = 0;
      int count = 0, my_slot = -1, my_row = kNowhere;
#pragma unroll
      for (int g = 0; g < kConsumers; ++g) {
        bool present = false;
#pragma unroll
        for (int i = 0; i < kGroupLines; ++i) present |= step.row[g * kGroupLines + i] >= 0;
        int slot = next_slot + count;
        slot = slot < Config::kSlots ? slot : slot - Config::kSlots;
        slots |= (present ? slot : kAbsent) << (8 * g);
#pragma unroll
        for (int i = 0; i < kGroupLines; ++i) {
          const bool fetch = (count * kGroupLines + i) % kCluster == static_cast<int>(rank_);
          if (present && fetch && lane == g * kGroupLines + i) {
            my_slot = slot;
            if (step.row[lane] >= 0) my_row = step.row[lane];
          }
        }
        count += present;
      }
      while (in_flight == Config::kStages || free < count) {
        ptx::wait(ptx::address_of(&shared_.empty[tail]), empty_parity);
        if (++tail == Config::kStages) {
          tail = 0;
          empty_parity ^= 1;
        }
        --in_flight;
        free += taken >> (4 * in_flight) & 0xf;
      }
      if (lane == 0) {
        shared_.stages[head] = {panel, step.token, slots, step.within & 1};
        ptx::arrive_and_expect(ptx::address_of(&shared_.full[head]),
                               count ? Config::kInputBytes + count * Config::kPieceBytes : 0);
        if (count) {
          cute::SM90_TMA_LOAD_2D::copy(&params_.input, &shared_.full[head], kHint,
                                       shared_.input[head], step.column, step.token);
        }
      }
      __syncwarp();
      if (my_slot >= 0) {
        const int along = kTransposed ? part : step.within >> 1;
        unsigned char* to =
            shared_.pieces[my_slot] + lane % kGroupLines * (Config::kPieceBytes / kGroupLines);
        if constexpr (kCluster == 1) {
          cute::SM90_TMA_LOAD_2D::copy(&params_.values, &shared_.full[head], kHint, to, along,
                                       my_row);
        } else {
          cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&params_.values, &shared_.full[head],
                                                 (1 << kCluster) - 1, kHint, to, along, my_row);
        }
      }
      if (++head == Config::kStages) head = 0;
      ++in_flight;
      free -= count;
      next_slot += count;
      if (next_slot >= Config::kSlots) next_slot -= Config::kSlots;
      taken = taken << 4 | count;
    }
  }

  // --- consumers
  // ----------------------------------------------------------------------------------

  __device__ void consume(int warpgroup) {
    constexpr Major kMajorW = kTransposed ? Major::MN : Major::K;
    constexpr int kPieceRowBytes = (kTransposed ? Config::kLineRows : Config::kSlab) * 2;
    constexpr uint64_t kPiece = swizzled_operand<kPieceRowBytes>(
        kTransposed && kGroupLines > 1 ? Config::kPieceBytes / 2 : 16);
    constexpr uint64_t kInput = swizzled_operand<Config::kSlab * 2>();
    constexpr int kPieceStep = kTransposed ? kPieceRowBytes : 2;  // 16 elements along K

    const int lane = threadIdx.x % 32;
    const uint32_t release_at =
        ptx::at_rank(ptx::address_of(&shared_.empty[0]), lane < kCluster ? lane : 0);
    auto release = [&](int stage) {
      if (lane < kCluster) ptx::arrive_remote(release_at + stage * sizeof(uint64_t));
    };
    Store<T, Config::kLineRows, Config::kStoreTokens> store(
        &params_.output, shared_.output[warpgroup], warpgroup + 1);

    float sums[Config::kSums];
    int stage = 0;
    uint32_t parity = 0;
    while (true) {
#pragma unroll
      for (float& sum : sums) sum = 0;
      Stage what;
      int held = -1;  // the stage that is still being multiplied
      do {
        ptx::wait(ptx::address_of(&shared_.full[stage]), parity);
        what = shared_.stages[stage];
        // The same for all lanes, and ptxas has to see it: it serialises wgmma in divergent code.
        const uint32_t slot = __shfl_sync(~0u, what.slots, 0) >> (8 * warpgroup) & 0xff;
        if (slot != kAbsent) {
          const uint64_t input = kInput | descriptor_address(ptx::address_of(shared_.input[stage]));
          const uint64_t piece = kPiece | descriptor_address(ptx::address_of(shared_.pieces[slot]));
          cute::warpgroup_arrive();  // and commit, in the branch: ptxas serialises otherwise
#pragma unroll
          for (int k = 0; k < Config::kSlab / 16; ++k) {
            multiply<T, kMajorW, Major::K>(sums, piece + k * kPieceStep, input + k * 2, true);
          }
          cute::warpgroup_commit_batch();
        }
        // All but the youngest product is done. Where nothing was issued here, that one is of the
        // held stage, and must not be held on to while others wait for its room.
        cute::warpgroup_wait<1>();
        if (slot == kAbsent) cute::warpgroup_wait<0>();
        if (held >= 0) release(held);
        held = stage;
        if (++stage == Config::kStages) {
          stage = 0;
          parity ^= 1;
        }
      } while (!what.last);
      cute::warpgroup_wait<0>();
      release(held);
      if (what.panel == kEnd) break;
#pragma unroll
      for (float& sum : sums) cute::warpgroup_fence_operand(sum);
      int first[kGroupLines];  // row of M of each line, or -1
#pragma unroll
      for (int i = 0; i < kGroupLines; ++i) {
        const auto rows =
            params_.walk.at(what.panel * kLines + warpgroup * kGroupLines + i, Config::kLineRows);
        first[i] = rows.line < 0 ? -1 : rows.line * params_.walk.block_m + rows.part;
      }
      store.rows(sums, first, what.token, static_cast<const T*>(params_.bias), params_.features_m);
    }
    store.finish();
  }

  static constexpr int kNowhere = 0x7fffff00;  // a row outside of any array
  static constexpr int kNoPanel = -2;
  // x and W are read again and again; y, which passes by, must not push them out of L2.
  static constexpr uint64_t kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);

  const PanelParams& params_;
  Shared& shared_;
  const uint32_t rank_;
};

template <class T, class Config, bool kTransposed>
__global__ void __launch_bounds__(Panel<T, Config, kTransposed>::kThreads, 1)
    panel_kernel(const __grid_constant__ PanelParams params) {
  extern __shared__ __align__(1024) unsigned char raw[];
  using Kernel = Panel<T, Config, kTransposed>;
  Kernel(params, *reinterpret_cast<typename Kernel::Shared*>(raw)).run();
}

}  // namespace block_sparse::cuda::sm90
