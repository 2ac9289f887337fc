// The strip kernels: which there are, how large their tiles are, and what follows from that. What a
// strip kernel does is told in strip.cuh. No device code.
#pragma once

#include <cstdint>

#include "block_sparse/dtype.h"

namespace block_sparse::cuda::sm90::strips {

// One wgmma computes 64 tokens x 32 outputs (a strip), 16 of the depth at a time. Its second
// operand is read from shared memory at 64 bytes a clock, half of what there is, whatever its
// width; 32 is the narrowest that keeps the tensor cores busy (16 reaches 63 %).
constexpr int kStripOutputs = 32;
constexpr int kWarpgroupTokens = 64;
constexpr int kStepDepth = 16;

// A stage of the ring of x: 64 of the depth are 128 bytes a token, one row of the widest swizzle.
constexpr int kStageDepth = 64;

// A block is multiplied in pieces, since 64- and 128-wide blocks are then several narrower ones.
// The sides are named as the product sees them: outputs x depth. In memory a piece is
// outputs x depth (forward) or, `transposed`, depth x outputs (grad_input).
struct Piece {
  int outputs;  // 32, or 16: then two block rows share a strip, zeros where one has no block
  int depth;    // 32 or 16
  bool transposed;
};

struct Tile {
  int warpgroups;  // consumers, 64 tokens each
  int strips;      // 16 accumulators a thread each
  int stages;      // of x; even, since two warps take turns at filling them
  int ring;        // strips of W, one piece deep, in shared memory; at least two full stages
  int cluster;     // CTAs with the same tokens, other strips: each loads a part of x for all
  int in_flight;   // strips of a half stage that may be under way when the next x is read
};

// Bytes from L2 are scarce: a tile loads tokens x 128 of x (less by the cluster) and
// strips x 4096 x density of W per stage, so it should be about square at the density that matters.
// 128 tokens x 352 outputs are the most that the registers hold.
constexpr Tile tile_of(Piece piece) {
  return {.warpgroups = 2,
          .strips = 11,
          .stages = 8,
          .ring = piece.depth == 32 ? 44 : 88,
          .cluster = 2,
          .in_flight = 2};
}

struct Config {
  Dtype dtype;
  Piece piece;
  Tile tile;
};

template <Config kConfig>
struct Sizes {
  static constexpr Piece kPiece = kConfig.piece;
  static constexpr Tile kTile = kConfig.tile;

  static constexpr int kRowsPerStrip = kStripOutputs / kPiece.outputs;
  static constexpr int kRows = kTile.strips * kRowsPerStrip;   // rows of pieces of a tile
  static constexpr int kColumns = kStageDepth / kPiece.depth;  // columns of pieces of a stage
  static constexpr int kPieces = kRows * kColumns;             // at most, per stage
  static constexpr int kTokens = kTile.warpgroups * kWarpgroupTokens;

  static constexpr int kPieceBytes = kPiece.outputs * kPiece.depth * 2;
  static constexpr int kStripBytes = kPieceBytes * kRowsPerStrip;
  static constexpr int kXBytes = kTokens * kStageDepth * 2;  // per stage
  // A row of a piece in memory is as wide as its swizzle: ldmatrix, wgmma and the copy engine meet
  // every bank once.
  static constexpr int kSwizzleBytes = (kPiece.transposed ? kPiece.outputs : kPiece.depth) * 2;

  // Warpgroups of 128 threads: the consumers, then one of producers.
  static constexpr int kThreads = (kTile.warpgroups + 1) * 128;
  static constexpr int kConsumerRegisters = kTile.warpgroups == 2 ? 224 : 152;
  static constexpr int kProducerRegisters = 56;

  // Records that the walk is ahead of the loads; even, as the stages. Each new tile costs the walk
  // about a microsecond, two or three stages.
  static constexpr int kRecords = 8;
  // Entries of each block row that are fetched before they are looked at.
  static constexpr int kLookahead = 16;
  static constexpr int kTiles = 2;  // tiles handed out and not begun

  static_assert(kTile.warpgroups * kConsumerRegisters + kProducerRegisters <= 512,
                "65536 registers");
  static_assert(kRows <= 32, "the walk has a lane for each row of pieces");
  static_assert(kTile.stages % 2 == 0 && kRecords % 2 == 0);
  static_assert(kTile.ring >= 2 * kTile.strips * kColumns,
                "a consumer holds one stage while it waits for the next");
  static_assert(kTile.cluster == 1 || kTile.cluster == 2);
  static_assert(kTokens / kTile.cluster % 8 == 0, "the swizzle of x repeats after 8 tokens");
};

// A stage as the walk describes it to the warps that load W, and what the consumers need of that.
// A piece is told by its first row in the matrix of values, with the number of its first column,
// divided by the width of a piece, in the low 4 bits (rows are multiples of 16).
constexpr int32_t kNoPiece = -4096;  // outside of any matrix: loads zeros
constexpr int32_t kNoTile = -1;      // the end

template <Config kConfig>
struct alignas(16) StageWork {
  int32_t tile;
  // Per column, which strips have a piece: bit strip * kRowsPerStrip.
  uint32_t present[Sizes<kConfig>::kColumns];
};

template <Config kConfig>
struct alignas(16) Record {
  StageWork<kConfig> work;
  int32_t pieces;
  int32_t slot;  // of the first strip in the ring
  int32_t back;  // the stage that many before must be free
  int32_t piece[Sizes<kConfig>::kPieces];
};

}  // namespace block_sparse::cuda::sm90::strips
