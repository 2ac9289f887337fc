// What a panel kernel is given, how large its tiles are, what its warps share and send each other,
// and which tile is where. What each role does with it is not here: panel.cuh.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include <cstdint>

#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/store.cuh"

namespace block_sparse::cuda::sm90 {

constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2;  // warpgroups, each with a group of 64 rows of M
constexpr int kPanelThreads = (kConsumers + 1) * kWarpgroup;
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
  static constexpr uint32_t kInputBytes = kTokens * kSlab * 2;  // at most
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

  // Steps come from another CTA, as bytes that the barrier counts; alone, the walker arrives.
  __device__ void expect_step(int slot) {
    if constexpr (Config::kCluster > 1) {
      ptx::arrive_and_expect(ptx::address_of(&step_full[slot]), sizeof(Step));
    }
  }

  __device__ void init_barriers() {
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::init(ptx::address_of(&full[i]), 1);
      ptx::init(ptx::address_of(&empty[i]), kConsumers * 4 * Config::kCluster);  // warps
    }
    for (int i = 0; i < Config::kSteps; ++i) {
      ptx::init(ptx::address_of(&step_full[i]), 1);
      ptx::init(ptx::address_of(&step_empty[i]), Config::kCluster);
    }
    cutlass::arch::fence_barrier_init();
    for (int i = 0; i < Config::kSteps; ++i) expect_step(i);
  }
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
  const void* bias;      // [M] or null
  const float* factors;  // factors.cuh; null: none
  int features_m;
  int tokens;
  int tile_tokens;  // of one CTA: at most kTokens
  int* next_tile;
};

}  // namespace block_sparse::cuda::sm90
