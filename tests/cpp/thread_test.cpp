// Products on real threads, several products at a time, and each split among several: what a
// ThreadSanitizer must see, on every kernel and instruction set.
#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "levels.h"
#include "problem.h"

namespace block_sparse {
namespace {

constexpr Dtype kDtypes[] = {Dtype::f64, Dtype::f32, Dtype::bf16, Dtype::f16};

// A thread for each index.
Execution on_threads(int threads) {
  Execution execution;
  execution.threads = threads;
  execution.parallel_for = [](int64_t count, Execution::Body body, const void* context) {
    std::vector<std::thread> pool;
    for (int64_t i = 0; i < count; ++i) {
      pool.emplace_back([=] { body(context, i, i + 1); });
    }
    for (std::thread& thread : pool) thread.join();
  };
  return execution;
}

TEST(Threads, ASplitProductIsWhatOneThreadComputes) {
  struct Shape {
    int64_t tokens, out, in;
    BlockShape block;
  };
  std::mt19937 generator(1);
  std::uniform_int_distribution<int> integer(-2, 2);
  for (const Shape& shape : {Shape{260, 130, 140, {32, 32}}, Shape{7, 700, 1000, {64, 32}},
                             Shape{300, 60, 200, {1, 16}}}) {
    for (const Product product : {Product::forward, Product::grad_input, Product::grad_weight}) {
      for (const Dtype dtype : kDtypes) {
        ProductDesc desc{product,   dtype,    Epilogue::none, shape.tokens,
                         shape.out, shape.in, shape.block,    0};
        const GridShape grid = desc.grid();
        const int64_t nnz = grid.block_rows * grid.block_cols * 3 / 4;
        Problem problem =
            make_problem(desc, Pattern::random(grid.block_rows, grid.block_cols, nnz, 1),
                         [&] { return integer(generator); });
        for_each_level([&] {
          for (const bool packed : {false, true}) {
            problem.desc.packed = packed && packed_order(dtype, shape.block).strip > 0;
            for (const Kernel& kernel : kernels(Backend::cpu)) {
              if (kernel.name == "cpu_reference" || kernel.why_not(problem.desc)) continue;
              SCOPED_TRACE(std::string(kernel.name) + ": " + to_string(problem.desc));
              EXPECT_EQ(result_of(kernel, problem, on_threads(3)), result_of(kernel, problem, {}));
            }
          }
        });
      }
    }
  }
}

TEST(Threads, ProductsAtTheSameTime) {
  std::mt19937 generator(2);
  std::uniform_int_distribution<int> integer(-2, 2);
  const ProductDesc desc{Product::forward, Dtype::f32, Epilogue::bias, 130, 96, 160, {32, 32}, 0};
  std::vector<Problem> problems;
  std::vector<Numbers> results(4);
  for (uint64_t seed = 0; seed < results.size(); ++seed) {
    problems.push_back(
        make_problem(desc, Pattern::random(3, 5, 8, seed), [&] { return integer(generator); }));
  }
  std::vector<std::thread> threads;
  for (size_t i = 0; i < problems.size(); ++i) {
    threads.emplace_back([&, i] {
      const Kernel& kernel = choose(Backend::cpu, problems[i].desc);
      results[i] = result_of(kernel, problems[i], on_threads(2));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < problems.size(); ++i) {
    EXPECT_EQ(results[i], expected_of(problems[i]).result);
  }
}

}  // namespace
}  // namespace block_sparse
