// Dispatch: which kernel is chosen, what an environment variable changes, and what is said about
// it.
#include <gtest/gtest.h>

#include <cstdlib>

#include "block_sparse/product.h"
#include "expect_error.h"
#include "kernel.h"

namespace block_sparse {
namespace {

// BLOCK_SPARSE_KERNEL for the length of a scope.
class Forced {
 public:
  explicit Forced(const char* kernel_names) { setenv("BLOCK_SPARSE_KERNEL", kernel_names, 1); }
  ~Forced() { unsetenv("BLOCK_SPARSE_KERNEL"); }
};

ProductDesc desc_of(Product product, Dtype dtype, BlockShape block) {
  return {product, dtype, Epilogue::none, 64, 100, 96, block, 5};
}

std::vector<ProductDesc> some_descs() {
  std::vector<ProductDesc> descs;
  for (Product product : {Product::forward, Product::grad_input, Product::grad_weight}) {
    for (Dtype dtype : {Dtype::f64, Dtype::f32, Dtype::bf16, Dtype::f16}) {
      for (BlockShape block : {BlockShape{32, 32}, BlockShape{16, 64}, BlockShape{1, 7}}) {
        descs.push_back(desc_of(product, dtype, block));
      }
    }
  }
  return descs;
}

TEST(Dispatch, ChoosesTheFirstKernelThatDoesNotRefuse) {
  const std::span<const Kernel> list = kernels(Backend::cpu);
  EXPECT_EQ(list.back().name, "cpu_reference");
  for (const ProductDesc& desc : some_descs()) {
    EXPECT_FALSE(list.back().why_not(desc)) << "the last accepts everything";
    const Kernel& chosen = choose(Backend::cpu, desc);
    for (const Kernel& kernel : list) {
      const Refusal refusal = kernel.why_not(desc);
      if (!refusal) {
        EXPECT_EQ(chosen.name, kernel.name) << to_string(desc);
        break;
      }
      EXPECT_FALSE(refusal->empty());
    }
  }
}

TEST(Dispatch, ExplainNamesTheChosenKernelItsWorkspaceAndEveryRefusal) {
  for (const ProductDesc& desc : some_descs()) {
    const Kernel& chosen = choose(Backend::cpu, desc);
    const std::string text = explain(Backend::cpu, desc, {});
    EXPECT_TRUE(text.starts_with(to_string(desc))) << text;
    EXPECT_NE(text.find(concat("\n  ", chosen.name, ": chosen, workspace ",
                               workspace_size(chosen, desc, {}), " bytes")),
              std::string::npos)
        << text;
    for (const Kernel& kernel : kernels(Backend::cpu)) {
      const Refusal refusal = kernel.why_not(desc);
      if (!refusal) continue;
      EXPECT_NE(text.find(concat("\n  ", kernel.name, ": refuses: ", *refusal)), std::string::npos)
          << text;
    }
  }
}

TEST(Dispatch, AKernelCanBeForced) {
  const ProductDesc desc = desc_of(Product::forward, Dtype::f32, {32, 32});
  for (const char* names : {"cpu_reference", "cuda_other,cpu_reference", "cpu_reference,"}) {
    const Forced forced(names);
    EXPECT_EQ(choose(Backend::cpu, desc).name, "cpu_reference") << names;
  }
}

TEST(Dispatch, AnEmptyVariableOrOneForTheOtherBackendChangesNothing) {
  const ProductDesc desc = desc_of(Product::forward, Dtype::f32, {32, 32});
  const std::string_view usual = choose(Backend::cpu, desc).name;
  for (const char* names : {"", "cuda_reference"}) {
    const Forced forced(names);
    EXPECT_EQ(choose(Backend::cpu, desc).name, usual) << names;
  }
}

TEST(Dispatch, AnUnknownNameIsAnErrorThatListsTheKernels) {
  const Forced forced("cpu_reference,fastest");
  const ProductDesc desc = desc_of(Product::forward, Dtype::f32, {32, 32});
  expect_error([&] { choose(Backend::cpu, desc); }, "no kernel is called 'fastest'");
  expect_error([&] { choose(Backend::cpu, desc); }, "cpu_reference");
  expect_error([&] { explain(Backend::cpu, desc, {}); }, "no kernel is called 'fastest'");
}

TEST(Dispatch, NoKernelAtAllIsAnErrorThatPrintsTheProduct) {
  const ProductDesc desc = desc_of(Product::grad_weight, Dtype::bf16, {16, 64});
  EXPECT_TRUE(kernels(Backend::cuda).empty()) << "this library is the CPU's";
  expect_error([&] { choose(Backend::cuda, desc); },
               "no kernel accepts grad_weight bf16 tokens=64 out=100 in=96 block=16x64 nnz=5");
}

TEST(Dispatch, ParallelForCoversEveryIndexOnce) {
  Execution execution;
  execution.threads = 3;
  execution.parallel_for = [](int64_t count, Execution::Body body, const void* context) {
    for (int64_t begin = 0; begin < count; begin += 4) {
      body(context, begin, std::min(count, begin + 4));
    }
  };
  for (const Execution& lent : {Execution{}, execution}) {
    std::vector<int> times(10);
    parallel_for(lent, 10, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) ++times[static_cast<size_t>(i)];
    });
    EXPECT_EQ(times, std::vector<int>(10, 1));
  }
}

TEST(Product, NamesGoBothWays) {
  for (Product product : {Product::forward, Product::grad_input, Product::grad_weight}) {
    EXPECT_EQ(product_from_string(to_string(product)), product);
  }
  expect_error([] { product_from_string("backward"); },
               "product: must be forward, grad_input or grad_weight, got 'backward'");
}

TEST(Product, ADescriptionPrintsEverything) {
  ProductDesc desc{Product::forward, Dtype::bf16, Epilogue::bias, 512, 768, 3072, {32, 32}, 576};
  EXPECT_EQ(to_string(desc),
            "forward bf16 tokens=512 out=768 in=3072 block=32x32 nnz=576 density=0.25 "
            "epilogue=bias");
  desc.product = Product::grad_input;
  EXPECT_EQ(to_string(desc),
            "grad_input bf16 tokens=512 out=768 in=3072 block=32x32 nnz=576 density=0.25");
}

TEST(Product, TheGridIsRoundedUp) {
  const ProductDesc desc{Product::forward, Dtype::f32, Epilogue::none, 1, 33, 0, {32, 32}, 0};
  EXPECT_EQ(desc.grid().block_rows, 2);
  EXPECT_EQ(desc.grid().block_cols, 0);
}

}  // namespace
}  // namespace block_sparse
