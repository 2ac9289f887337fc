// The strip kernel of Ampere: its configurations, what it is told, its shared memory, and which
// tile comes when. What it does is told in strip.cuh.
#pragma once

#include <cstdint>

#include "cuda/sm80/ptx.cuh"

namespace block_sparse::cuda::sm80 {

constexpr int kWarp = 32;

// A tile is 128 tokens x 256 outputs, 32 x 64 for each warp that multiplies. The four warps of a
// scheduler (w, w + 4, ...) have the four quarters of the outputs, and all schedulers the same:
// whatever the pattern, they have equal work. (Half as many warps of 32 x 128 take as long.)
constexpr int kTokenGroups = 4, kOutputGroups = 4;
constexpr int kMultipliers = kTokenGroups * kOutputGroups;  // warps
// The other warps load: two x, and two the pieces of half of the outputs each.
constexpr int kHalves = 2, kXLoaders = 2;
constexpr int kHalfGroups = kOutputGroups / kHalves;
constexpr int kLoaders = kXLoaders + kHalves;
constexpr int kThreads = (kMultipliers + kLoaders) * kWarp;
constexpr int kWarpTokens = 32, kWarpOutputs = 64;
constexpr int kTileTokens = kTokenGroups * kWarpTokens;
constexpr int kTileOutputs = kOutputGroups * kWarpOutputs;

// x comes in stages that are one line of 128 bytes deep.
constexpr int kStageDepth = 64;
constexpr int kXBytes = kTileTokens * kStageDepth * 2;
constexpr int kMaxStages = 8;  // two at least

// A block is multiplied in pieces; the sides are named as the product sees them. Outputs are cut
// into strips as wide as a piece.
template <int outputs, int depth>
struct Piece {
  static constexpr int kOutputs = outputs;  // 32 or 16
  static constexpr int kDepth = depth;      // 32 or 16
  static constexpr int kBytes = outputs * depth * 2;
  static constexpr int kParts = kStageDepth / depth;  // of a stage
  static constexpr int kStrips = kTileOutputs / outputs;
  static constexpr int kWarpStrips = kWarpOutputs / outputs;
  // The pieces of a stage for half of the outputs are the bits of a word: those of each warp, by
  // part of the depth, then by strip.
  static constexpr int kWarpBits = kParts * kWarpStrips;
  static_assert(kHalfGroups * kWarpBits <= 32);
  static constexpr int bit(int strip, int part) {  // strip: of the half
    return strip / kWarpStrips * kWarpBits + part * kWarpStrips + strip % kWarpStrips;
  }
  static constexpr int part(int bit) { return bit % kWarpBits / kWarpStrips; }
};

// Each half of the outputs has a ring of pieces: two stages with all blocks present, eight at
// density 0.25. With two stages of x it all fits the 99 KB that a multiprocessor of 8.6 or 8.9
// gives.
constexpr int kRingBytes = 32 << 10;
template <class Piece>
constexpr uint32_t kRing = kRingBytes / Piece::kBytes;  // pieces

// A stage of a panel, as strip_plan.cuh writes it down once for all tokens.
struct alignas(16) PlannedStage {
  int depth;    // of the stage along the sum, in stages
  int sources;  // the first of its pieces' sources: those of one half, then of the other
  uint32_t masks[kHalves];  // which pieces there are
};
// Where a piece lies in the values is counted in rows of the narrowest one.
constexpr int kSourceUnit = 16;

struct Plan {
  PlannedStage* stages;  // [panels, depth_stages]
  int32_t* counts;       // [panels]: of the stages that have pieces
  int32_t* sources;      // [size]
  int depth_stages, size;
};

struct StageState {
  uint64_t full, empty;     // barriers
  uint32_t masks[kHalves];  // which pieces there are
};
struct Shared {
  char weights[kHalves][kRingBytes];
  char stages[];  // of x, then their barriers
};
constexpr int shared_bytes(int stages) {
  return static_cast<int>(sizeof(Shared) + stages * (kXBytes + sizeof(StageState)));
}
constexpr int stages_in(int bytes) {
  constexpr int kFixed = static_cast<int>(sizeof(Shared));
  const int stages = (bytes - kFixed) / static_cast<int>(kXBytes + sizeof(StageState));
  return stages < kMaxStages ? stages : kMaxStages;
}

struct StripArgs {
  const void* x;  // dy, in grad_input
  const void* values;
  const void* bias;  // or null
  void* y;
  int64_t x_stride, y_stride;
  // The index as the product walks it: by block row, or by block column.
  const int32_t* begin;   // [lines + 1]
  const int32_t* line;    // [nnz]
  const int32_t* number;  // [nnz], or null: in order
  int64_t block_size;     // elements
  int nnz;
  int pitch;  // elements between the rows of a block in memory
  int tokens, outputs, depth;
  int lines, depth_lines;   // blocks along the outputs and along the depth
  int strips, block_depth;  // of a block
  int panels, token_tiles;
  int stages;  // of the ring
  Plan plan;
};

struct TilePlace {
  int panel, token_tile;
};

// Some token tiles at a time, so that x stays in L2 while all of W goes by; panels outside, so that
// CTAs side by side share W.
__device__ inline TilePlace place_of(const StripArgs& args, int tile) {
  constexpr int kGroup = 8;
  const int per_group = kGroup * args.panels;
  const int first = tile / per_group * kGroup, rest = tile % per_group;
  const int size = min(kGroup, args.token_tiles - first);
  return {rest / size, first + rest % size};
}

// A position in the ring of stages, as 32-bit addresses.
class StageRing {
 public:
  __device__ StageRing(const Shared& shared, int stages)
      : x_(ptx::address_of(shared.stages)), states_(x_ + stages * kXBytes), stages_(stages) {}

  __device__ void init() const {  // by one thread
    for (StageRing ring = *this; ring.phase_ == 0; ring.advance()) {
      // The copies of all lanes that load, and the masks.
      ptx::init(ring.full(), kLoaders * kWarp + kHalves);
      ptx::init(ring.empty(), kMultipliers);
    }
  }
  __device__ uint32_t x() const { return x_ + at_ * kXBytes; }
  __device__ uint32_t full() const { return states_ + at_ * static_cast<int>(sizeof(StageState)); }
  __device__ uint32_t empty() const { return full() + 8; }
  __device__ uint32_t masks() const { return full() + 16; }
  __device__ int at() const { return at_; }
  __device__ uint32_t phase() const { return phase_; }
  __device__ void advance() {
    if (++at_ < stages_) return;
    at_ = 0;
    phase_ ^= 1;
  }

 private:
  const uint32_t x_, states_;
  const int stages_;
  int at_ = 0;
  uint32_t phase_ = 0;
};

// Where 16 bytes of a piece lie in its slot. Rows are shorter than the 128 bytes of all banks, so
// that some of them share a swizzle.
template <int kChunks>
__device__ constexpr uint32_t place_in_piece(int row, int chunk) {
  return (row * kChunks + (chunk ^ (row / (8 / kChunks) % kChunks))) * 16;
}

// Calls begin(place, first stage) for each tile of this CTA, and step(stage, next stage) for each
// of its stages; a stage that there is not has no pieces.
template <class Begin, class Step>
__device__ __forceinline__ void for_stages(const StripArgs& args, const Begin& begin,
                                           const Step& step) {
  for (int tile = blockIdx.x; tile < args.panels * args.token_tiles; tile += gridDim.x) {
    const TilePlace place = place_of(args, tile);
    const PlannedStage* stages = args.plan.stages + int64_t{place.panel} * args.plan.depth_stages;
    const int count = __ldg(args.plan.counts + place.panel);
    const auto stage_at = [&](int i) -> PlannedStage {
      if (i >= count) return {};
      const int4 words = __ldg(reinterpret_cast<const int4*>(stages + i));
      return {words.x, words.y, {static_cast<uint32_t>(words.z), static_cast<uint32_t>(words.w)}};
    };
    PlannedStage stage = stage_at(0), next = stage_at(1);
    begin(place, stage);
    for (int i = 0; i < count; ++i) {
      const PlannedStage after = stage_at(i + 2);  // on its way
      step(stage, next);
      stage = next;
      next = after;
    }
  }
}

}  // namespace block_sparse::cuda::sm80
