// Products: every kernel of the list against a dense product that knows nothing of patterns.
// Small integers, so that equality is exact. What must never be read is NaN: the part of a block
// that lies outside the matrix, and the gaps between rows.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <random>

#include "kernel.h"

namespace block_sparse {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int64_t kGap = 3;  // elements between the rows of a dense operand

using Numbers = std::vector<double>;

// Numbers as a kernel sees them: exactly as many bytes as there are, so that a sanitizer sees more.
class Buffer {
 public:
  Buffer(Dtype dtype, const Numbers& numbers)
      : dtype_(dtype), count_(numbers.size()), bytes_(numbers.size() * size_of(dtype)) {
    visit(dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      for (size_t i = 0; i < count_; ++i) {
        const T stored = store<T>(numbers[i]);
        std::memcpy(bytes_.data() + i * sizeof(T), &stored, sizeof(T));
      }
    });
  }
  void* data() { return bytes_.data(); }
  Numbers numbers() const {
    Numbers numbers(count_);
    visit(dtype_, [&](auto type) {
      using T = typename decltype(type)::type;
      for (size_t i = 0; i < count_; ++i) {
        T stored;
        std::memcpy(&stored, bytes_.data() + i * sizeof(T), sizeof(T));
        numbers[i] = load<double>(stored);
      }
    });
    return numbers;
  }

 private:
  Dtype dtype_;
  size_t count_;
  std::vector<std::byte> bytes_;
};

Numbers rounded(Dtype dtype, const Numbers& numbers) { return Buffer(dtype, numbers).numbers(); }

// A dense matrix with a gap of NaN after each row.
struct Dense {
  int64_t rows, cols, stride = cols + kGap;
  Numbers numbers = Numbers(static_cast<size_t>(rows * stride), kNan);

  double& operator()(int64_t r, int64_t c) { return numbers[static_cast<size_t>(r * stride + c)]; }
};

struct Problem {
  ProductDesc desc;
  Pattern pattern;
  Dense x, dy;
  Numbers values, bias;
};

template <class Draw>
Problem make_problem(ProductDesc desc, Pattern pattern, Draw draw) {
  desc.nnz = pattern.grid().nnz;
  const auto [block_out, block_in] = desc.block;
  Problem problem{desc,
                  std::move(pattern),
                  {desc.tokens, desc.in_features},
                  {desc.tokens, desc.out_features},
                  {},
                  {}};
  for (int64_t t = 0; t < desc.tokens; ++t) {
    for (int64_t k = 0; k < desc.in_features; ++k) problem.x(t, k) = draw();
    for (int64_t n = 0; n < desc.out_features; ++n) problem.dy(t, n) = draw();
  }
  const PatternView view = problem.pattern.view();
  for (int64_t block = 0; block < desc.nnz; ++block) {
    for (int64_t n = 0; n < block_out; ++n) {
      for (int64_t k = 0; k < block_in; ++k) {
        const bool inside = view.row[block] * block_out + n < desc.out_features &&
                            view.col[block] * block_in + k < desc.in_features;
        problem.values.push_back(inside ? draw() : kNan);
      }
    }
  }
  for (int64_t n = 0; n < desc.out_features; ++n) problem.bias.push_back(draw());
  for (Numbers* numbers :
       {&problem.x.numbers, &problem.dy.numbers, &problem.values, &problem.bias}) {
    *numbers = rounded(desc.dtype, *numbers);
  }
  return problem;
}

// The product by definition, in double, and beside it the sum of the absolute terms of each result
// (for tolerances).
struct Expected {
  Numbers result, magnitude;

  void add(size_t i, double term) {
    result[i] += term;
    magnitude[i] += std::abs(term);
  }
};

Expected expected_of(Problem& p) {
  const ProductDesc& desc = p.desc;
  const PatternView view = p.pattern.view();
  const auto [block_out, block_in] = desc.block;
  const int64_t cols = desc.product == Product::forward ? desc.out_features : desc.in_features;
  const size_t count = desc.product == Product::grad_weight
                           ? p.values.size()
                           : static_cast<size_t>(desc.tokens * cols);
  Expected expected{Numbers(count), Numbers(count)};
  size_t i = 0;  // of the value
  for (int64_t r = 0; r < view.grid.block_rows; ++r) {
    for (int32_t block = view.crow[r]; block < view.crow[r + 1]; ++block) {
      for (int64_t n = r * block_out; n < (r + 1) * block_out; ++n) {
        for (int64_t k = view.col[block] * block_in; k < (view.col[block] + 1) * block_in;
             ++k, ++i) {
          if (n >= desc.out_features || k >= desc.in_features) continue;
          for (int64_t t = 0; t < desc.tokens; ++t) {
            const auto at = [&](int64_t c) { return static_cast<size_t>(t * cols + c); };
            if (desc.product == Product::forward) expected.add(at(n), p.x(t, k) * p.values[i]);
            if (desc.product == Product::grad_input) expected.add(at(k), p.dy(t, n) * p.values[i]);
            if (desc.product == Product::grad_weight) expected.add(i, p.dy(t, n) * p.x(t, k));
          }
        }
      }
    }
  }
  if (desc.product == Product::forward && desc.epilogue == Epilogue::bias) {
    for (size_t j = 0; j < count; ++j) expected.add(j, p.bias[j % static_cast<size_t>(cols)]);
  }
  return expected;
}

// Runs `kernel` on copies of the operands. The gaps of the output must come back untouched.
Numbers result_of(const Kernel& kernel, Problem& p, const Execution& execution) {
  const ProductDesc& desc = p.desc;
  const Dtype dtype = desc.dtype;
  const bool sampled = desc.product == Product::grad_weight;
  Dense output{desc.tokens,
               desc.product == Product::forward ? desc.out_features : desc.in_features};
  if (sampled) output = {1, static_cast<int64_t>(p.values.size())};
  Buffer x(dtype, p.x.numbers), dy(dtype, p.dy.numbers), values(dtype, p.values),
      bias(dtype, p.bias), out(dtype, output.numbers);

  ProductArgs args;
  if (desc.product != Product::grad_input) args.x = {x.data(), p.x.stride};
  if (desc.product != Product::forward) args.dy = {dy.data(), p.dy.stride};
  args.weight = {p.pattern.view(), sampled ? nullptr : values.data()};
  if (desc.epilogue == Epilogue::bias) args.bias = bias.data();
  args.output = {out.data(), output.stride};
  const auto alignment = std::align_val_t{64};
  const int64_t bytes = workspace_size(kernel, desc, execution);
  args.workspace = bytes > 0 ? ::operator new(static_cast<size_t>(bytes), alignment) : nullptr;
  run(kernel, desc, args, execution);
  ::operator delete(args.workspace, alignment);

  Dense written{output.rows, output.cols, output.stride, out.numbers()};
  Numbers result;
  for (int64_t r = 0; r < written.rows; ++r) {
    for (int64_t c = 0; c < written.cols; ++c) result.push_back(written(r, c));
    for (int64_t c = written.cols; c < written.stride; ++c) EXPECT_TRUE(std::isnan(written(r, c)));
  }
  return result;
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
        for (const Kernel& kernel : kernels(Backend::cpu)) {
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
