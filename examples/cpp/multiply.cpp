// y = x Wt + bias with a block-sparse W: the C++ API of the library, without torch and Python.
// Checks the result against plain loops over the dense weight, and says which kernel ran, how fast.
#include <block_sparse/product.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <new>
#include <thread>
#include <vector>

namespace bs = block_sparse;

namespace {

// The core starts no threads: the program lends it some. (A server has a pool; here each call
// starts its own.)
const int kThreads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));

void on_threads(int64_t count, bs::Execution::Body body, const void* context) {
  std::vector<std::jthread> threads;
  for (int64_t i = 0; i < kThreads; ++i) {
    threads.emplace_back(body, context, count * i / kThreads, count * (i + 1) / kThreads);
  }
}

// Whole numbers from -4 to 4: their sums are exact, whatever the order.
std::vector<float> random_numbers(int64_t count) {
  std::vector<float> numbers(static_cast<size_t>(count));
  for (float& number : numbers) number = static_cast<float>(std::rand() % 9 - 4);
  return numbers;
}

std::vector<float> by_definition(const bs::ProductDesc& desc, const bs::PatternView& pattern,
                                 const float* x, const float* values, const float* bias) {
  std::vector<float> weight(static_cast<size_t>(desc.out_features * desc.in_features));
  for (int64_t block = 0; block < desc.nnz; ++block) {
    for (int64_t n = 0; n < desc.block.out; ++n) {
      for (int64_t k = 0; k < desc.block.in; ++k) {
        const int64_t out = pattern.row[block] * desc.block.out + n;
        const int64_t in = pattern.col[block] * desc.block.in + k;
        weight[static_cast<size_t>(out * desc.in_features + in)] = *values++;
      }
    }
  }
  std::vector<float> y;
  for (int64_t token = 0; token < desc.tokens; ++token) {
    for (int64_t out = 0; out < desc.out_features; ++out) {
      float sum = bias[out];
      for (int64_t in = 0; in < desc.in_features; ++in) {
        sum += x[token * desc.in_features + in] *
               weight[static_cast<size_t>(out * desc.in_features + in)];
      }
      y.push_back(sum);
    }
  }
  return y;
}

}  // namespace

int main() {
  // --8<-- [start:product]
  // What is asked: a layer of 768 outputs and 1024 inputs, a quarter of its 32 x 32 blocks present.
  bs::ProductDesc desc;
  desc.product = bs::Product::forward;
  desc.dtype = bs::Dtype::f32;
  desc.epilogue = bs::Epilogue::bias;
  desc.tokens = 256;
  desc.out_features = 768;
  desc.in_features = 1024;
  desc.block = {32, 32};
  desc.nnz = desc.grid().block_rows * desc.grid().block_cols / 4;

  // The operands. `values` are the present blocks in the order of `pattern.row` and `pattern.col`.
  const auto [block_rows, block_cols, nnz] = desc.grid();
  const bs::Pattern pattern = bs::Pattern::random(block_rows, block_cols, nnz, /*seed=*/0);
  const std::vector<float> values = random_numbers(nnz * desc.block.out * desc.block.in);
  const std::vector<float> x = random_numbers(desc.tokens * desc.in_features);
  const std::vector<float> bias = random_numbers(desc.out_features);
  std::vector<float> y(static_cast<size_t>(desc.tokens * desc.out_features));

  // The kernel is chosen once and gets its scratch memory from us.
  const bs::Execution execution{on_threads, kThreads};
  const bs::Kernel& kernel = bs::choose(bs::Backend::cpu, desc);
  const int64_t bytes = bs::workspace_size(kernel, desc, execution);
  constexpr std::align_val_t kAlignment{64};
  void* workspace = ::operator new(static_cast<size_t>(bytes), kAlignment);

  bs::ProductArgs args;
  args.x = {x.data(), desc.in_features};
  args.weight = {pattern.view(), values.data()};
  args.bias = bias.data();
  args.output = {y.data(), desc.out_features};
  args.workspace = workspace;
  bs::run(kernel, desc, args, execution);
  // --8<-- [end:product]

  double best = 1e9;
  for (int repeat = 0; repeat < 20; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    bs::run(kernel, desc, args, execution);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
  }
  ::operator delete(workspace, kAlignment);

  std::cout << bs::explain(bs::Backend::cpu, desc, execution) << '\n';
  const double work = 2.0 * static_cast<double>(desc.tokens) * static_cast<double>(values.size());
  std::cout << best * 1e3 << " ms, " << work / best / 1e9 << " GFLOP/s on " << kThreads
            << " threads\n";
  if (y != by_definition(desc, pattern.view(), x.data(), values.data(), bias.data())) {
    std::cerr << "the result differs from that of plain loops\n";
    return EXIT_FAILURE;
  }
  std::cout << "the result is that of plain loops, bit for bit\n";
  return EXIT_SUCCESS;
}
