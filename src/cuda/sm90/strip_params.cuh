// What a strip kernel is given, what its warps share, and which tile is where. No loops.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/sm90/ptx.cuh"
#include "cuda/sm90/split.h"

namespace block_sparse::cuda::sm90::strips {

constexpr uint32_t kAllLanes = 0xffffffffu;

// In words: nobody says that an index is aligned to more.
__device__ inline StageRecord read(const StageRecord* record) {
  return {__ldg(&record->depth), __ldg(&record->first), __ldg(&record->work)};
}

// The order of the tiles: tokens in groups, inside a group the panels (cluster by cluster),
// innermost the tokens of the group. So the x of a group stays in L2.
struct Raster {
  int panel_clusters;
  int token_tiles;
  int group;  // token tiles

  struct Place {
    int panel_cluster;
    int token_tile;
  };

  __device__ Place at(int tile) const {
    const int per_group = group * panel_clusters;
    const int first = tile / per_group * group, inside = tile % per_group;
    const int tokens = min(group, token_tiles - first);
    return {inside / tokens, first + inside % tokens};
  }
};

struct Params {
  CUtensorMap x;
  CUtensorMap values;
  // The walk (strip_walk.h).
  const Span* spans;
  const int32_t* firsts;
  const int32_t* counts;
  const StageRecord* records;
  const uint32_t* items;
  const int32_t* pieces;
  int item_capacity;
  int piece_capacity;
  // Where the outputs of each row of a tile are.
  const int32_t* order;
  int lines;
  int places;  // of lines in `order`, and none in the last few
  int log_line_parts;
  int piece_outputs;

  const void* bias;
  const float* factors;  // factors.cuh; null: none
  void* output;
  int64_t output_stride;
  int tokens;
  int outputs;
  int stages;       // of all of the depth
  int tile_tokens;  // no more than a tile has room for
  Raster raster;
  Split split;
  float4* parts;  // sums of the parts, as the lanes have them: [piece, rank, strip, eight, lane]
};

// What a kernel does next, and the tokens of its tiles. One that is not flexible knows the most of
// it when it is compiled: of long sums over large tiles, a tenth of the time.
template <Config kConfig>
__device__ Task task_of(const Params& params, int task) {
  if constexpr (kConfig.flexible) {
    return Task(params.split, task);
  } else {
    return Task(task);
  }
}
template <Config kConfig>
__device__ int tasks_of(const Params& params) {
  return kConfig.flexible ? params.split.tasks() : params.split.tiles;
}
template <Config kConfig>
__device__ int tile_tokens_of(const Params& params) {
  return kConfig.flexible ? params.tile_tokens : kConfig.tile.tokens;
}

// Where the sums of a strip's first eight tokens are, those of this lane; for each eight more it is
// 32 further. `strips`: of a CTA.
__device__ inline float4* sums_of_part(const Params& params, int piece, int rank, int strip,
                                       int strips, int lane) {
  const int at = (piece * kCluster + rank) * strips + strip;
  return params.parts + int64_t{at} * (params.tile_tokens / 8 * 32) + lane;
}

// The stages of a tile, from what `counts` has for its cluster: both CTAs get the same, whatever
// the walk says.
__device__ inline int stages_of(const Params& params, int32_t count) {
  return min(max(count, 0), params.stages);
}

// Which line the row of pieces at a place is a part of; as it is read, so anything if there is
// none.
__device__ inline int line_at(const Params& params, int place) {
  const int order_place = place >> params.log_line_parts;
  return order_place < params.places ? __ldg(params.order + order_place) : -1;
}

// Its first output; `outputs` if there is no such line.
__device__ inline int first_output(const Params& params, int place, int line) {
  if (line < 0 || line >= params.lines) return params.outputs;
  const int part = place & ((1 << params.log_line_parts) - 1);
  return ((line << params.log_line_parts) + part) * params.piece_outputs;
}

// Warps meet at `full` and `empty` of each stage of x, and pairs of them, when they store, at named
// barriers (strip_store.cuh). W lies in a ring of its own that is freed with the stages.
template <Config kConfig>
struct alignas(1024) Shared {
  using Size = Sizes<kConfig>;
  static constexpr int kStages = kConfig.tile.stages;

  unsigned char x[kStages][kConfig.tile.stage_bytes()];
  unsigned char w[Size::kRing + 1][Size::kPieceBytes];  // the last one is zero: an absent piece
  // Of each warp, where a list is not of its items alone.
  static constexpr int kPickers =
      kConfig.tile.list_groups > kConfig.tile.groups ? kConfig.tile.warpgroups * 4 : 1;
  uint32_t picked[kPickers][32];
  // Results on their way out: of the warps that have a piece, two buffers.
  static constexpr int kPairs =
      kConfig.tile.warpgroups * 4 / (kConfig.piece.outputs / kWarpOutputs);
  alignas(128) unsigned char staging[kPairs][2][Size::kStagingBytes];
  uint64_t full[kStages];
  uint64_t empty[kStages];

  __device__ void init_barriers() {
    for (int i = 0; i < kStages; ++i) {
      ptx::init(ptx::address_of(&full[i]), 2);  // x; W
      ptx::init(ptx::address_of(&empty[i]), kCluster * kConfig.tile.warpgroups * 4);
    }
  }
};

constexpr int kMaxSharedBytes = 232448;

// A place in the ring of stages, and the parity of this lap around it.
template <int kStages>
struct Cursor {
  uint32_t slot = 0;
  uint32_t lap = 0;

  __device__ void advance(uint32_t by = 1) {
    const bool around = slot + by >= kStages;  // no branch: it would cost more than all of this
    slot += around ? by - kStages : by;
    lap ^= around;
  }
};

}  // namespace block_sparse::cuda::sm90::strips
