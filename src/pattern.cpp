// Builds and validates patterns. Everything here runs once per pattern, on the host.
#include "block_sparse/pattern.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "block_sparse/check.h"

namespace block_sparse {
namespace {

constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();

void check_grid(int64_t block_rows, int64_t block_cols) {
  check(block_rows >= 0 && block_cols >= 0, "pattern: the grid is ", block_rows, " x ", block_cols,
        " blocks; both must be at least 0");
  check(block_rows < kMaxIndex && block_cols < kMaxIndex, "pattern: a grid of ", block_rows, " x ",
        block_cols, " blocks overflows int32 indices");
}

void check_nnz(int64_t nnz) {
  check(nnz <= kMaxIndex, "pattern: ", nnz, " blocks overflow int32 indices");
}

// Stateless, portable random numbers (splitmix64), so that a seed means the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // Uniform in [0, bound), without bias: draws in the incomplete last interval are rejected.
  int64_t below(int64_t bound) {
    const auto range = static_cast<uint64_t>(bound);
    const uint64_t reject_below = -range % range;
    uint64_t draw = next();
    while (draw < reject_below) draw = next();
    return static_cast<int64_t>(draw % range);
  }

  template <class T>
  void shuffle(std::vector<T>& items) {
    for (auto i = static_cast<int64_t>(items.size()); i > 1; --i) {
      std::swap(items[static_cast<size_t>(i - 1)], items[static_cast<size_t>(below(i))]);
    }
  }

 private:
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  uint64_t state_;
};

// `total` split over `parts` as evenly as possible; which parts get one more is random.
std::vector<int64_t> split_evenly(int64_t total, int64_t parts, Random& random) {
  std::vector<int64_t> counts(static_cast<size_t>(parts), total / parts);
  for (int64_t i = 0; i < total % parts; ++i) ++counts[static_cast<size_t>(i)];
  random.shuffle(counts);
  return counts;
}

// The BSR half of an index, written row by row.
struct BsrBuilder {
  std::vector<int32_t> crow{0};
  std::vector<int32_t> col;

  void end_row() { crow.push_back(static_cast<int32_t>(col.size())); }
};

}  // namespace

PatternView PatternView::of_packed(const int32_t* packed, GridShape grid) {
  PatternView view;
  view.grid = grid;
  view.crow = packed;
  view.col = view.crow + grid.block_rows + 1;
  view.row = view.col + grid.nnz;
  view.ccol = view.row + grid.nnz;
  view.trow = view.ccol + grid.block_cols + 1;
  view.perm = view.trow + grid.nnz;
  return view;
}

namespace {

// Branch-free, so that it vectorises: the message is made only when something is wrong.
void check_range(const char* name, const int32_t* index, int64_t count, int64_t bound) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, static_cast<uint32_t>(index[i]));
  }
  check(count == 0 || static_cast<int64_t>(largest) < bound, "index: ", name,
        " has an entry outside [0, ", bound, ")");
}

// `most`: how many entries one row can have. Kernels size scratch memory by it.
void check_offsets(const char* name, const int32_t* offsets, int64_t rows, int64_t nnz,
                   int64_t most) {
  bool ascending = true;
  bool fit = true;
  for (int64_t i = 0; i < rows; ++i) {
    ascending &= offsets[i] <= offsets[i + 1];
    fit &= int64_t{offsets[i + 1]} - offsets[i] <= most;
  }
  check(ascending && offsets[0] == 0 && offsets[rows] == nnz, "index: ", name,
        " must ascend from 0 to the number of blocks, ", nnz, "; it goes from ", offsets[0], " to ",
        offsets[rows], ascending ? "" : " and descends in between");
  check(fit, "index: ", name, " gives a row more than the ", most, " blocks that it has room for");
}

}  // namespace

void check_bounds(const PatternView& pattern) {
  const auto [block_rows, block_cols, nnz] = pattern.grid;
  check_offsets("crow_indices", pattern.crow, block_rows, nnz, block_cols);
  check_offsets("the transposed crow_indices", pattern.ccol, block_cols, nnz, block_rows);
  check_range("col_indices", pattern.col, nnz, block_cols);
  check_range("the row of each block", pattern.row, nnz, block_rows);
  check_range("the transposed col_indices", pattern.trow, nnz, block_rows);
  check_range("the block permutation", pattern.perm, nnz, nnz);
}

Pattern::Pattern(std::vector<int32_t> crow, std::vector<int32_t> col, int64_t block_cols) {
  grid_ = {static_cast<int64_t>(crow.size()) - 1, block_cols, static_cast<int64_t>(col.size())};
  packed_.reserve(static_cast<size_t>(grid_.index_size()));
  packed_.insert(packed_.end(), crow.begin(), crow.end());
  packed_.insert(packed_.end(), col.begin(), col.end());
  packed_.resize(static_cast<size_t>(grid_.index_size()));

  const PatternView layout = view();
  const auto writable = [&](const int32_t* part) { return packed_.data() + (part - layout.crow); };
  int32_t* row = writable(layout.row);
  int32_t* ccol = writable(layout.ccol);
  int32_t* trow = writable(layout.trow);
  int32_t* perm = writable(layout.perm);

  // A counting sort by column; stable, so block rows ascend within a column.
  for (int32_t c : col) ++ccol[c + 1];
  std::partial_sum(ccol, ccol + block_cols + 1, ccol);
  std::vector<int32_t> next(ccol, ccol + block_cols);
  for (int64_t r = 0; r < grid_.block_rows; ++r) {
    for (int32_t block = crow[static_cast<size_t>(r)]; block < crow[static_cast<size_t>(r) + 1];
         ++block) {
      row[block] = static_cast<int32_t>(r);
      const int32_t slot = next[static_cast<size_t>(col[static_cast<size_t>(block)])]++;
      trow[slot] = static_cast<int32_t>(r);
      perm[slot] = block;
    }
  }
}

Pattern Pattern::from_bsr(std::span<const int32_t> crow, std::span<const int32_t> col,
                          int64_t block_cols) {
  check(!crow.empty(), "crow_indices: is empty; it needs block_rows + 1 entries");
  const auto block_rows = static_cast<int64_t>(crow.size()) - 1;
  const auto nnz = static_cast<int64_t>(col.size());
  check_grid(block_rows, block_cols);
  check_nnz(nnz);
  check(crow.front() == 0, "crow_indices: must start at 0, got ", crow.front());
  check(crow.back() == nnz, "crow_indices: must end at the number of blocks, ", nnz, ", got ",
        crow.back());
  for (int64_t r = 0; r < block_rows; ++r) {
    const int32_t begin = crow[static_cast<size_t>(r)];
    const int32_t end = crow[static_cast<size_t>(r) + 1];
    check(begin <= end && end <= nnz, "crow_indices: must ascend and stay at most ", nnz,
          "; entries ", r, " and ", r + 1, " are ", begin, " and ", end);
    for (int32_t block = begin; block < end; ++block) {
      const int32_t c = col[static_cast<size_t>(block)];
      check(c >= 0 && c < block_cols, "col_indices: entry ", block, " is ", c,
            "; it must be in [0, ", block_cols, ")");
      check(block == begin || col[static_cast<size_t>(block) - 1] < c,
            "col_indices: must ascend within a block row without duplicates; block row ", r,
            " has ", block == begin ? 0 : col[static_cast<size_t>(block) - 1], " before ", c);
    }
  }
  return Pattern({crow.begin(), crow.end()}, {col.begin(), col.end()}, block_cols);
}

Pattern Pattern::from_blocks(std::span<const Block> blocks, int64_t block_rows,
                             int64_t block_cols) {
  check_grid(block_rows, block_cols);
  check_nnz(static_cast<int64_t>(blocks.size()));
  std::vector<Block> sorted(blocks.begin(), blocks.end());
  std::sort(sorted.begin(), sorted.end());
  BsrBuilder bsr;
  bsr.col.reserve(sorted.size());
  size_t next = 0;
  for (const auto& [r, c] : sorted) {
    check(r >= 0 && r < block_rows && c >= 0 && c < block_cols, "blocks: (", r, ", ", c,
          ") is outside the grid of ", block_rows, " x ", block_cols, " blocks");
  }
  for (int64_t r = 0; r < block_rows; ++r) {
    for (; next < sorted.size() && sorted[next].first == r; ++next) {
      check(next == 0 || sorted[next] != sorted[next - 1], "blocks: (", sorted[next].first, ", ",
            sorted[next].second, ") is named twice");
      bsr.col.push_back(static_cast<int32_t>(sorted[next].second));
    }
    bsr.end_row();
  }
  return Pattern(std::move(bsr.crow), std::move(bsr.col), block_cols);
}

Pattern Pattern::from_mask(std::span<const uint8_t> mask, int64_t block_rows, int64_t block_cols) {
  check_grid(block_rows, block_cols);
  check(static_cast<int64_t>(mask.size()) == block_rows * block_cols, "mask: has ", mask.size(),
        " entries; a grid of ", block_rows, " x ", block_cols, " blocks needs ",
        block_rows * block_cols);
  BsrBuilder bsr;
  for (int64_t r = 0; r < block_rows; ++r) {
    const uint8_t* present = mask.data() + r * block_cols;
    for (int64_t c = 0; c < block_cols; ++c) {
      if (present[c] != 0) bsr.col.push_back(static_cast<int32_t>(c));
    }
    check_nnz(static_cast<int64_t>(bsr.col.size()));
    bsr.end_row();
  }
  return Pattern(std::move(bsr.crow), std::move(bsr.col), block_cols);
}

namespace {

// Each row takes its share from the columns that have most left to give, ties broken at random: by
// the Gale-Ryser theorem this never gets stuck.
Pattern random_balanced(int64_t block_rows, int64_t block_cols, int64_t nnz, Random& random) {
  const std::vector<int64_t> row_counts = split_evenly(nnz, block_rows, random);
  std::vector<int64_t> left = split_evenly(nnz, block_cols, random);
  std::vector<int64_t> order(static_cast<size_t>(block_cols));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::vector<Pattern::Block> blocks;
  blocks.reserve(static_cast<size_t>(nnz));
  for (int64_t r = 0; r < block_rows; ++r) {
    random.shuffle(order);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return left[static_cast<size_t>(a)] > left[static_cast<size_t>(b)];
    });
    for (int64_t i = 0; i < row_counts[static_cast<size_t>(r)]; ++i) {
      const int64_t c = order[static_cast<size_t>(i)];
      --left[static_cast<size_t>(c)];
      blocks.emplace_back(r, c);
    }
  }
  return Pattern::from_blocks(blocks, block_rows, block_cols);
}

}  // namespace

Pattern Pattern::random(int64_t block_rows, int64_t block_cols, int64_t nnz, uint64_t seed,
                        bool balanced) {
  check_grid(block_rows, block_cols);
  check_nnz(nnz);
  check(nnz >= 0 && nnz <= block_rows * block_cols, "nnz: ", nnz, " blocks do not fit a grid of ",
        block_rows, " x ", block_cols);
  Random random(seed);
  if (balanced && nnz > 0) return random_balanced(block_rows, block_cols, nnz, random);

  // Selection sampling (Knuth, TAOCP 2, algorithm 3.4.2 S): each cell is taken with probability
  // wanted / cells left, which is uniform without replacement and comes out sorted.
  BsrBuilder bsr;
  bsr.col.reserve(static_cast<size_t>(nnz));
  int64_t wanted = nnz;
  int64_t cells = block_rows * block_cols;
  for (int64_t r = 0; r < block_rows; ++r) {
    for (int64_t c = 0; c < block_cols; ++c, --cells) {
      if (random.below(cells) < wanted) {
        bsr.col.push_back(static_cast<int32_t>(c));
        --wanted;
      }
    }
    bsr.end_row();
  }
  return Pattern(std::move(bsr.crow), std::move(bsr.col), block_cols);
}

Pattern Pattern::banded(int64_t block_rows, int64_t block_cols, int64_t bandwidth) {
  check_grid(block_rows, block_cols);
  check(bandwidth >= 0, "bandwidth: must be at least 0, got ", bandwidth);
  const int64_t reach = std::min(bandwidth, block_cols);
  const auto begin = [&](int64_t r) {
    return std::max<int64_t>(0, r * block_cols / block_rows - reach);
  };
  const auto end = [&](int64_t r) {
    return std::min(block_cols, r * block_cols / block_rows + reach + 1);
  };
  // Counted first: a band that overflows must not be built to be refused.
  int64_t nnz = 0;
  for (int64_t r = 0; r < block_rows; ++r) nnz += end(r) - begin(r);
  check_nnz(nnz);
  BsrBuilder bsr;
  bsr.col.reserve(static_cast<size_t>(nnz));
  for (int64_t r = 0; r < block_rows; ++r) {
    for (int64_t c = begin(r); c < end(r); ++c) bsr.col.push_back(static_cast<int32_t>(c));
    bsr.end_row();
  }
  return Pattern(std::move(bsr.crow), std::move(bsr.col), block_cols);
}

Pattern Pattern::full(int64_t block_rows, int64_t block_cols) {
  return banded(block_rows, block_cols, block_cols);
}

}  // namespace block_sparse
