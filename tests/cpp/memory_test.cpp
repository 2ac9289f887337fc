// What a sanitizer must see on every kernel and instruction set: products large enough to be split
// among threads and walked in several chunks, and indices that are wrong but pass check_bounds.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "block_sparse/check.h"
#include "levels.h"
#include "problem.h"

namespace block_sparse {
namespace {

constexpr Product kProducts[] = {Product::forward, Product::grad_input, Product::grad_weight};
constexpr Dtype kDtypes[] = {Dtype::f64, Dtype::f32, Dtype::bf16, Dtype::f16};

TEST(MemoryTest, LargeProductsInPartsAndChunks) {
  struct Shape {
    int64_t tokens, out, in;
    BlockShape block;
  };
  std::mt19937 generator(1);
  std::uniform_int_distribution<int> integer(-2, 2);
  for (const Shape& shape :
       {Shape{600, 130, 140, {32, 32}}, Shape{1100, 66, 140, {16, 16}},
        Shape{300, 180, 200, {4, 4}}, Shape{1100, 60, 70, {1, 16}}, Shape{60, 700, 70, {1, 16}},
        Shape{600, 70, 60, {32, 1}}, Shape{60, 70, 700, {32, 1}}, Shape{7, 700, 1000, {64, 32}}}) {
    for (const Product product : kProducts) {
      for (const Dtype dtype : kDtypes) {
        const ProductDesc desc{product,   dtype,    Epilogue::none, shape.tokens,
                               shape.out, shape.in, shape.block,    0};
        const GridShape grid = desc.grid();
        Problem problem = make_problem(desc,
                                       Pattern::random(grid.block_rows, grid.block_cols,
                                                       grid.block_rows * grid.block_cols / 2, 1),
                                       [&] { return integer(generator); });
        const Numbers expected = expected_of(problem).result;
        for_each_level([&] {
          for (const Kernel& kernel : kernels(Backend::cpu)) {
            if (kernel.name == "cpu_reference" || kernel.why_not(problem.desc)) continue;
            SCOPED_TRACE(std::string(kernel.name) + ": " + to_string(problem.desc));
            for (const int threads : {1, 2, 5}) {
              EXPECT_EQ(result_of(kernel, problem, in_parts(threads)), rounded(dtype, expected));
            }
          }
        });
      }
    }
  }
}

// check_bounds lets pass what cannot lead outside an array. Then it must not, on any kernel.
TEST(MemoryTest, AnIndexThatPassesTheCheckLeadsNowhere) {
  std::mt19937 generator(2);
  int64_t accepted = 0;
  for (const Product product : kProducts) {
    for (const Dtype dtype : kDtypes) {
      for (const int64_t tokens : {int64_t{3}, int64_t{20}}) {
        const ProductDesc desc{product, dtype, Epilogue::none, tokens, 66, 70, {16, 16}, 0};
        Problem problem = make_problem(desc, Pattern::random(5, 5, 12, 1), [] { return 1.0; });
        const auto packed = problem.pattern.packed();
        for (int round = 0; round < 600; ++round) {
          std::vector<int32_t> index(packed.begin(), packed.end());
          for (int change = 0; change <= round % 6; ++change) {
            index[generator() % index.size()] = static_cast<int32_t>(generator() % 14);
          }
          const PatternView view = PatternView::of_packed(index.data(), problem.desc.grid());
          try {
            check_bounds(view);
          } catch (const Error&) {
            continue;
          }
          ++accepted;
          for (const Kernel& kernel : kernels(Backend::cpu)) {
            if (!kernel.why_not(problem.desc)) result_of(kernel, problem, {}, view);
          }
        }
      }
    }
  }
  EXPECT_GT(accepted, 1000);
}

// Thin blocks with far more outputs than a kernel sums at a time; it walks them in their order.
TEST(MemoryTest, BlocksOutOfOrderLeadNowhere) {
  std::mt19937 generator(3);
  for (const bool forward : {true, false}) {
    const ProductDesc desc =
        forward ? ProductDesc{Product::forward, Dtype::f32, {}, 20, 1300, 64, {1, 16}, 0}
                : ProductDesc{Product::grad_input, Dtype::f32, {}, 20, 64, 1300, {16, 1}, 0};
    const GridShape grid = desc.grid();
    Problem problem = make_problem(desc, Pattern::random(grid.block_rows, grid.block_cols, 2600, 1),
                                   [] { return 1.0; });
    std::vector<int32_t> index(problem.pattern.packed().begin(), problem.pattern.packed().end());
    const PatternView view = PatternView::of_packed(index.data(), problem.desc.grid());
    const auto shuffle = [&](const int32_t* entries) {
      const auto first = index.begin() + (entries - index.data());
      std::shuffle(first, first + problem.desc.nnz, generator);
    };
    shuffle(view.col);
    shuffle(view.trow);
    check_bounds(view);
    for (const Kernel& kernel : kernels(Backend::cpu)) {
      if (!kernel.why_not(problem.desc)) result_of(kernel, problem, {}, view);
    }
  }
}

TEST(MemoryTest, ARowWithMoreBlocksThanColumnsIsRefused) {
  const Pattern pattern = Pattern::full(2, 2);
  std::vector<int32_t> index(pattern.packed().begin(), pattern.packed().end());
  index[1] = 4;  // all four blocks in the first block row, which has room for two
  EXPECT_THROW(check_bounds(PatternView::of_packed(index.data(), pattern.grid())), Error);
}

}  // namespace
}  // namespace block_sparse
