// The sampled product's kernel: what it is told, its shared memory, and how it reads tiles. Device
// code; the kernel itself is in sampled.cuh.
#pragma once

#include "cuda/sm90/schedule.h"
#include "cuda/sm90/tiles.h"

namespace block_sparse::cuda::sm90::sampled_product {

constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kProducerWarps = 4;  // one warp alone cannot issue copies fast enough
constexpr int kStages = 4;
constexpr int kUnitBytes = kStepTokens * 2;  // of one feature in one stage
constexpr int kOutBytes = kTileOut * kUnitBytes;
constexpr int kStageBytes = kOutBytes + kTileIn * kUnitBytes;
// x is read in the order of retile.cuh for units up to so many inputs.
constexpr int kMaxRetiledUnit = 16;
// Of a consumer's thread: 64 outputs x a slice of the tile's 256 inputs, over a warpgroup.
constexpr int sums_of(int slices) { return 128 / slices; }

struct SampledShared {
  alignas(1024) char stages[kStages][kStageBytes];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint32_t arrived[2];  // parts of what is split, as each consumer warpgroup has counted them
};
constexpr int kSharedBytes = sizeof(SampledShared) + 1024;  // to align it

struct SampledArgs {
  Tiling tiling;
  const int32_t* tiles;
  const uint16_t* retiled;  // x as retile.cuh orders it, for narrow units
  int64_t retiled_cols;
  void* values;
  const float* factors;  // factors.cuh; null: none
  int64_t nnz, block_out, block_in;
  int steps;
  float4* partials;    // of the parts of what is split
  uint32_t* counters;  // zero: two for each slice that is split
};

// The tiles' array, read with what is corrupt clamped.
struct TileReader {
  const SampledArgs& args;

  __device__ int count() const {
    return static_cast<int>(min(max(int64_t{args.tiles[0]}, int64_t{0}), args.tiling.capacity));
  }
  __device__ const int32_t* record(int tile) const {
    const Tiling& t = args.tiling;
    const int64_t at = args.tiles[t.order_at + tile];
    return args.tiles + t.records_at + min(max(at, int64_t{0}), t.capacity - 1) * t.record_size;
  }
  __device__ uint32_t unit(const int32_t* record, int i) const {
    return static_cast<uint32_t>(record[1 + args.tiling.mask_words + i / 2]) >> i % 2 * 16 &
           kNoUnit;
  }
};

}  // namespace block_sparse::cuda::sm90::sampled_product
