// The strip kernel of Ampere: its configurations, what it is told, its shared memory, and which
// tile comes when. What it does is told in strip.cuh.
#pragma once

#include <cstdint>

#include "cuda/sm80/ptx.cuh"

namespace block_sparse::cuda::sm80 {

constexpr int kWarp = 32;

// A tile is 128 tokens x 256 outputs, 64 x 64 for each warp that multiplies. (Twice as many warps
// of 32 x 64 spend as much again on what each has to find out in a stage.)
constexpr int kTokenGroups = 2, kOutputGroups = 4;
constexpr int kMultipliers = kTokenGroups * kOutputGroups;  // warps
// The other warps load: each one all that belongs to every fourth stage, so that what a stage takes
// to find out is spent by one of them.
constexpr int kLoaders = 4;
constexpr int kHalves = 2;  // of the outputs, in what is planned
constexpr int kThreads = (kMultipliers + kLoaders) * kWarp;
constexpr int kWarpTokens = 64, kWarpOutputs = 64;
constexpr int kTileTokens = kTokenGroups * kWarpTokens;
constexpr int kTileOutputs = kOutputGroups * kWarpOutputs;

// The sum goes in stages that are one line of 128 bytes of x deep. A stage has room for half of the
// blocks that there can be; where more are present, they come in two stages, with half of the depth
// each.
constexpr int kStageDepth = 64;
constexpr int kXBytes = kTileTokens * kStageDepth * 2;
constexpr int kWeightBytes = kTileOutputs * kStageDepth * 2 / 2;
constexpr int kStageBytes = kXBytes + kWeightBytes;

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
  static constexpr int kRoom = kWeightBytes / kBytes;  // pieces of a stage
  static_assert(kRoom == kStrips * kParts / 2 && kRoom <= kWarp);
  // The pieces of a stage for half of the outputs are the bits of a word: those of each warp, by
  // part of the depth, then by strip.
  static constexpr int kWarpBits = kParts * kWarpStrips;
  static constexpr uint32_t kWarpMask = ~0u >> (32 - kWarpBits);
  static constexpr int kHalfGroups = kOutputGroups / kHalves;
  static_assert(kHalfGroups * kWarpBits <= 32);
  static constexpr int bit(int strip, int part) {  // strip: of the half
    return strip / kWarpStrips * kWarpBits + part * kWarpStrips + strip % kWarpStrips;
  }
  static constexpr int part(int bit) { return bit % kWarpBits / kWarpStrips; }
  // Those in the first half of the depth.
  static constexpr uint32_t kShallow = [] {
    uint32_t bits = 0;
    for (int i = 0; i < kHalfGroups * kWarpBits; ++i) {
      if (i % kWarpBits < kWarpBits / 2) bits |= 1u << i;
    }
    return bits;
  }();
};

// A stage of a panel, as strip_plan.cuh writes it down once for all tokens.
struct alignas(16) PlannedStage {
  int depth;    // where it begins along the sum, in multiples of kStageDepth
  int sources;  // the first of its pieces' sources: those of one half, then of the other
  uint32_t masks[kHalves];  // which pieces there are
};
// Where a piece lies in the values is counted in rows of the narrowest one.
constexpr int kSourceUnit = 16;

struct Plan {
  PlannedStage* stages;  // [panels, 2 * depth_stages]
  int32_t* counts;       // [panels]: of the stages that have pieces
  int32_t* sources;      // [size]
  int depth_stages, size;
};

struct StageState {
  uint64_t full, empty;     // barriers
  uint32_t masks[kHalves];  // which pieces there are
};
constexpr int shared_bytes(int stages) {
  return stages * static_cast<int>(kStageBytes + sizeof(StageState));
}
constexpr int stages_in(int bytes) { return bytes / shared_bytes(1); }

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
  __device__ StageRing(const char* shared, int stages) : stages_(stages) {
    // Opaque, or the compiler finds the address anew in each stage.
    asm volatile("mov.b32 %0, %1;" : "=r"(x_) : "r"(ptx::address_of(shared)));
    full_ = x_ + stages * kStageBytes;
  }

  __device__ void init() const {  // by one thread
    for (StageRing ring = *this; ring.phase_ == 0; ring.advance(1)) {
      // The copies of all lanes of one warp, and the masks.
      ptx::init(ring.full(), kWarp + 1);
      ptx::init(ring.empty(), kMultipliers);
    }
  }
  __device__ uint32_t x() const { return x_; }
  __device__ uint32_t weights() const { return x_ + kXBytes; }
  __device__ uint32_t full() const { return full_; }
  __device__ uint32_t empty() const { return full_ + 8; }
  __device__ uint32_t masks() const { return full_ + 16; }
  __device__ uint32_t phase() const { return phase_; }
  __device__ void advance(int by) {
    move(by);
    while (at_ >= stages_) {
      move(-stages_);
      phase_ ^= 1;
    }
  }

 private:
  __device__ void move(int by) {
    at_ += by;
    x_ += by * kStageBytes;
    full_ += by * static_cast<int>(sizeof(StageState));
  }

  const int stages_;
  int at_ = 0;
  uint32_t x_, full_;
  uint32_t phase_ = 0;
};

// Where 16 bytes of a piece lie in its slot. Rows are shorter than the 128 bytes of all banks, so
// that some of them share a swizzle.
template <int kChunks>
__device__ constexpr uint32_t place_in_piece(int row, int chunk) {
  return (row * kChunks + (chunk ^ (row / (8 / kChunks) % kChunks))) * 16;
}

}  // namespace block_sparse::cuda::sm80
