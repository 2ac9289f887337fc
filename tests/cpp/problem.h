// A product with its operands in memory, run by a kernel, and the same product by definition.
// What must never be read is NaN: the part of a block that lies outside the matrix, and the gaps
// between rows.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include "block_sparse/packed.h"
#include "kernel.h"

namespace block_sparse {

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

inline Numbers rounded(Dtype dtype, const Numbers& numbers) {
  return Buffer(dtype, numbers).numbers();
}

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
  Numbers scales;  // of the outputs, where values are int8: powers of two, so that all stays exact
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
  for (int64_t n = 0; n < desc.out_features && desc.int8; ++n) {
    problem.scales.push_back(std::exp2(n % 4 - 2));
  }
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

inline Expected expected_of(Problem& p) {
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
            if (desc.product == Product::forward) {
              const double scale = desc.int8 ? p.scales[static_cast<size_t>(n)] : 1;
              expected.add(at(n), p.x(t, k) * p.values[i] * scale);
            }
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

// As int8, which has no NaN: what must not be read is something that shows.
inline std::vector<int8_t> int8_of(const Numbers& numbers) {
  std::vector<int8_t> result;
  for (const double number : numbers) {
    result.push_back(static_cast<int8_t>(std::isnan(number) ? 99 : number));
  }
  return result;
}

// Runs the parts in turn, last first: none may count on another.
inline Execution in_parts(int threads) {
  Execution execution;
  execution.threads = threads;
  execution.parallel_for = [](int64_t count, Execution::Body body, const void* context) {
    for (int64_t i = count; i > 0; --i) body(context, i - 1, i);
  };
  return execution;
}

// Runs `kernel` on copies of the operands. The gaps of the output must come back untouched.
inline Numbers result_of(const Kernel& kernel, Problem& p, const Execution& execution,
                         const PatternView& pattern) {
  const ProductDesc& desc = p.desc;
  const Dtype dtype = desc.dtype;
  const bool sampled = desc.product == Product::grad_weight;
  Dense output{desc.tokens,
               desc.product == Product::forward ? desc.out_features : desc.in_features};
  if (sampled) output = {1, static_cast<int64_t>(p.values.size())};
  Buffer x(dtype, p.x.numbers), dy(dtype, p.dy.numbers), values(dtype, p.values),
      bias(dtype, p.bias), out(dtype, output.numbers), scales(Dtype::f32, p.scales);
  std::vector<int8_t> int8_values = int8_of(desc.int8 ? p.values : Numbers());

  Buffer packed(dtype, p.values);
  if (desc.packed) pack(dtype, desc.block, desc.nnz, values.data(), packed.data());

  ProductArgs args;
  if (desc.product != Product::grad_input) args.x = {x.data(), p.x.stride};
  if (desc.product != Product::forward) args.dy = {dy.data(), p.dy.stride};
  args.weight = {pattern, sampled ? nullptr : desc.packed ? packed.data() : values.data()};
  if (desc.int8) {
    args.weight = {pattern, int8_values.data(), static_cast<const float*>(scales.data())};
  }
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

inline Numbers result_of(const Kernel& kernel, Problem& p, const Execution& execution) {
  return result_of(kernel, p, execution, p.pattern.view());
}

// Runs every kernel that takes the problem, on one thread and on two, and returns how many do.
inline int expect_everywhere(Problem& problem, const Numbers& expected) {
  int accepted = 0;
  for (const Kernel& kernel : kernels(Backend::cpu)) {
    if (kernel.why_not(problem.desc)) continue;
    SCOPED_TRACE(std::string(kernel.name) + ": " + to_string(problem.desc));
    EXPECT_EQ(result_of(kernel, problem, {}), expected);
    EXPECT_EQ(result_of(kernel, problem, in_parts(2)), expected);
    ++accepted;
  }
  return accepted;
}

}  // namespace block_sparse
