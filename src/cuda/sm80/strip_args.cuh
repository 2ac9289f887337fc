// The strip kernel of Ampere: its configurations, what it is told, its shared memory, and which
// tile comes when. What it does is told in strip.cuh.
#pragma once

#include <cstdint>

#include "cuda/sm80/ptx.cuh"

namespace block_sparse::cuda::sm80 {

constexpr int kWarp = 32;
constexpr int kNone = 0x7fffffff;

// A tile is 128 tokens x 256 outputs, 32 x 128 for each warp that multiplies. Both warps of a
// scheduler (warps w and w + 4) have different outputs, and all schedulers the same: whatever the
// pattern, they have equal work.
constexpr int kTokenGroups = 4, kOutputGroups = 2;
constexpr int kMultipliers = kTokenGroups * kOutputGroups;  // warps
// The other warps: one finds what is to be loaded (strip_walk.cuh), and the rest load it
// (strip_load.cuh): about as much of x as of W at density 0.25, counted in copies.
constexpr int kXLoaders = 2, kWeightLoaders = 1;
constexpr int kLoaders = kXLoaders + kWeightLoaders;
constexpr int kThreads = (kMultipliers + 1 + kLoaders) * kWarp;
constexpr int kWarpTokens = 32, kWarpOutputs = 128;
constexpr int kTileTokens = kTokenGroups * kWarpTokens;
constexpr int kTileOutputs = kOutputGroups * kWarpOutputs;

// x comes in stages that are one line of 128 bytes deep.
constexpr int kStageDepth = 64;
constexpr int kXBytes = kTileTokens * kStageDepth * 2;
constexpr int kMinStages = 2, kMaxStages = 8;

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
  static_assert(kWarp % kStrips == 0, "the walking warp has some lanes for each strip");
  static_assert(kParts * kWarpStrips <= 32, "a stage's pieces are the bits of a word");
};

// Each half of the outputs has a ring of pieces: two stages with all blocks present, eight at
// density 0.25. With two stages of x it all fits the 99 KB that a multiprocessor of 8.6 or 8.9 gives.
constexpr int kRingBytes = 32 << 10;
template <class Piece>
constexpr uint32_t kRing = kRingBytes / Piece::kBytes;  // pieces

// The walk plans so many stages at once: a warp has the time for that. What it then knows of the
// pieces waits in a queue, beside that of all the slots of a ring.
constexpr int kBatch = 4;
template <class Piece>
constexpr uint32_t kQueue = 4 * kRing<Piece>;
constexpr int kMaxQueue = kQueue<Piece<16, 16>>;
// Where a piece lies in the values is counted in rows of the narrowest one.
constexpr int kSourceUnit = 16;

// What a stage holds, as the walk found it, for half of the outputs.
struct StageWork {
  int depth;      // of the stage along the sum, in stages; kNone: the tile has ended
  uint32_t mask;  // bit part * kWarpStrips + strip: there is a piece; in this order in the ring
};

struct StagePlace {
  uint64_t planned, full, empty;  // barriers: the work is known; x and W are there; all was read
  StageWork work[kOutputGroups];
  uint64_t unused;
};
struct Shared {
  char weights[kOutputGroups][kRingBytes];
  int32_t sources[kOutputGroups][kMaxQueue];
  uint32_t masks[kBatch][kOutputGroups];
  char stages[];  // of x, then their places
};
constexpr int shared_bytes(int stages) {
  return static_cast<int>(sizeof(Shared) + stages * (kXBytes + sizeof(StagePlace)));
}
constexpr int stages_in(int bytes) {
  constexpr int kFixed = static_cast<int>(sizeof(Shared));
  const int stages = (bytes - kFixed) / static_cast<int>(kXBytes + sizeof(StagePlace));
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
  int pitch;                // elements between the rows of a block in memory
  int tokens, outputs, depth;
  int lines, depth_lines;   // blocks along the outputs and along the depth
  int strips, block_depth;  // of a block
  int panels, token_tiles;
  int stages;
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

// A position in the ring of stages.
class StageRing {
 public:
  __device__ StageRing(Shared& shared, int stages)
      : x_(shared.stages),
        places_(reinterpret_cast<StagePlace*>(shared.stages + stages * kXBytes)),
        stages_(stages) {}

  __device__ void init() const {  // by one thread
    for (int i = 0; i < stages_; ++i) {
      ptx::init(ptx::address_of(&places_[i].planned), 1);
      ptx::init(ptx::address_of(&places_[i].full), kLoaders * kWarp);
      ptx::init(ptx::address_of(&places_[i].empty), kMultipliers);
    }
  }
  __device__ uint32_t x() const { return ptx::address_of(x_ + at_ * kXBytes); }
  __device__ StageWork& work(int group) const { return places_[at_].work[group]; }
  __device__ uint32_t planned() const { return ptx::address_of(&places_[at_].planned); }
  __device__ uint32_t full() const { return ptx::address_of(&places_[at_].full); }
  __device__ uint32_t empty() const { return ptx::address_of(&places_[at_].empty); }
  __device__ int at() const { return at_; }
  __device__ uint32_t phase() const { return phase_; }
  __device__ void advance() {
    if (++at_ < stages_) return;
    at_ = 0;
    phase_ ^= 1;
  }

 private:
  char* const x_;
  StagePlace* const places_;
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

}  // namespace block_sparse::cuda::sm80
