// What the resident kernel is given, what its warps share and send each other, and which lines of
// the output a team computes. What each role does with it is not here: resident.cuh.
#pragma once

#include <cuda.h>
#include <cutlass/arch/barrier.h>

#include <algorithm>
#include <cstdint>

#include "cuda/sm90/ptx.cuh"

namespace block_sparse::cuda::sm90::resident_product {

constexpr int kWarpgroup = 128;
constexpr int kTeams = 4;  // a warpgroup each
constexpr int kThreads = (kTeams + 1) * kWarpgroup;
constexpr int kHalfTokens = 64;  // the M of a wgmma
constexpr int kSlab = 64;        // of x, along K: 128 bytes
constexpr int kMaxStagePieces = 4;

// Halves of up to 64 tokens of a CTA, bytes of the rings for W; outputs of a line, depth of a piece
// of W.
template <int kHalves_, int kRingBytes_, int kWidth_, int kDepth_>
struct Config {
  static constexpr int kHalves = kHalves_;
  static constexpr int kWidth = kWidth_;
  static constexpr int kDepth = kDepth_;

  static constexpr int kPieceBytes = kWidth * kDepth * 2;
  static constexpr int kStagePieces = std::clamp(2048 / kPieceBytes, 1, kMaxStagePieces);
  static constexpr int kStageBytes = kPieceBytes * kStagePieces;
  static constexpr int kStages = std::min(kRingBytes_ / kTeams / kStageBytes, 8);
  static_assert(kStages >= 2);
};

// The M side of the pattern: block rows for forward, block columns for grad_input.
struct Walk {
  const int32_t* start;  // [rows + 1]
  const int32_t* cross;  // [nnz] block index along K, ascending within a row
  const int32_t* perm;   // [nnz] block number, or null: the entry itself
  int nnz;
  int rows;
  int block_m, block_k;
  int parts_m, parts_k;  // lines, and pieces of each of them, of a block

  // A corrupt index reads nothing outside.
  __device__ int first(int row) const { return min(max(start[row], 0), nnz); }
};

struct Params {
  CUtensorMap input;   // x  [tokens, K]
  CUtensorMap values;  // all blocks, one under the other
  Walk walk;
  int slabs;         // of x
  int splits;        // CTAs that share the lines of the same tokens
  const void* bias;  // [M] or null
  void* output;      // y [tokens, M]
  int64_t output_stride;
  int features_m;
  int tokens;
  int tile_tokens;  // of a CTA, a multiple of 8

  __device__ int slab_bytes() const { return tile_tokens * kSlab * 2; }
};

// What a stage holds, for the consumers. A stage is always full: in place of pieces that a line
// does not have there are zeros.
struct alignas(16) Stage {
  int line;  // or kEnd
  int kind;
  uint32_t offsets[kMaxStagePieces / 2];  // where x of each piece is among the slabs: 16 bits each,
                                          // in 16 bytes

  __device__ uint32_t offset(int piece) const {
    return offsets[piece / 2] >> (piece % 2 * 16) & 0xffff;
  }
};
constexpr int kEnd = -1;
constexpr int kMore = 0, kLast = 1;  // of the line
constexpr int kEmptyLine = 2;        // it has no blocks, so this is all of it

// Of up to 32 outputs in the order in which memory has them, those that a thread gets as sums are
// to be neighbours, so that it stores them at once. Where rows of W lie along its outputs, the copy
// engine brings them in the order that makes it so: row 8 j + 2 q + t of a piece is output
// kNeighbours q + 2 j + t, for lane q of a quad.
template <int kWidth>
struct Order {
  static constexpr int kOutputs = std::min(kWidth, 32);
  static constexpr int kNeighbours = kOutputs / 4;
};

template <class Config>
struct alignas(1024) Shared {
  unsigned char pieces[kTeams][Config::kStages][Config::kStageBytes];
  Stage stages[kTeams][Config::kStages];
  uint64_t full[kTeams][Config::kStages], empty[kTeams][Config::kStages];
  uint64_t input_full;
  int next_row, end_row;  // of the CTA's share

  __device__ void init_barriers() {
    for (int team = 0; team < kTeams; ++team) {
      for (int i = 0; i < Config::kStages; ++i) {
        ptx::init(ptx::address_of(&full[team][i]), 1);
        ptx::init(ptx::address_of(&empty[team][i]), 4);  // warps
      }
    }
    ptx::init(ptx::address_of(&input_full), 1);
    cutlass::arch::fence_barrier_init();
  }
};

}  // namespace block_sparse::cuda::sm90::resident_product
