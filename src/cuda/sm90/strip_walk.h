// The walk of the strip kernel: which pieces of W each stage loads, and which products a warpgroup
// computes from them, as lists in int32 entries behind the index. This is their layout and who
// fills them (strip_walk.cu). Host code.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_sparse/matrix.h"
#include "cuda/sm90/order.h"
#include "cuda/sm90/strip_config.h"

namespace block_sparse::cuda::sm90::strips {

// Only stages of which some tile of the cluster has a piece are loaded, and counted here.

// An item is one product of 64 outputs with one column of pieces: where that column's pieces of the
// group begin in the ring (8 bits), which of the group's rows have one (4), which group of the
// warpgroup it is (1), and the column among those of the stages (19). A word without rows is no
// item: it fills a batch.
constexpr int kItemRows = 8;
constexpr int kItemGroup = 12;
constexpr int kItemColumn = 13;
constexpr int64_t kMaxColumns = int64_t{1} << (32 - kItemColumn);
constexpr int64_t kMaxStages = int64_t{1} << 16;  // of a tile: warps count them in 16 bits

// What is loaded for a stage, in the order of columns, then of the tile's rows.
struct StageRecord {
  int32_t depth;  // where it is along the sum, in stages
  int32_t first;  // of its pieces in the list of pieces
  // How many there are (8 bits), where in the ring they go (8), and how many stages before it the
  // one is that must be released first (8): it holds their places, or those of the early pieces. So
  // many are early (8); the others wait for one stage more.
  uint32_t work;
};

// A list of items. Where in it each stage begins is listed too.
struct Span {
  int32_t first, count;
};

// The pattern as the product sees it: lines along the outputs (of forward the block rows, of
// grad_input the block columns) that cross others along the depth. A block is line_parts x
// cross_parts pieces.
struct Lines {
  int64_t lines, crosses;
  int64_t line_side, cross_side;  // of a block
  int64_t nnz;

  int outputs() const { return piece_side(line_side); }
  int depth() const { return piece_side(cross_side); }
  int64_t line_parts() const { return line_side / outputs(); }
  int64_t cross_parts() const { return cross_side / depth(); }
  int64_t pieces() const { return nnz * line_parts() * cross_parts(); }
  int64_t columns() const { return crosses * cross_parts(); }
  int64_t stages() const { return (crosses * cross_side + kStageDepth - 1) / kStageDepth; }
  // Whole clusters of tiles.
  int64_t panels() const {
    const int64_t outputs = tile().outputs() * kCluster;
    return (order_places() * line_side + outputs - 1) / outputs * kCluster;
  }
  int64_t order_places() const { return order_size(lines); }

  Tile tile() const { return depth() == kStepDepth ? kTall : kWide; }
};

inline Lines lines_of(GridShape grid, BlockShape block, bool transposed) {
  if (transposed) return {grid.block_cols, grid.block_rows, block.in, block.out, grid.nnz};
  return {grid.block_rows, grid.block_cols, block.out, block.in, grid.nnz};
}

// Where each list begins.
struct WalkLayout {
  // Each list of items ends with one that is none, as batches are taken in twos, and is
  // padded, so that whoever reads it may be 32 ahead; so is the list of stages, by two rounds of
  // the loaders, and that of pieces.
  static constexpr int64_t kItemPadding = 64;
  static constexpr int64_t kStagePadding = 2 * kWLoaders;
  static constexpr int64_t kPiecePadding = 128;

  int64_t spans = 0;   // [panels, lists] Span
  int64_t firsts = 0;  // [panels, lists, stages]: of the items
  int64_t counts = 0;  // [panels / kCluster]: of the stages
  int64_t stages = 0;  // [panels, stages] StageRecord
  int64_t items = 0, pieces = 0, size = 0;
  int64_t item_capacity = 0, piece_capacity = 0, list_padding = 0;

  explicit WalkLayout(const Lines& lines) {
    const int64_t lists = lines.panels() * lines.tile().lists();
    // Of each list: what fills its batches, one item a stage, and the padding.
    list_padding = kItemPadding + (batch_of(lines.depth()) - 1) * lines.stages();
    item_capacity = lines.pieces() + lists * list_padding;
    piece_capacity = lines.pieces() + kPiecePadding;
    firsts = spans + 2 * lists;
    counts = firsts + lists * lines.stages();
    stages = counts + lines.panels() / kCluster;
    items = stages + 3 * (lines.panels() * lines.stages() + kStagePadding);
    pieces = items + item_capacity;
    size = pieces + piece_capacity;
  }
};

// Whether blocks of this shape are taken: pieces fit, and something larger is not better for them.
constexpr bool takes_block(BlockShape block) {
  const auto takes = [](int64_t side) {
    return side == 16 || side == 32 || side == 64 || side == 128;
  };
  return takes(block.out) && takes(block.in) && std::min(block.out, block.in) < 64;
}

// int32 entries of the walk of one direction; 0 for blocks that are not taken.
inline int64_t walk_size(GridShape grid, BlockShape block, bool transposed) {
  if (!takes_block(block)) return 0;
  const Lines lines = lines_of(grid, block, transposed);
  const bool fits = lines.columns() <= kMaxColumns && lines.stages() <= kMaxStages;
  return fits ? WalkLayout(lines).size : 0;
}

// Fills `walk`, on the stream. `order`: which line is at which place (order.h).
void build_walk(const PatternView& pattern, BlockShape block, bool transposed, const int32_t* order,
                int32_t* walk, void* stream);

}  // namespace block_sparse::cuda::sm90::strips
