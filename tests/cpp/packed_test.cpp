// Packed values: the order, there and back, and forward from it on every kernel that takes it.
#include "block_sparse/packed.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "expect_error.h"
#include "levels.h"
#include "problem.h"

namespace block_sparse {
namespace {

constexpr Dtype kDtypes[] = {Dtype::f64, Dtype::f32, Dtype::bf16, Dtype::f16};
constexpr BlockShape kBlocks[] = {{32, 32}, {16, 16}, {64, 16}, {48, 80}, {16, 1},
                                  {32, 7},  {8, 8},   {1, 32},  {5, 7}};

TEST(Packed, EveryElementHasItsPlace) {
  for (const Dtype dtype : kDtypes) {
    for (const BlockShape block : kBlocks) {
      const PackedOrder order = packed_order(dtype, block);
      std::vector<int64_t> offsets;
      for (int64_t n = 0; n < block.out; ++n) {
        for (int64_t k = 0; k < block.in; ++k) offsets.push_back(order.offset(n, k));
      }
      std::sort(offsets.begin(), offsets.end());
      for (size_t i = 0; i < offsets.size(); ++i) {
        ASSERT_EQ(offsets[i], static_cast<int64_t>(i)) << block.out << "x" << block.in;
      }
    }
  }
}

TEST(Packed, TheOrderIsWhatTheHeaderSays) {
  // Sixteen outputs of a step of the depth are side by side; in bfloat16 of two steps.
  EXPECT_EQ(packed_order(Dtype::f32, {16, 2}).offset(3, 1), 16 + 3);
  EXPECT_EQ(packed_order(Dtype::f32, {32, 2}).offset(19, 1), 2 * 16 + 16 + 3);
  EXPECT_EQ(packed_order(Dtype::f64, {16, 2}).offset(11, 1), 2 * 8 + 8 + 3);
  EXPECT_EQ(packed_order(Dtype::bf16, {16, 2}).offset(3, 1), 2 * 3 + 1);
  EXPECT_EQ(packed_order(Dtype::bf16, {16, 3}).offset(3, 1), 16 + 3) << "an odd number of inputs";
  EXPECT_EQ(packed_order(Dtype::f32, {12, 2}).offset(3, 1), 2 * 3 + 1) << "canonical";
}

TEST(Packed, ThereAndBack) {
  for (const Dtype dtype : kDtypes) {
    for (const BlockShape block : kBlocks) {
      Numbers numbers;
      for (int64_t i = 0; i < 3 * block.out * block.in; ++i) {
        numbers.push_back(static_cast<double>(i % 251));
      }
      Buffer values(dtype, numbers), packed(dtype, numbers), back(dtype, Numbers(numbers.size()));
      pack(dtype, block, 3, values.data(), packed.data());
      EXPECT_EQ(packed.numbers() == numbers,
                packed_order(dtype, block).strip == 0 || block.in == 1);
      unpack(dtype, block, 3, packed.data(), back.data());
      EXPECT_EQ(back.numbers(), numbers);
    }
  }
}

TEST(Packed, ForwardIsExactOnSmallIntegers) {
  std::mt19937 generator(1);
  std::uniform_int_distribution<int> integer(-2, 2);
  int64_t out = 0, in = 0;
  for (const BlockShape block : kBlocks) {
    for (const Dtype dtype : kDtypes) {
      if (packed_order(dtype, block).strip == 0) continue;
      for (const int64_t tokens : {1, 2, 3, 5, 8, 13, 16, 40, 300}) {
        const bool ragged = tokens % 2 == 1;
        out = 5 * block.out - (ragged ? block.out / 3 : 0);
        in = 7 * block.in - (ragged ? block.in / 3 : 0);
        ProductDesc desc{Product::forward,
                         dtype,
                         ragged ? Epilogue::bias : Epilogue::none,
                         tokens,
                         out,
                         in,
                         block,
                         0};
        desc.packed = true;
        Problem problem = make_problem(desc, Pattern::random(5, 7, ragged ? 17 : 35, 1),
                                       [&] { return integer(generator); });
        const Numbers expected = rounded(dtype, expected_of(problem).result);
        for_each_level(
            [&] { EXPECT_GE(expect_everywhere(problem, expected), 2) << "one is the reference"; });
      }
    }
  }
}

TEST(Packed, AWrongElementShows) {
  ProductDesc desc{Product::forward, Dtype::f32, Epilogue::none, 3, 64, 64, {32, 32}, 0};
  desc.packed = true;
  Problem problem = make_problem(desc, Pattern::full(2, 2), [] { return 1.0; });
  const Numbers right = expected_of(problem).result;
  const Kernel& kernel = choose(Backend::cpu, problem.desc);
  ASSERT_EQ(result_of(kernel, problem, {}), right);
  problem.values[5] += 1;
  EXPECT_NE(result_of(kernel, problem, {}), right);
}

TEST(Packed, WhatCannotReadThemSaysSo) {
  ProductDesc desc{Product::forward, Dtype::f32, Epilogue::none, 4, 64, 64, {32, 32}, 4};
  desc.packed = true;
  EXPECT_NE(to_string(desc).find(" packed"), std::string::npos);
  EXPECT_EQ(choose(Backend::cpu, desc).name, "cpu_panel");
  const std::string text = explain(Backend::cpu, desc, {});
  EXPECT_NE(text.find("cpu_simd: refuses: reads values in canonical order"), std::string::npos);
  desc.product = Product::grad_input;
  expect_error([&] { choose(Backend::cpu, desc); }, "reads packed values in forward only");
}

}  // namespace
}  // namespace block_sparse
