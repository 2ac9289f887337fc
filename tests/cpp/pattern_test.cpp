// Patterns: every builder, the indices that they make, and everything that they refuse.
#include "block_sparse/pattern.h"

#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <random>
#include <set>

#include "expect_error.h"

namespace block_sparse {
namespace {

using Mask = std::vector<uint8_t>;

constexpr int64_t kTooMany = int64_t{1} << 31;

Mask mask_of(const Pattern& pattern) {
  const auto [rows, cols, nnz] = pattern.grid();
  const PatternView view = pattern.view();
  Mask mask(static_cast<size_t>(rows * cols));
  for (int64_t r = 0; r < rows; ++r) {
    for (int32_t block = view.crow[r]; block < view.crow[r + 1]; ++block) {
      mask[static_cast<size_t>(r * cols + view.col[block])] = 1;
    }
  }
  return mask;
}

// The packed index, written down from the mask in the plainest way.
std::vector<int32_t> naive_index(const Mask& mask, int64_t rows, int64_t cols) {
  std::vector<int32_t> crow{0}, col, row, ccol{0}, trow, perm;
  std::map<std::pair<int64_t, int64_t>, int32_t> number;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      if (mask[static_cast<size_t>(r * cols + c)] == 0) continue;
      number[{r, c}] = static_cast<int32_t>(col.size());
      col.push_back(static_cast<int32_t>(c));
      row.push_back(static_cast<int32_t>(r));
    }
    crow.push_back(static_cast<int32_t>(col.size()));
  }
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t r = 0; r < rows; ++r) {
      if (mask[static_cast<size_t>(r * cols + c)] == 0) continue;
      trow.push_back(static_cast<int32_t>(r));
      perm.push_back(number[{r, c}]);
    }
    ccol.push_back(static_cast<int32_t>(trow.size()));
  }
  std::vector<int32_t> packed;
  for (const auto* part : {&crow, &col, &row, &ccol, &trow, &perm}) {
    packed.insert(packed.end(), part->begin(), part->end());
  }
  return packed;
}

std::vector<int32_t> packed(const Pattern& pattern) {
  return {pattern.packed().begin(), pattern.packed().end()};
}

Mask random_mask(int64_t rows, int64_t cols, double density, uint32_t seed) {
  std::mt19937 generator(seed);
  std::bernoulli_distribution present(density);
  Mask mask(static_cast<size_t>(rows * cols));
  for (auto& cell : mask) cell = present(generator) ? 1 : 0;
  return mask;
}

TEST(Pattern, EveryBuilderMakesTheSameIndices) {
  uint32_t seed = 0;
  for (const auto& [rows, cols] : std::initializer_list<std::pair<int64_t, int64_t>>{
           {0, 0}, {0, 5}, {5, 0}, {1, 1}, {1, 9}, {9, 1}, {7, 12}, {40, 33}}) {
    for (const double density : {0.0, 0.05, 0.5, 1.0}) {
      SCOPED_TRACE(concat(rows, " x ", cols, " at ", density));
      const Mask mask = random_mask(rows, cols, density, ++seed);
      const std::vector<int32_t> expected = naive_index(mask, rows, cols);

      const Pattern from_mask = Pattern::from_mask(mask, rows, cols);
      EXPECT_EQ(packed(from_mask), expected);
      EXPECT_EQ(mask_of(from_mask), mask);
      EXPECT_NO_THROW(check_bounds(from_mask.view()));

      const PatternView view = from_mask.view();
      const auto nnz = static_cast<size_t>(view.grid.nnz);
      EXPECT_EQ(packed(Pattern::from_bsr({view.crow, static_cast<size_t>(rows) + 1},
                                         {view.col, nnz}, cols)),
                expected);

      std::vector<Pattern::Block> blocks;
      for (size_t i = 0; i < nnz; ++i) blocks.emplace_back(view.row[i], view.col[i]);
      std::shuffle(blocks.begin(), blocks.end(), std::mt19937(seed));
      EXPECT_EQ(packed(Pattern::from_blocks(blocks, rows, cols)), expected);
    }
  }
}

TEST(Pattern, AnyNonzeroByteOfAMaskMeansPresent) {
  EXPECT_EQ(Pattern::from_mask(Mask{0, 255, 2, 0}, 2, 2).grid().nnz, 2);
}

TEST(Pattern, FullHasEveryBlock) {
  for (const auto& [rows, cols] : std::initializer_list<std::pair<int64_t, int64_t>>{
           {0, 0}, {0, 3}, {3, 0}, {1, 1}, {3, 7}, {7, 3}}) {
    const Mask ones(static_cast<size_t>(rows * cols), 1);
    EXPECT_EQ(packed(Pattern::full(rows, cols)), naive_index(ones, rows, cols));
  }
}

TEST(Pattern, BandedHasTheBlocksNearTheDiagonal) {
  EXPECT_EQ(mask_of(Pattern::banded(4, 4, 1)), (Mask{1, 1, 0, 0,  //
                                                     1, 1, 1, 0,  //
                                                     0, 1, 1, 1,  //
                                                     0, 0, 1, 1}));
  EXPECT_EQ(mask_of(Pattern::banded(2, 4, 0)), (Mask{1, 0, 0, 0,  //
                                                     0, 0, 1, 0}));
  EXPECT_EQ(mask_of(Pattern::banded(4, 2, 0)), (Mask{1, 0,  //
                                                     1, 0,  //
                                                     0, 1,  //
                                                     0, 1}));
  EXPECT_EQ(Pattern::banded(0, 4, 1).grid().nnz, 0);
  EXPECT_EQ(Pattern::banded(4, 0, 1).grid().nnz, 0);
  EXPECT_EQ(Pattern::banded(3, 3, std::numeric_limits<int64_t>::max()).grid().nnz, 9);
}

TEST(Pattern, RandomHasExactlyTheBlocksAskedFor) {
  for (const bool balanced : {false, true}) {
    for (int64_t nnz = 0; nnz <= 35; ++nnz) {
      const Pattern pattern = Pattern::random(5, 7, nnz, static_cast<uint64_t>(nnz), balanced);
      EXPECT_EQ(pattern.grid().nnz, nnz);
      EXPECT_EQ(packed(pattern), naive_index(mask_of(pattern), 5, 7));
    }
  }
  EXPECT_EQ(Pattern::random(0, 7, 0, 1).grid().nnz, 0);
  EXPECT_EQ(Pattern::random(0, 7, 0, 1, true).grid().nnz, 0);
}

// A 2 x 3 grid has 20 sets of 3 blocks; each must come up as often as the others. The chi-square
// statistic has 19 degrees of freedom: above 43.8 once in a thousand, and the seeds are fixed.
TEST(Pattern, RandomIsUniformWithoutReplacement) {
  constexpr int kDraws = 20000;
  constexpr double kExpected = kDraws / 20.0;
  std::map<std::string, int> seen;
  for (uint64_t seed = 0; seed < kDraws; ++seed) {
    const Mask mask = mask_of(Pattern::random(2, 3, 3, seed));
    ++seen[std::string(mask.begin(), mask.end())];
  }
  ASSERT_EQ(seen.size(), 20u);
  double chi_square = 0;
  for (const auto& [mask, count] : seen) {
    chi_square += (count - kExpected) * (count - kExpected) / kExpected;
  }
  EXPECT_LT(chi_square, 43.8);
}

// The numbers are part of the interface: a seed in a checkpoint means the same pattern for ever.
TEST(Pattern, RandomIsTheSameEverywhere) {
  const Mask plain{0, 1, 0, 1, 1,  //
                   1, 1, 0, 0, 0,  //
                   0, 0, 0, 0, 1};
  const Mask balanced{0, 0, 1, 1, 0,  //
                      0, 0, 0, 1, 1,  //
                      1, 1, 0, 0, 0};
  EXPECT_EQ(mask_of(Pattern::random(3, 5, 6, 42)), plain);
  EXPECT_EQ(mask_of(Pattern::random(3, 5, 6, 42, true)), balanced);
  EXPECT_NE(mask_of(Pattern::random(3, 5, 6, 43)), plain);
}

TEST(Pattern, BalancedRowsAndColumnsDifferByAtMostOne) {
  for (const auto& [rows, cols, nnz] : std::initializer_list<std::tuple<int64_t, int64_t, int64_t>>{
           {8, 8, 16}, {8, 8, 13}, {5, 9, 31}, {9, 5, 31}, {16, 3, 40}, {3, 16, 5}, {1, 6, 4}}) {
    for (uint64_t seed = 0; seed < 50; ++seed) {
      SCOPED_TRACE(concat(rows, " x ", cols, ", ", nnz, " blocks, seed ", seed));
      const Pattern pattern = Pattern::random(rows, cols, nnz, seed, true);
      const PatternView view = pattern.view();
      std::set<int32_t> per_row, per_col;
      for (int64_t r = 0; r < rows; ++r) per_row.insert(view.crow[r + 1] - view.crow[r]);
      for (int64_t c = 0; c < cols; ++c) per_col.insert(view.ccol[c + 1] - view.ccol[c]);
      EXPECT_LE(*per_row.rbegin() - *per_row.begin(), 1);
      EXPECT_LE(*per_col.rbegin() - *per_col.begin(), 1);
    }
  }
}

TEST(PatternErrors, Bsr) {
  using Index = std::vector<int32_t>;
  const auto bsr = [](Index crow, Index col, int64_t block_cols) {
    return [=] { Pattern::from_bsr(crow, col, block_cols); };
  };
  EXPECT_NO_THROW(bsr({0, 1, 3}, {2, 0, 1}, 3)());
  expect_error(bsr({}, {}, 3), "crow_indices: is empty");
  expect_error(bsr({0}, {}, -1), "both must be at least 0");
  expect_error(bsr({0}, {}, kTooMany), "overflows int32");
  expect_error(bsr({1, 1}, {0}, 3), "crow_indices: must start at 0, got 1");
  expect_error(bsr({0, 2}, {0}, 3), "crow_indices: must end at the number of blocks, 1, got 2");
  expect_error(bsr({0, 2, 1}, {0}, 3), "crow_indices: must ascend");
  expect_error(bsr({0, -1, 1}, {0}, 3), "crow_indices: must ascend");
  expect_error(bsr({0, 1}, {3}, 3), "col_indices: entry 0 is 3");
  expect_error(bsr({0, 1}, {-1}, 3), "col_indices: entry 0 is -1");
  expect_error(bsr({0, 2}, {1, 1}, 3), "col_indices: must ascend");
  expect_error(bsr({0, 2}, {1, 0}, 3), "block row 0 has 1 before 0");
}

TEST(PatternErrors, Blocks) {
  const auto blocks = [](std::vector<Pattern::Block> list, int64_t rows, int64_t cols) {
    return [=] { Pattern::from_blocks(list, rows, cols); };
  };
  expect_error(blocks({{0, 0}, {1, 1}, {0, 0}}, 2, 2), "blocks: (0, 0) is named twice");
  expect_error(blocks({{2, 0}}, 2, 2), "blocks: (2, 0) is outside the grid of 2 x 2");
  expect_error(blocks({{0, -1}}, 2, 2), "blocks: (0, -1) is outside");
  expect_error(blocks({{-1, 0}}, 2, 2), "blocks: (-1, 0) is outside");
  expect_error(blocks({{0, 2}}, 2, 2), "blocks: (0, 2) is outside");
  expect_error(blocks({}, -1, 2), "-1 x 2");
  expect_error(blocks({}, kTooMany, 2), "overflows int32");
}

TEST(PatternErrors, MaskRandomBandedFull) {
  const Mask mask(5);
  expect_error([&] { Pattern::from_mask(mask, 2, 3); }, "mask: has 5 entries");
  expect_error([&] { Pattern::from_mask(mask, -1, -5); }, "-1 x -5");
  expect_error([] { Pattern::random(2, 3, 7, 1); }, "nnz: 7 blocks do not fit a grid of 2 x 3");
  expect_error([] { Pattern::random(2, 3, -1, 1); }, "nnz: -1");
  expect_error([] { Pattern::random(1 << 20, 1 << 20, kTooMany, 1); }, "overflow int32");
  expect_error([] { Pattern::banded(3, 3, -1); }, "bandwidth: must be at least 0, got -1");
  // Refused before anything of that size is allocated.
  expect_error([] { Pattern::full(1 << 16, 1 << 16); }, "overflow int32");
  expect_error([] { Pattern::banded(1 << 20, 1 << 20, 1 << 12); }, "overflow int32");
  expect_error([] { Pattern::full(0, kTooMany); }, "overflows int32");
}

// Every entry of a packed index, made negative and made too large: what stays in bounds passes.
TEST(PatternErrors, CheckBoundsSeesEveryEntryOutOfRange) {
  const Pattern pattern = Pattern::random(6, 4, 11, 3);
  const std::vector<int32_t> good = packed(pattern);
  for (size_t i = 0; i < good.size(); ++i) {
    for (const int32_t bad : {-1, 1 << 20, std::numeric_limits<int32_t>::min()}) {
      std::vector<int32_t> index = good;
      index[i] = bad;
      expect_error([&] { check_bounds(PatternView::of_packed(index.data(), pattern.grid())); },
                   "index: ");
    }
  }
}

}  // namespace
}  // namespace block_sparse
