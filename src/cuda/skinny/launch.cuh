// Launches the kernels of a few-token product: what it asks for becomes their parameters. Host
// code.
#pragma once

#include <array>
#include <atomic>
#include <cstdlib>

#include "cuda/launch.h"
#include "cuda/skinny/finish.cuh"
#include "cuda/skinny/kernel.cuh"
#include "cuda/skinny/launch.h"
#include "cuda/skinny/order.cuh"
#include "cuda/skinny/plan.h"

namespace block_sparse::cuda::skinny {

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
  params.x_depth = static_cast<int>(plan.depth);
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
  params.ragged = plan.depth % plan.block_depth != 0;
  params.strips = static_cast<int>(plan.strips);
  params.depth_units = Divider(static_cast<int>(plan.block_depth / plan.unit_depth));
  params.units = static_cast<int>(plan.units);
  params.stages = static_cast<int>(plan.stages);
  params.ring_bytes = static_cast<int>(plan.ring_bytes);
  params.stage_bytes = static_cast<int>(plan.ring_bytes / plan.stages);
  params.members = static_cast<int>(plan.members);
  params.teams = Divider(static_cast<int>(plan.teams));
  params.ctas = Divider(static_cast<int>(plan.ctas));
  params.continued = static_cast<float4*>(args.workspace);
  params.begun = params.continued + plan.parts(desc.tokens);
  return params;
}

// More shared memory than 48 KB has to be asked for, once per device.
template <class C>
void allow_shared_memory() {
  static_assert(sizeof(Shared<C>) == shared_rest(C::kOutputs, C::kTokens));
  constexpr int kDevices = 64;
  static std::array<std::atomic<bool>, kDevices> allowed{};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  std::atomic<bool>& done = allowed[device % kDevices];
  if (done && device < kDevices) return;
  check_cuda(cudaFuncSetAttribute(skinny_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  this_device().shared_bytes),
             "cuda_skinny: shared memory");
  // The others would have less by themselves, and a multiprocessor changes only when it is idle.
  const auto take_all = [](auto* kernel) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "cuda_skinny: carveout");
  };
  take_all(skinny_kernel<C>);
  take_all(finish_kernel<C>);
  if constexpr (C::kOrdered) take_all(order_kernel<C>);
  done = true;
}

// Each kernel may start before the one before it has ended, whosever that is.
template <class... Args>
void launch_early(void (*kernel)(Args...), dim3 grid, int threads, int64_t shared_bytes,
                  cudaStream_t stream, Args... args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = {static_cast<unsigned>(threads), 1, 1};
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "cuda_skinny");
}

template <class C>
void launch_choice(const ProductDesc& desc, const ProductArgs& args, const Plan& plan,
                   cudaStream_t stream) {
  Params params = params_of(desc, args, plan);
  params.unit_bytes = params.strips * C::kUnitBytes + C::kInputBytes;
  params.value_step = int64_t{512 / Tile<C>::kRowBytes} * params.block_pitch *
                      static_cast<int>(sizeof(typename C::Value));
  const char* t = getenv("SK_TRIGGER");
  params.trigger = t ? atoi(t) : 0;
  const char* p = getenv("SK_PREFETCH");
  params.prefetch_bytes = (p ? atoi(p) : 32 << 10) / C::kWarps;
  const int of_block = C::kOutputs * params.block_depth / C::kParts * static_cast<int>(sizeof(typename C::Value));
  params.ahead = getenv("SK_AHEAD") ? std::min(28, (params.prefetch_bytes + of_block - 1) / of_block * params.depth_units.divisor()) : 0;
  allow_shared_memory<C>();
  if constexpr (C::kOrdered) {
    void* ordered = params.begun + plan.parts(desc.tokens);
    launch_early(order_kernel<C>, {std::min(ctas_for(plan.ordered_bytes / 16, kOrderThreads), 2 * static_cast<unsigned>(plan.ctas)), 1, 1},
                 kOrderThreads, 0, stream, params, static_cast<uint4*>(ordered),
                 plan.ordered_bytes / 16);
    params.x = ordered;
    params.x_stride = C::kDepth;
    params.x_depth = params.depth_grid * params.block_depth;
  }
  const auto ctas = static_cast<unsigned>(plan.ctas);
  launch_early(skinny_kernel<C>, {ctas, 1, 1}, C::kThreads, plan.shared_bytes, stream, params);
  if (getenv("SK_NOFINISH")) return;
  launch_early(finish_kernel<C>, {ctas, std::min(ctas_for(plan.members * C::kSums, kFinishThreads), kFinishCtas), 1},
               kFinishThreads, 0, stream, params);
}

template <class T, class Value = T>
void launch(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  const Plan plan = plan_of(desc, this_device());
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
