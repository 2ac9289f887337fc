// The strip kernels: how large their tiles are, and what follows from that. What a strip kernel
// does is told in strip.cuh. No device code.
#pragma once

#include <cstdint>
#include <type_traits>

#include "block_sparse/dtype.h"
#include "block_sparse/host_device.h"

namespace block_sparse::cuda::sm90::strips {

constexpr int kGroupOutputs = 64;  // the M of a wgmma; its N are the tokens of a tile
constexpr int kWarpOutputs = 16;

// 64 of the depth are 128 bytes a token, one row of the widest swizzle.
constexpr int kStageDepth = 64;
constexpr int kStepDepth = 16;

// CTAs with the same tokens and other outputs: each loads a part of x for all.
constexpr int kCluster = 2;

// One warp loads x, the others of the last warpgroup take turns at W: a warp issues its copies one
// after the other, and each wait is a round trip.
constexpr int kWLoaders = 3;

constexpr int kMaxLists = 3;  // of a CTA

constexpr int kStoreTokens = 16;  // that a warp stores at a time

// What a CTA works on. Per stage of the depth it loads tokens x 128 bytes of x and
// outputs x 128 x density of W, and what an SM can take in limits it: the largest tile is best that
// the registers hold.
struct Tile {
  int warpgroups;   // consumers
  int groups;       // of 64 outputs, in each
  int list_groups;  // of 64 outputs, whose items are in one list
  int tokens;       // at most
  int stages;       // of x
  int ring_bytes;   // of W; with the stages it fills shared memory
  int consumer_registers, producer_registers;

  friend constexpr bool operator==(const Tile&, const Tile&) = default;
  BLOCK_SPARSE_HOST_DEVICE constexpr int outputs() const {
    return warpgroups * groups * kGroupOutputs;
  }
  BLOCK_SPARSE_HOST_DEVICE constexpr int lists() const { return warpgroups * groups / list_groups; }
  BLOCK_SPARSE_HOST_DEVICE constexpr int threads() const { return (warpgroups + 1) * 128; }
  BLOCK_SPARSE_HOST_DEVICE constexpr int stage_bytes() const { return tokens * kStageDepth * 2; }
  BLOCK_SPARSE_HOST_DEVICE constexpr int rows(int piece_outputs) const {
    return outputs() / piece_outputs;
  }
  BLOCK_SPARSE_HOST_DEVICE constexpr int ring(int piece_outputs, int piece_depth) const {
    return ring_bytes / (piece_outputs * piece_depth * 2);
  }
};

// clang-format off
// The ring holds W of more than two stages in which all blocks are present: with less, one is loaded
// only when the one before it is done.
//              warpgroups groups in list tokens stages       ring registers
constexpr Tile kWide = {     2,     2,      2,   176,     6, 41 * 2048, 232, 40};
// For few tokens or tiles: a stage then takes as long as a warpgroup takes to go through its items,
// one after the other, so that twice as many take half as long. The lists are those of kWide.
constexpr Tile kFew = {      4,     1,      2,   128,     6, 41 * 2048, 112, 32};
// Products with 16 of the depth are short, and deciding what comes next takes longer: three
// warpgroups decide.
constexpr Tile kTall = {     3,     1,      1,   192,     6, 34 * 2048, 160, 32};
// clang-format on

// A block is multiplied in pieces, since wider blocks are then several narrower ones. The sides are
// named as the product sees them: outputs x depth, each 32 or 16. In memory a piece is
// outputs x depth (forward) or, `transposed`, depth x outputs (grad_input). Its rows follow each
// other in memory, unless it is a part of wider rows: then it is `strided`.
struct Piece {
  int outputs;
  int depth;
  bool transposed;
  bool strided;
};

// Blocks whose rows are wider than a piece.
BLOCK_SPARSE_HOST_DEVICE constexpr bool is_strided(int64_t block_in) { return block_in > 32; }

BLOCK_SPARSE_HOST_DEVICE constexpr int piece_side(int64_t block_side) {
  return block_side % 32 == 0 ? 32 : 16;
}

// Block rows of pieces that share a group.
BLOCK_SPARSE_HOST_DEVICE constexpr int group_rows(int piece_outputs) {
  return kGroupOutputs / piece_outputs;
}

// Items (products of 64 outputs with a column of pieces) that a warpgroup takes together, all of
// the same stage. A product with 16 of the depth takes 88 clocks, and deciding what comes next more
// than twice that.
BLOCK_SPARSE_HOST_DEVICE constexpr int batch_of(int piece_depth) {
  return piece_depth == kStepDepth ? 2 : 1;
}

// How many of a stage's pieces, [first, end) in the order of loading, go to places in the ring that
// are free before the stage whose pieces begin at `held` is released. None, where the place of the
// first is in the midst of that stage.
BLOCK_SPARSE_HOST_DEVICE constexpr int early_pieces(int first, int end, int held, int ring) {
  const int free = held + ring - first;
  return free < 0 ? 0 : free < end - first ? free : end - first;
}

struct Config {
  Dtype dtype;
  Dtype output_dtype;
  Piece piece;
  Tile tile;
  bool flexible;  // tiles may be split, and have fewer tokens than there is room for
};

// What is stored.
template <Config kConfig>
using Output =
    std::conditional_t<kConfig.output_dtype == Dtype::bf16, BFloat16,
                       std::conditional_t<kConfig.output_dtype == Dtype::f16, Float16, float>>;

template <Config kConfig>
struct Sizes {
  static constexpr Piece kPiece = kConfig.piece;
  static constexpr Tile kTile = kConfig.tile;
  static constexpr int kPieceBytes = kPiece.outputs * kPiece.depth * 2;
  static constexpr int kPieceSteps = kPiece.depth / kStepDepth;
  static constexpr int kGroupRows = group_rows(kPiece.outputs);
  static constexpr int kTileRows = kTile.rows(kPiece.outputs);
  static constexpr int kRing = kTile.ring(kPiece.outputs, kPiece.depth);
  static constexpr int kStagePieces = kTileRows * (kStageDepth / kPiece.depth);  // at most
  // The copy engine takes as long for a short row as for one of 128 bytes, so rows that follow each
  // other are taken as such lines, several to a line. Swizzled by the width of a line, ldmatrix
  // meets every bank once.
  static constexpr int kRowBytes = (kPiece.transposed ? kPiece.outputs : kPiece.depth) * 2;
  static constexpr int kLineBytes = kPiece.strided ? kRowBytes : 128;
  static constexpr int kLineRows = kLineBytes / kRowBytes;
  static constexpr int kStagingBytes = kStoreTokens * kPiece.outputs * 2;
  // What a CTA is started with is all that its warps can share, or they wait forever.
  static constexpr int kRegisters = 65536 / kTile.threads() / 8 * 8;  // of a thread
  static_assert(kTile.warpgroups * kTile.consumer_registers + kTile.producer_registers <=
                (kTile.warpgroups + 1) * kRegisters);
  static_assert(kTile.tokens / kCluster % 8 == 0, "the swizzle of x repeats after 8 tokens");
  static_assert(kStagePieces <= 64, "a lane fetches two pieces of a stage");
  static_assert(kRing > 2 * kStagePieces && kRing < 256);
};

}  // namespace block_sparse::cuda::sm90::strips
