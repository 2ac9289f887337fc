// Products: every kernel of the list against a dense product that knows nothing of patterns.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "problem.h"
#include "reference.h"

namespace block_sparse {
namespace {

// What src/cuda/reference.cu runs, on the CPU: the same functions, with the accumulator that the
// GPU uses, one element of the output at a time.
Kernel cuda_reference_on_the_cpu() {
  Kernel kernel = kernels(Backend::cpu).back();
  kernel.name = "cuda_reference on the CPU";
  kernel.run = [](const ProductDesc& desc, const ProductArgs& args, const Execution&) {
    const int64_t cols = reference::output_cols(desc);
    visit(desc.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      for (int64_t i = 0; i < reference::output_rows(desc) * cols; ++i) {
        reference::element<typename Traits<T>::Accumulate, T>(desc, args, i / cols, i % cols);
      }
    });
  };
  return kernel;
}

std::vector<Kernel> all_kernels() {
  const auto list = kernels(Backend::cpu);
  std::vector<Kernel> all(list.begin(), list.end());
  all.push_back(cuda_reference_on_the_cpu());
  return all;
}

// Two threads that take turns, the later range first: ranges must not depend on each other.
Execution two_threads() {
  Execution execution;
  execution.threads = 2;
  execution.parallel_for = [](int64_t count, Execution::Body body, const void* context) {
    body(context, count / 2, count);
    body(context, 0, count / 2);
  };
  return execution;
}

struct Shape {
  int64_t tokens, out, in;
  BlockShape block;
};

const Shape kShapes[] = {
    {1, 1, 1, {1, 1}},   {0, 8, 8, {4, 4}},       {3, 8, 8, {4, 4}},      {5, 7, 9, {4, 4}},
    {2, 13, 6, {1, 4}},  {2, 13, 6, {4, 1}},      {17, 5, 70, {8, 16}},   {4, 70, 5, {16, 8}},
    {3, 3, 3, {32, 32}}, {33, 96, 64, {32, 32}},  {7, 40, 40, {16, 16}},  {2, 0, 8, {4, 4}},
    {2, 8, 0, {4, 4}},   {40, 100, 68, {32, 32}}, {1, 64, 128, {64, 64}}, {19, 33, 65, {3, 5}},
};

class Products : public ::testing::TestWithParam<std::tuple<Product, Dtype, Epilogue>> {
 protected:
  // f(problem, kernel, execution) for every shape, density and kernel.
  template <class Draw, class F>
  void for_each(Draw draw, F f) {
    const auto [product, dtype, epilogue] = GetParam();
    uint64_t seed = 0;
    for (const Shape& shape : kShapes) {
      const ProductDesc desc{product,   dtype,    epilogue,    shape.tokens,
                             shape.out, shape.in, shape.block, 0};
      const GridShape grid = desc.grid();
      const int64_t cells = grid.block_rows * grid.block_cols;
      for (const int64_t nnz : {int64_t{0}, (cells + 3) / 4, (cells + 1) / 2, cells}) {
        Problem problem = make_problem(
            desc, Pattern::random(grid.block_rows, grid.block_cols, nnz, ++seed), draw);
        for (const Kernel& kernel : all_kernels()) {
          if (kernel.why_not(problem.desc)) continue;
          SCOPED_TRACE(std::string(kernel.name) + ": " + to_string(problem.desc));
          f(problem, kernel, Execution{});
          f(problem, kernel, two_threads());
        }
      }
    }
  }
};

TEST_P(Products, AreExactOnSmallIntegers) {
  std::mt19937 generator(1);
  std::uniform_int_distribution<int> integer(-2, 2);
  for_each([&] { return integer(generator); },
           [](Problem& problem, const Kernel& kernel, const Execution& execution) {
             ASSERT_EQ(result_of(kernel, problem, execution),
                       rounded(problem.desc.dtype, expected_of(problem).result));
           });
}

// One rounding to the dtype, and one to float (double for f64) for each term of the sum.
TEST_P(Products, AreCloseOnRealNumbers) {
  const Dtype dtype = std::get<1>(GetParam());
  const double unit = dtype == Dtype::f64    ? 0x1p-53
                      : dtype == Dtype::f32  ? 0x1p-24
                      : dtype == Dtype::bf16 ? 0x1p-8
                                             : 0x1p-11;
  const double sum_unit = dtype == Dtype::f64 ? 0x1p-53 : 0x1p-24;
  std::mt19937 generator(2);
  std::normal_distribution<double> normal;
  for_each([&] { return normal(generator); },
           [&](Problem& problem, const Kernel& kernel, const Execution& execution) {
             const Expected expected = expected_of(problem);
             const Numbers result = result_of(kernel, problem, execution);
             ASSERT_EQ(result.size(), expected.result.size());
             const ProductDesc& desc = problem.desc;
             const int64_t terms = std::max({desc.tokens, desc.out_features, desc.in_features}) + 1;
             for (size_t i = 0; i < result.size(); ++i) {
               const double tolerance =
                   1.01 * unit * std::abs(expected.result[i]) +
                   2 * sum_unit * static_cast<double>(terms) * expected.magnitude[i] + 0x1p-25;
               ASSERT_NEAR(result[i], expected.result[i], tolerance) << "element " << i;
             }
           });
}

std::string test_name(const ::testing::TestParamInfo<Products::ParamType>& info) {
  const auto [product, dtype, epilogue] = info.param;
  return std::string(to_string(product)) + "_" + std::string(to_string(dtype)) + "_" +
         std::string(to_string(epilogue));
}

constexpr Dtype kDtypes[] = {Dtype::f64, Dtype::f32, Dtype::bf16, Dtype::f16};
INSTANTIATE_TEST_SUITE_P(Bias, Products,
                         ::testing::Combine(::testing::Values(Product::forward),
                                            ::testing::ValuesIn(kDtypes),
                                            ::testing::Values(Epilogue::bias)),
                         test_name);
INSTANTIATE_TEST_SUITE_P(All, Products,
                         ::testing::Combine(::testing::Values(Product::forward, Product::grad_input,
                                                              Product::grad_weight),
                                            ::testing::ValuesIn(kDtypes),
                                            ::testing::Values(Epilogue::none)),
                         test_name);

// On a GPU nobody has looked at the indices. The reference clamps them, here as there: with one
// entry corrupt it may compute anything, but a sanitizer must see no invalid access.
TEST(ProductsTest, TheReferenceSurvivesACorruptIndex) {
  std::mt19937 generator(3);
  const Kernel reference = cuda_reference_on_the_cpu();
  for (Product product : {Product::forward, Product::grad_input, Product::grad_weight}) {
    const ProductDesc desc{product, Dtype::f32, Epilogue::none, 3, 21, 19, {4, 8}, 0};
    Problem problem = make_problem(desc, Pattern::random(6, 3, 7, 1), [] { return 1.0; });
    const auto packed = problem.pattern.packed();
    for (size_t i = 0; i < packed.size(); ++i) {
      for (const int32_t bad : {-1, 7, 1 << 30, std::numeric_limits<int32_t>::min()}) {
        std::vector<int32_t> index(packed.begin(), packed.end());
        index[i] = bad;
        result_of(reference, problem, {},
                  PatternView::of_packed(index.data(), problem.desc.grid()));
      }
    }
    for (int round = 0; round < 100; ++round) {
      std::vector<int32_t> index(packed.size());
      for (int32_t& entry : index) entry = static_cast<int32_t>(generator());
      result_of(reference, problem, {}, PatternView::of_packed(index.data(), problem.desc.grid()));
    }
  }
}

// The test of the test: one wrong element of one operand must show.
TEST(ProductsTest, AWrongElementShows) {
  const ProductDesc desc{Product::forward, Dtype::bf16, Epilogue::none, 5, 40, 40, {16, 16}, 0};
  Problem problem = make_problem(desc, Pattern::random(3, 3, 4, 1), [] { return 1.0; });
  const Kernel& kernel = kernels(Backend::cpu).back();
  const Numbers right = rounded(desc.dtype, expected_of(problem).result);
  ASSERT_EQ(result_of(kernel, problem, {}), right);
  problem.values[0] += 1;
  EXPECT_NE(result_of(kernel, problem, {}), right);
}

}  // namespace
}  // namespace block_sparse
