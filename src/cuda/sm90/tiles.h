// Tiles of the sampled product: which block rows and block columns the kernel of sampled.cu takes
// together. Planned on the GPU once per pattern, into int32 entries that are part of its index.
// This is the layout of those entries and who fills them; how tiles are chosen is in plan.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_sparse/host_device.h"
#include "block_sparse/matrix.h"

namespace block_sparse::cuda::sm90 {

// A tile multiplies 128 outputs with 256 inputs. Both are gathered in units: a block that is
// narrower than 64, or 64 features of one that is wider.
constexpr int kTileOut = 128;
constexpr int kTileIn = 256;
constexpr int kMaxTileRows = kTileOut / 16;
constexpr int kMaxTileCols = kTileIn / 16;
constexpr int kMaxMaskWords = kMaxTileRows * kMaxTileCols / 32;

// Tiles are chosen within a band: neighbouring row units and column units, at most so many. About
// so many tiles, a round of the kernel: what a round reads again and again then stays in L2, and of
// the larger operand it reads one band only.
constexpr int kBandUnits = 256;
constexpr int64_t kBandTiles = 128;

// Row units narrower than this are loaded together with their neighbours: rows of 128 bytes. With
// rows of 64 bytes (blocks of 32) there are fewer tiles, and a round takes 1.7 times as long.
constexpr int kLoadOut = 64;

// The width of a unit, or 0 where the side of a block is neither 16, 32 nor a multiple of 64.
BLOCK_SPARSE_HOST_DEVICE constexpr int unit_of(int64_t side) {
  if (side == 16 || side == 32) return static_cast<int>(side);
  return side > 0 && side % 64 == 0 ? 64 : 0;
}

BLOCK_SPARSE_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// A tile as it is stored: the units of its rows and columns, two to an entry, rows first; and a bit
// for each (row, column), row-major, that says whether the tile owns it. Every unit of every block
// is owned by one tile. `numbers` has the block numbers of what is owned, in the order of the bits.
constexpr uint32_t kNoUnit = 0xffff;
constexpr int64_t kMaxUnits = kNoUnit;

struct Tiling {
  // Units: their widths, how many make a block, a tile and the grid.
  int unit_out = 0, unit_in = 0;
  int parts_out = 0, parts_in = 0;
  int rows = 0, cols = 0;
  int group = 0;  // row units that are loaded together
  int row_units = 0, col_units = 0;
  int band_rows = 0, band_cols = 0;
  int row_bands = 0, col_bands = 0;
  int mask_words = 0;
  // Entries of the array: the number of tiles; units and tiles of each band; the records in the
  // order in which they are taken; the records; the block numbers.
  int record_size = 0;  // first number, mask, units
  int64_t capacity = 0;
  int64_t units_at = 0, counts_at = 0, order_at = 0, records_at = 0, numbers_at = 0;
  int64_t size = 0;

  BLOCK_SPARSE_HOST_DEVICE constexpr int bands() const { return row_bands * col_bands; }
  BLOCK_SPARSE_HOST_DEVICE constexpr int64_t numbers_size() const { return size - numbers_at; }
};

// A guess: of a tile that many units are present, in percent, in a random pattern. Only the sizes
// of bands depend on it.
BLOCK_SPARSE_HOST_DEVICE constexpr int64_t expected_tiles(const Tiling& t, int64_t units) {
  const int64_t percent = t.rows == 2 ? 90 : t.rows == 4 ? 65 : 45;
  return units * 100 / (percent * t.rows * t.cols);
}

// A closer one, from what was counted in random patterns of densities from 0.1 to 0.5: the last
// tile of a row of tiles is less full. Bands are not made by it: the figures that there are of them
// are with the one above.
constexpr int64_t likely_tiles(const Tiling& t, int64_t units) {
  const int64_t grid = int64_t{t.row_units} * t.col_units;
  const int64_t density = grid > 0 ? units * 100 / grid : 0;
  const int64_t percent = t.rows == 2   ? 70 + density * 45 / 100
                          : t.rows == 4 ? 36 + density * 55 / 100
                                        : 18 + density * 64 / 100;
  return units * 100 / (percent * t.rows * t.cols) +
         ceil_div(t.row_units, 5 * t.group * t.parts_out);
}

// All zero where the kernels of this directory refuse the block.
BLOCK_SPARSE_HOST_DEVICE constexpr Tiling tiling_of(GridShape grid, BlockShape block) {
  Tiling t;
  t.unit_out = unit_of(block.out);
  t.unit_in = unit_of(block.in);
  if (t.unit_out == 0 || t.unit_in == 0) return {};
  t.parts_out = static_cast<int>(block.out / t.unit_out);
  t.parts_in = static_cast<int>(block.in / t.unit_in);
  if (grid.block_rows > kMaxUnits / t.parts_out || grid.block_cols > kMaxUnits / t.parts_in) {
    return {};
  }
  t.rows = kTileOut / t.unit_out;
  t.cols = kTileIn / t.unit_in;
  t.row_units = static_cast<int>(grid.block_rows) * t.parts_out;
  t.col_units = static_cast<int>(grid.block_cols) * t.parts_in;
  if (grid.block_rows < 1 || grid.block_cols < 1) return {};
  t.group = t.unit_out < kLoadOut ? kLoadOut / t.unit_out : 1;

  // Bands along the larger side, as many as there may be rounds.
  const int64_t units = grid.nnz * t.parts_out * t.parts_in;
  const int64_t tiles = expected_tiles(t, units);
  const bool by_rows = int64_t{t.row_units} * t.unit_out >= int64_t{t.col_units} * t.unit_in;
  t.row_bands = static_cast<int>(ceil_div(t.row_units, kBandUnits));
  t.col_bands = static_cast<int>(ceil_div(t.col_units, kBandUnits));
  int& bands = by_rows ? t.row_bands : t.col_bands;
  const int64_t rounds =
      (tiles + kBandTiles * t.bands() / bands / 2) / (kBandTiles * t.bands() / bands);
  const int64_t most = by_rows ? ceil_div(t.row_units, t.rows) : ceil_div(t.col_units, t.cols);
  bands = static_cast<int>(std::max<int64_t>(bands, std::min(rounds, most)));
  t.band_rows = static_cast<int>(ceil_div(t.row_units, t.row_bands));
  t.band_rows = static_cast<int>(ceil_div(t.band_rows, t.group)) * t.group;
  t.band_cols = static_cast<int>(ceil_div(t.col_units, t.col_bands));
  t.mask_words = static_cast<int>(ceil_div(t.rows * t.cols, 32));
  t.record_size = 1 + t.mask_words + (t.rows + t.cols) / 2;

  // A tile owns at least t.cols units or the last units of one of its rows.
  t.capacity = units / t.cols + int64_t{t.row_units} * t.col_bands;
  t.units_at = 1;
  t.counts_at = t.units_at + t.bands();
  t.order_at = t.counts_at + t.bands();
  t.records_at = t.order_at + t.capacity;
  t.numbers_at = t.records_at + t.capacity * t.record_size;
  t.size = t.numbers_at + units;
  return t;
}

// int32 entries of `tiles`: linear in nnz. 0 where the kernels of this directory refuse the block.
int64_t tiles_size(GridShape grid, BlockShape block);

// Fills `tiles` from the other indices of the pattern. The same pattern gives the same entries.
// Trusts what it reads: a corrupt pattern gives unspecified tiles and no invalid access.
void build_tiles(const PatternView& pattern, BlockShape block, int32_t* tiles, void* stream);

}  // namespace block_sparse::cuda::sm90
