// Launches the kernel of a few-token product: what it asks for becomes its parameters. Host code.
#pragma once

#include <array>
#include <atomic>
#include <random>

#include "cuda/launch.h"
#include "cuda/skinny/kernel.cuh"
#include "cuda/skinny/launch.h"
#include "cuda/skinny/plan.h"

namespace block_sparse::cuda::skinny {

// From Hopper on.
inline bool can_start_early() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

// Even, of no other launch of this process, and all but certainly not what memory contains.
inline uint64_t number_of_launch() {
  static std::atomic<uint64_t> next = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  return 2 * next.fetch_add(1, std::memory_order_relaxed);
}

inline Params params_of(const ProductDesc& desc, const ProductArgs& args, const Plan& plan) {
  const PatternView& pattern = args.weight.pattern;
  const GridShape grid = desc.grid();
  const bool forward = desc.product == Product::forward;
  const ConstDenseView x = forward ? args.x : args.dy;
  Params params{};
  params.values = args.weight.values;
  params.blocks = forward ? nullptr : pattern.perm;
  params.depth_blocks = forward ? pattern.col : pattern.trow;
  params.output_blocks = forward ? pattern.row : pattern.col;
  params.starts = forward ? pattern.crow : pattern.ccol;
  params.x = x.data;
  params.scales = args.weight.scales;
  params.bias = desc.epilogue == Epilogue::bias ? args.bias : nullptr;
  params.output = args.output.data;
  params.x_stride = x.row_stride;
  params.output_stride = args.output.row_stride;
  params.tokens = static_cast<int>(desc.tokens);
  params.outputs = static_cast<int>(plan.outputs);
  params.depth = static_cast<int>(plan.depth);
  params.nnz = static_cast<int>(desc.nnz);
  params.output_grid = static_cast<int>(forward ? grid.block_rows : grid.block_cols);
  params.depth_grid = static_cast<int>(forward ? grid.block_cols : grid.block_rows);
  params.block_outputs = static_cast<int>(plan.block_outputs);
  params.block_depth = static_cast<int>(plan.block_depth);
  params.block_size = desc.block.out * desc.block.in;
  params.block_pitch = static_cast<int>(desc.block.in);
  params.strips = static_cast<int>(plan.strips_per_cta);
  params.depth_units = Divider(static_cast<int>(plan.block_depth / plan.unit_depth));
  params.units = static_cast<int>(plan.units);
  params.warps_per_strip = Divider(static_cast<int>(plan.warps_per_strip));
  params.teams = Divider(static_cast<int>(plan.teams));
  params.team_ctas = Divider(static_cast<int>(plan.team_ctas));
  params.launch = number_of_launch();
  params.parts = static_cast<Part*>(args.workspace);
  return params;
}

// More shared memory than 48 KB has to be asked for, once per device. What is left of it caches x.
template <class C>
void allow_shared_memory() {
  static_assert(sizeof(Shared<C>) <= shared_bytes(C::kOutputs, C::kTokens));
  constexpr int kDevices = 64;
  static std::array<std::atomic<bool>, kDevices> allowed{};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  std::atomic<bool>& done = allowed[device % kDevices];
  if (done && device < kDevices) return;
  check_cuda(cudaFuncSetAttribute(skinny_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(sizeof(Shared<C>))),
             "cuda_skinny: shared memory");
  // All that it does not take caches x. The driver would provide for a second CTA.
  const int size = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int percent = static_cast<int>((sizeof(Shared<C>) + 1024) * 100 / size) + 1;
  check_cuda(cudaFuncSetAttribute(skinny_kernel<C>, cudaFuncAttributePreferredSharedMemoryCarveout,
                                  percent),
             "cuda_skinny: carveout");
  done = true;
}

template <class C>
void launch_choice(const ProductDesc& desc, const ProductArgs& args, const Plan& plan,
                   cudaStream_t stream) {
  Params params = params_of(desc, args, plan);
  // 32 KB of a CTA, about what comes while the kernel before ends: with more, what is read first
  // comes later.
  const bool starts_early = C::kEarly && can_start_early();
  params.prefetch_bytes = starts_early ? (32 << 10) / C::kWarps : 0;
  allow_shared_memory<C>();
  cudaLaunchConfig_t config{};
  config.gridDim = {static_cast<unsigned>(plan.ctas()), 1, 1};
  config.blockDim = {C::kThreads, 1, 1};
  config.dynamicSmemBytes = sizeof(Shared<C>);
  config.stream = stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = starts_early ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, skinny_kernel<C>, params), "cuda_skinny");
}

template <class T, class Value = T>
void launch(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  const Plan plan = plan_of(desc, multiprocessors());
  const auto with_tokens = [&]<bool kTransposed, int kOutputs, int kDepth>() {
    const auto run = [&]<int kTokens>() {
      using C = Choice<T, Value, kTransposed, kOutputs, kDepth, kTokens>;
      launch_choice<C>(desc, args, plan, stream);
    };
    switch (padded_tokens(desc.tokens)) {
      case 8:
        return run.template operator()<8>();
      case 16:
        return run.template operator()<16>();
      case 32:
        return run.template operator()<32>();
      default:
        return run.template operator()<kMaxTokens>();
    }
  };
  const auto with_unit = [&]<bool kTransposed, int kOutputs>() {
    if constexpr (sizeof(T) == 2) {
      if (plan.unit_depth == 32) {
        return with_tokens.template operator()<kTransposed, kOutputs, 32>();
      }
    }
    with_tokens.template operator()<kTransposed, kOutputs, 16>();
  };
  const auto with_product = [&]<bool kTransposed>() {
    plan.unit_outputs == 32 ? with_unit.template operator()<kTransposed, 32>()
                            : with_unit.template operator()<kTransposed, 16>();
  };
  if constexpr (std::is_same_v<T, Value>) {
    if (desc.product == Product::grad_input) return with_product.template operator()<true>();
  }
  with_product.template operator()<false>();
}

}  // namespace block_sparse::cuda::skinny
