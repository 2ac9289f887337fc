// How the tiles of a pattern are chosen: greedily, one after the other, within a band of the grid.
// For the GPU (one CTA per band) and for tests on the host, from one source. Not the kernels that
// call it, and not the layout of the result: that is tiles.h.
#pragma once

#include <algorithm>
#include <bit>

#include "block_sparse/pattern.h"
#include "cuda/sm90/team.h"
#include "cuda/sm90/tiles.h"

namespace block_sparse::cuda::sm90 {

// Tiles of up to so many rows are chosen with patience: the best of all first. For more rows it
// costs several times the work and saves 3 % of the tiles.
constexpr int kPatientRows = 2;
constexpr int kBandWords = kBandUnits / 32;

// The units of a band that no tile owns yet, and the tile in the making. Shared memory. A row is a
// group of row units that are loaded together: it needs the columns that any of them has.
struct BandState {
  uint32_t have[kBandWords][kBandUnits];  // bit c of row unit r: its unit in column c
  uint32_t need[kBandWords][kBandUnits];  // bit c of row r: columns that no tile has taken for it
  int left[kBandUnits];                   // bits of each row
  uint32_t best[kBandUnits];  // no less than what a tile that begins with this row covers
  uint32_t units;             // in the band
  // level[k]: the columns that at least k of the chosen rows need; at_least[k]: how many. The last
  // is always empty.
  uint32_t level[kMaxTileRows + 2][kBandWords];
  int at_least[kMaxTileRows + 2];
  uint32_t taken[kBandWords];  // the chosen columns
  uint32_t rows[kMaxTileRows];
  uint32_t cols[kMaxTileCols];
  uint32_t mask[kMaxMaskWords];
};

struct Band {
  int row0, col0;         // the first units
  int units, rows, cols;  // row units, rows (groups of them) and columns
  int words;

  BLOCK_SPARSE_HOST_DEVICE Band(const Tiling& t, int band)
      : row0(band / t.col_bands * t.band_rows),
        col0(band % t.col_bands * t.band_cols),
        units(std::max(0, std::min(t.band_rows, t.row_units - row0))),
        rows((units + t.group - 1) / t.group),
        cols(std::max(0, std::min(t.band_cols, t.col_units - col0))),
        words((cols + 31) / 32) {}
};

BLOCK_SPARSE_HOST_DEVICE inline int32_t clamp(int32_t value, int64_t end) {
  return static_cast<int32_t>(value < 0 ? 0 : value < end ? value : end);
}

// The first block of a block row in column `col` or behind, and the end of the row.
struct Range {
  int32_t begin, end;
};
BLOCK_SPARSE_HOST_DEVICE inline Range blocks_from(const PatternView& p, int block_row, int col) {
  Range range{clamp(p.crow[block_row], p.grid.nnz), clamp(p.crow[block_row + 1], p.grid.nnz)};
  int32_t last = range.end;
  while (range.begin < last) {
    const int32_t middle = range.begin + (last - range.begin) / 2;
    if (p.col[middle] < col) {
      range.begin = middle + 1;
    } else {
      last = middle;
    }
  }
  return range;
}

// Reads the band's part of the pattern.
BLOCK_SPARSE_HOST_DEVICE inline void read_band(Team& team, BandState& s, const Tiling& t,
                                               const Band& band, const PatternView& p) {
  team.each(1, [&](int) { s.units = 0; });
  team.each(band.units, [&](int r) {
    for (int w = 0; w < band.words; ++w) s.have[w][r] = 0;
    const Range range = blocks_from(p, (band.row0 + r) / t.parts_out, band.col0 / t.parts_in);
    int units = 0;
    for (int32_t block = range.begin; block < range.end; ++block) {
      const int64_t first = int64_t{p.col[block]} * t.parts_in - band.col0;
      if (first >= band.cols) break;
      for (int64_t c = first; c < first + t.parts_in; ++c) {
        if (c < 0 || c >= band.cols) continue;
        const uint32_t bit = 1u << c % 32;
        units += (s.have[c / 32][r] & bit) == 0;
        s.have[c / 32][r] |= bit;
      }
    }
    add_to(s.units, units);
  });
  team.each(band.rows, [&](int r) {
    int left = 0;
    for (int w = 0; w < band.words; ++w) {
      uint32_t need = 0;
      for (int u = r * t.group; u < std::min((r + 1) * t.group, band.units); ++u) {
        need |= s.have[w][u];
      }
      s.need[w][r] = need;
      left += popcount(need);
    }
    s.left[r] = left;
    s.best[r] = t.rows * t.cols;
  });
}

// Chooses the row of a tile that adds most to what its best columns cover, of equals one with the
// fewest units left (they are the hardest to place later). `covered` is what they cover so far, and
// will then. Returns kNoUnit where no row adds anything.
template <int kChosen>
BLOCK_SPARSE_HOST_DEVICE uint32_t choose_row(Team& team, BandState& s, const Tiling& t,
                                             const Band& band, uint32_t& covered) {
  constexpr int kTieBits = 17;  // 9 for the units left, 8 for the row
  const uint32_t best = team.max(band.rows, [&](int r) -> uint32_t {
    if (s.left[r] == 0) return 0;
    for (int i = 0; i < kChosen; ++i) {
      if (s.rows[i] == static_cast<uint32_t>(r)) return 0;
    }
    int columns[kChosen + 1] = {};  // those that at least 1, 2, ... rows would need
    for (int w = 0; w < band.words; ++w) {
      const uint32_t need = s.need[w][r];
      uint32_t below = ~0u;
      for (int k = 0; k <= kChosen; ++k) {
        const uint32_t level = s.level[k + 1][w];
        columns[k] += popcount(level | (below & need));
        below = level;
      }
    }
    uint32_t sum = 0;
    for (int k = 0; k <= kChosen; ++k) sum += std::min(columns[k], t.cols);
    return sum << kTieBits | (511u - s.left[r]) << 8 | (255u - r);
  });
  if (best >> kTieBits <= covered) return kNoUnit;
  covered = best >> kTieBits;
  return 255 - (best & 255);
}

// Chooses the rows of a tile that begins with row `seed`. Returns how much it would cover.
template <int kRows>
BLOCK_SPARSE_HOST_DEVICE uint32_t choose_rows(Team& team, BandState& s, const Tiling& t,
                                              const Band& band, uint32_t seed) {
  team.each(kMaxTileCols, [&](int i) {
    s.cols[i] = kNoUnit;
    if (i < kRows) s.rows[i] = i == 0 ? seed : kNoUnit;
    if (i < kMaxMaskWords) s.mask[i] = 0;
    if (i < band.words) {
      s.taken[i] = 0;
      for (int k = 1; k <= kRows + 1; ++k) s.level[k][i] = k == 1 ? s.need[i][seed] : 0;
    }
  });

  uint32_t covered = static_cast<uint32_t>(std::min(s.left[seed], t.cols));
  const auto add = [&]<int kChosen>(std::integral_constant<int, kChosen>) {
    const uint32_t row = choose_row<kChosen>(team, s, t, band, covered);
    if (row == kNoUnit) return false;
    team.each(band.words, [&](int w) {
      const uint32_t need = s.need[w][row];
      for (int k = kChosen + 1; k > 1; --k) s.level[k][w] |= s.level[k - 1][w] & need;
      s.level[1][w] |= need;
      if (w == 0) s.rows[kChosen] = row;
    });
    return true;
  };
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (void)(add(std::integral_constant<int, i + 1>{}) && ...);
  }(std::make_integer_sequence<int, kRows - 1>{});
  return covered;
}

// Chooses the rows of the next tile; false where none is needed. In general it begins with the
// first row that has units left: neighbouring tiles then share rows, and the last tiles of a band
// few of those of the first. Where tiles have two rows only, it is the best tile of all: what a
// tile can cover never grows, so that rows are tried until one is no worse than others were before.
template <int kRows>
BLOCK_SPARSE_HOST_DEVICE bool choose_rows(Team& team, BandState& s, const Tiling& t,
                                          const Band& band) {
  uint32_t tried = kNoUnit;
  while (true) {
    const uint32_t best = team.max(band.rows, [&](int r) -> uint32_t {
      if (s.left[r] == 0) return 0;
      return s.best[r] << 9 | (static_cast<uint32_t>(r) == tried) << 8 | (255 - r);
    });
    if (best == 0) return false;
    const uint32_t seed = 255 - (best & 255);
    if (seed == tried) return true;
    const uint32_t covered = choose_rows<kRows>(team, s, t, band, seed);
    if (kRows > kPatientRows) return true;
    tried = seed;
    team.each(1, [&](int) { s.best[seed] = covered; });
  }
}

// Chooses the columns that most of the rows need. Where the first row has no more than a tile's
// columns left, these are among them: a tile owns at least t.cols units or empties a row, which
// bounds the number of tiles.
template <int kRows>
BLOCK_SPARSE_HOST_DEVICE void choose_cols(Team& team, BandState& s, const Tiling& t,
                                          const Band& band) {
  const uint32_t seed = s.rows[0];
  const bool empty_seed = s.left[seed] <= t.cols;
  team.each(kRows + 1, [&](int i) {
    int columns = 0;
    for (int w = 0; w < band.words; ++w) {
      if (i < kRows && empty_seed) s.level[i + 1][w] |= s.need[w][seed];
      columns += popcount(s.level[i + 1][w]);
    }
    s.at_least[i + 1] = columns;
  });
  team.each(band.cols, [&](int c) {
    const int word = c / 32;
    const uint32_t bit = 1u << c % 32;
    int all = 1;  // the smallest level that fits
    while (s.at_least[all] > t.cols) ++all;
    const bool above = (s.level[all][word] & bit) != 0;
    const bool below = !above && all > 1 && (s.level[all - 1][word] & bit) != 0;
    if (!above && !below) return;
    int slot = below ? s.at_least[all] : 0;
    for (int w = 0; w <= word; ++w) {
      const uint32_t set = below ? s.level[all - 1][w] & ~s.level[all][w] : s.level[all][w];
      slot += popcount(w < word ? set : set & (bit - 1));
    }
    if (slot >= t.cols) return;
    s.cols[slot] = c;
    add_bits(s.taken[word], bit);
  });
}

// Plans the tiles of a band into `records`, at most `limit` of them, and returns how many.
// `first_number` is where their block numbers start.
template <int kRows>
BLOCK_SPARSE_HOST_DEVICE int plan_band(Team& team, BandState& s, const Tiling& t, const Band& band,
                                       int32_t first_number, int limit, int32_t* records) {
  int tile = 0;
  for (; tile < limit && choose_rows<kRows>(team, s, t, band); ++tile) {
    choose_cols<kRows>(team, s, t, band);
    const auto row_unit = [&](int u) -> uint32_t {  // within the band
      const uint32_t row = s.rows[u / t.group];
      const uint32_t unit = row * t.group + u % t.group;
      return row == kNoUnit || unit >= static_cast<uint32_t>(band.units) ? kNoUnit : unit;
    };
    team.each(t.rows * t.cols, [&](int i) {
      const uint32_t unit = row_unit(i / t.cols), col = s.cols[i % t.cols];
      if (unit == kNoUnit || col == kNoUnit) return;
      const uint32_t need = s.need[col / 32][unit / t.group] & s.have[col / 32][unit];
      if (need >> col % 32 & 1) add_bits(s.mask[i / 32], 1u << i % 32);
    });
    int32_t* record = records + int64_t{tile} * t.record_size;
    team.each(t.record_size, [&](int i) {
      const int pair = (i - 1 - t.mask_words) * 2;
      const auto unit = [&](int u) {
        const uint32_t local = u < t.rows ? row_unit(u) : s.cols[u - t.rows];
        return local == kNoUnit ? kNoUnit : local + (u < t.rows ? band.row0 : band.col0);
      };
      record[i] = i == 0              ? first_number
                  : i <= t.mask_words ? static_cast<int32_t>(s.mask[i - 1])
                                      : static_cast<int32_t>(unit(pair) | unit(pair + 1) << 16);
    });
    team.each(kRows, [&](int i) {
      const uint32_t row = s.rows[i];
      if (row == kNoUnit) return;
      for (int w = 0; w < band.words; ++w) {
        s.left[row] -= popcount(s.need[w][row] & s.taken[w]);
        s.need[w][row] &= ~s.taken[w];
      }
    });
    for (int w = 0; w < t.mask_words; ++w) first_number += popcount(s.mask[w]);
  }
  return tile;
}

// Where a band keeps its tiles and block numbers; `units` are those of every band.
struct Region {
  int64_t first_tile = 0;
  int limit = 0;  // tiles
  uint32_t first_number = 0;

  BLOCK_SPARSE_HOST_DEVICE Region(const Tiling& t, int index, const int32_t* units) {
    const Band band(t, index);
    for (int i = 0; i < index; ++i) first_number += units[i];
    const int64_t rows_before = int64_t{std::min(band.row0, t.row_units)} * t.col_bands +
                                int64_t{index % t.col_bands} * band.units;
    first_tile = std::min<int64_t>(first_number / t.cols + rows_before, t.capacity);
    limit = static_cast<int>(
        std::min<int64_t>(units[index] / t.cols + band.units, t.capacity - first_tile));
  }
};

// Looks up the block number of bit `bit` of a tile, where the tile owns it.
BLOCK_SPARSE_HOST_DEVICE inline void number_block(const Tiling& t, const PatternView& p,
                                                  const int32_t* record, int bit,
                                                  int32_t* numbers) {
  const auto mask = [&](int word) { return static_cast<uint32_t>(record[1 + word]); };
  if ((mask(bit / 32) >> bit % 32 & 1) == 0) return;
  int64_t at = static_cast<uint32_t>(record[0]) + popcount(mask(bit / 32) & ((1u << bit % 32) - 1));
  for (int word = 0; word < bit / 32; ++word) at += popcount(mask(word));
  const auto unit = [&](int u) {
    return static_cast<uint32_t>(record[1 + t.mask_words + u / 2]) >> (u % 2 * 16) & kNoUnit;
  };
  const int block_row = unit(bit / t.cols) / t.parts_out;
  const int col = unit(t.rows + bit % t.cols) / t.parts_in;
  const int32_t block = blocks_from(p, block_row, col).begin;
  if (at < t.numbers_size()) numbers[at] = block;
}

}  // namespace block_sparse::cuda::sm90
