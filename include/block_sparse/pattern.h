// Pattern: the set of present blocks of a grid, and every index that a product needs, built once.
// It knows the grid (block rows x block columns), not the size of a block and not the values.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace block_sparse {

// The size of the grid of blocks, and how many of them are present.
struct GridShape {
  int64_t block_rows = 0;
  int64_t block_cols = 0;
  int64_t nnz = 0;

  // int32 elements of the packed index.
  constexpr int64_t index_size() const { return (block_rows + 1) + (block_cols + 1) + 4 * nnz; }
};

// All indices of a pattern, as pointers into one packed int32 array in this order. Blocks are
// numbered in BSR order (by block row, then block column), which is the order of `values`.
struct PatternView {
  GridShape grid;
  const int32_t* crow = nullptr;  // [block_rows + 1]  first block of each block row
  const int32_t* col = nullptr;   // [nnz]             block column of each block
  const int32_t* row = nullptr;   // [nnz]             block row of each block
  const int32_t* ccol = nullptr;  // [block_cols + 1]  first entry of each block column below
  const int32_t* trow = nullptr;  // [nnz]             block row, by block column, then block row
  const int32_t* perm = nullptr;  // [nnz]             block number, in the same order

  // What GPU kernels plan once per pattern (src/cuda/sm90/walks.h); null where nothing is planned.
  const int32_t* row_order = nullptr;   // in which block rows are taken into panels
  const int32_t* col_order = nullptr;   // the same of block columns
  const int32_t* row_strips = nullptr;  // what the strip kernel walks in forward
  const int32_t* col_strips = nullptr;  // and in grad_input
  const int32_t* tiles = nullptr;       // of the sampled product

  static PatternView of_packed(const int32_t* packed, GridShape grid);
};

// Throws unless every index stays inside its array: what memory safety needs, and no more.
// About 1 us for 16k indices.
void check_bounds(const PatternView& pattern);

class Pattern {
 public:
  using Block = std::pair<int64_t, int64_t>;  // (block row, block column)

  // `mask` is row-major, block_rows x block_cols; nonzero means present.
  static Pattern from_mask(std::span<const uint8_t> mask, int64_t block_rows, int64_t block_cols);
  // In any order; a block named twice is an error.
  static Pattern from_blocks(std::span<const Block> blocks, int64_t block_rows, int64_t block_cols);
  // BSR indices, columns ascending within a block row. Everything is validated.
  static Pattern from_bsr(std::span<const int32_t> crow, std::span<const int32_t> col,
                          int64_t block_cols);
  // Exactly nnz blocks, uniform without replacement. The same seed gives the same pattern on every
  // machine. `balanced`: block rows differ by at most one block, and so do block columns (then
  // every pattern can occur, but not all equally often).
  static Pattern random(int64_t block_rows, int64_t block_cols, int64_t nnz, uint64_t seed,
                        bool balanced = false);
  // The blocks within `bandwidth` blocks of the diagonal (scaled where the grid is not square).
  static Pattern banded(int64_t block_rows, int64_t block_cols, int64_t bandwidth);
  static Pattern full(int64_t block_rows, int64_t block_cols);

  GridShape grid() const { return grid_; }
  std::span<const int32_t> packed() const { return packed_; }
  PatternView view() const { return PatternView::of_packed(packed_.data(), grid_); }

 private:
  // From the BSR half; builds the transposed half.
  Pattern(std::vector<int32_t> crow, std::vector<int32_t> col, int64_t block_cols);

  GridShape grid_;
  std::vector<int32_t> packed_;
};

}  // namespace block_sparse
