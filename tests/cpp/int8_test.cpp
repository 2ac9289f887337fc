// int8 values with a scale for each output: forward on every kernel that takes them.
#include <gtest/gtest.h>

#include <random>

#include "expect_error.h"
#include "levels.h"
#include "problem.h"

namespace block_sparse {
namespace {

constexpr Dtype kDtypes[] = {Dtype::f64, Dtype::f32, Dtype::bf16, Dtype::f16};
constexpr BlockShape kBlocks[] = {{32, 32}, {16, 16}, {64, 16}, {48, 80}, {16, 1},
                                  {32, 7},  {8, 24},  {1, 32},  {5, 17}};

ProductDesc int8_desc(Dtype dtype, Epilogue epilogue, int64_t tokens, int64_t out, int64_t in,
                      BlockShape block) {
  ProductDesc desc{Product::forward, dtype, epilogue, tokens, out, in, block, 0};
  desc.int8 = true;
  return desc;
}

TEST(Int8, ForwardIsExactOnSmallIntegers) {
  std::mt19937 generator(1);
  std::uniform_int_distribution<int> integer(-2, 2);
  for (const BlockShape block : kBlocks) {
    for (const Dtype dtype : kDtypes) {
      for (const int64_t tokens : {0, 1, 3, 5, 8, 13, 40, 300}) {
        const bool ragged = tokens % 2 == 1;
        const ProductDesc desc = int8_desc(dtype, ragged ? Epilogue::bias : Epilogue::none, tokens,
                                           5 * block.out - (ragged ? block.out / 3 : 0),
                                           7 * block.in - (ragged ? block.in / 3 : 0), block);
        Problem problem = make_problem(desc, Pattern::random(5, 7, ragged ? 17 : 35, 1),
                                       [&] { return integer(generator); });
        const Numbers expected = rounded(dtype, expected_of(problem).result);
        for_each_level([&] { EXPECT_GE(expect_everywhere(problem, expected), 2); });
      }
    }
  }
}

// The largest that there are, which a conversion may take for something else.
TEST(Int8, EveryValueIsRead) {
  for (const Dtype dtype : kDtypes) {
    for (const int64_t tokens : {1, 9, 130}) {
      Problem problem = make_problem(int8_desc(dtype, Epilogue::none, tokens, 16, 16, {16, 16}),
                                     Pattern::full(1, 1), [] { return 0.0; });
      for (int i = 0; i < 256; ++i) problem.values[static_cast<size_t>(i)] = i - 128;
      for (int64_t t = 0; t < tokens; ++t) problem.x(t, t % 16) = 1;
      const Numbers expected = rounded(dtype, expected_of(problem).result);
      for_each_level([&] { EXPECT_GE(expect_everywhere(problem, expected), 2); });
    }
  }
}

TEST(Int8, AWrongValueOrScaleShows) {
  Problem problem = make_problem(int8_desc(Dtype::f32, Epilogue::bias, 3, 64, 64, {32, 32}),
                                 Pattern::full(2, 2), [] { return 1.0; });
  const Numbers right = expected_of(problem).result;
  const Kernel& kernel = choose(Backend::cpu, problem.desc);
  ASSERT_EQ(result_of(kernel, problem, {}), right);
  problem.values[5] += 1;
  EXPECT_NE(result_of(kernel, problem, {}), right);
  problem.values[5] -= 1;
  problem.scales[63] *= 2;
  EXPECT_NE(result_of(kernel, problem, {}), right);
}

TEST(Int8, WhichKernelTakesThem) {
  ProductDesc desc = int8_desc(Dtype::bf16, Epilogue::none, 4, 64, 64, {32, 32});
  desc.nnz = 4;
  EXPECT_NE(to_string(desc).find(" int8"), std::string::npos);
  EXPECT_EQ(choose(Backend::cpu, desc).name, "cpu_few_tokens");
  desc.tokens = 64;
  EXPECT_EQ(choose(Backend::cpu, desc).name, "cpu_simd");
  desc.tokens = 128;
  EXPECT_EQ(choose(Backend::cpu, desc).name, "cpu_panel");
  for (const Product product : {Product::grad_input, Product::grad_weight}) {
    desc.product = product;
    expect_error([&] { choose(Backend::cpu, desc); }, "reads int8 values in forward only");
  }
}

}  // namespace
}  // namespace block_sparse
