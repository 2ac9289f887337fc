// How the walks of a pattern lie in their array; what is in them is made in order.cu,
// strip_walk.cu and tiles.cu.
#include "cuda/sm90/walks.h"

#include "cuda/sm90/order.h"
#include "cuda/sm90/strip_walk.h"
#include "cuda/sm90/tiles.h"

namespace block_sparse::cuda::sm90 {
namespace {

// Where each part begins.
struct Layout {
  int64_t row_order = 0, col_order = 0, row_strips = 0, col_strips = 0, tiles = 0, size = 0;
};

Layout layout_of(GridShape grid, BlockShape block) {
  const int64_t tiles = tiles_size(grid, block);
  Layout layout;
  if (tiles == 0) return layout;  // a block that these kernels do not take
  layout.col_order = layout.row_order + order_size(grid.block_rows);
  layout.row_strips = layout.col_order + order_size(grid.block_cols);
  layout.col_strips = layout.row_strips + strips::walk_size(grid, block, false);
  layout.tiles = layout.col_strips + strips::walk_size(grid, block, true);
  layout.size = layout.tiles + tiles;
  return layout;
}

}  // namespace

int64_t walks_size(GridShape grid, BlockShape block) { return layout_of(grid, block).size; }

void build_walks(const PatternView& pattern, BlockShape block, int32_t* walks, void* stream) {
  const Layout layout = layout_of(pattern.grid, block);
  build_order(pattern, false, walks + layout.row_order, stream);
  build_order(pattern, true, walks + layout.col_order, stream);
  for (const bool transposed : {false, true}) {
    if (strips::walk_size(pattern.grid, block, transposed) == 0) continue;
    strips::build_walk(pattern, block, transposed,
                       walks + (transposed ? layout.col_order : layout.row_order),
                       walks + (transposed ? layout.col_strips : layout.row_strips), stream);
  }
  build_tiles(pattern, block, walks + layout.tiles, stream);
}

void attach_walks(PatternView& pattern, BlockShape block, const int32_t* walks) {
  const Layout layout = layout_of(pattern.grid, block);
  if (layout.size == 0) return;
  pattern.row_order = walks + layout.row_order;
  pattern.col_order = walks + layout.col_order;
  pattern.row_strips = walks + layout.row_strips;
  pattern.col_strips = walks + layout.col_strips;
  pattern.tiles = walks + layout.tiles;
}

}  // namespace block_sparse::cuda::sm90
