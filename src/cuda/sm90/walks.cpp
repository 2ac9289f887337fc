// How the walks of a pattern lie in their array; what is in them is made in order.cu and
// tiles.cu.
#include "cuda/sm90/walks.h"

#include "cuda/sm90/order.h"
#include "cuda/sm90/tiles.h"

namespace block_sparse::cuda::sm90 {
namespace {

struct Layout {
  int64_t rows = 0, cols = 0, tiles = 0;
};

Layout layout_of(GridShape grid, BlockShape block) {
  if (block.out % 16 != 0 || block.in % 16 != 0) return {};
  return {order_size(grid.block_rows), order_size(grid.block_cols), tiles_size(grid, block)};
}

}  // namespace

int64_t walks_size(GridShape grid, BlockShape block) {
  const Layout layout = layout_of(grid, block);
  return layout.rows + layout.cols + layout.tiles;
}

void build_walks(const PatternView& pattern, BlockShape block, int32_t* walks, void* stream) {
  const Layout layout = layout_of(pattern.grid, block);
  build_order(pattern, false, walks, stream);
  build_order(pattern, true, walks + layout.rows, stream);
  build_tiles(pattern, block, walks + layout.rows + layout.cols, stream);
}

void attach_walks(PatternView& pattern, BlockShape block, const int32_t* walks) {
  const Layout layout = layout_of(pattern.grid, block);
  pattern.row_order = walks;
  pattern.col_order = walks + layout.rows;
  pattern.tiles = layout.tiles > 0 ? walks + layout.rows + layout.cols : nullptr;
}

}  // namespace block_sparse::cuda::sm90
