// Launches the resident kernel, cuda_sm90_resident: which products it takes, and in which
// configuration. How it works is told in resident.cuh.
#include "cuda/dense/choice.h"
#include "cuda/sm90/hopper.h"
#include "cuda/sm90/resident.cuh"
#include "cuda/sm90/resident_plan.h"
#include "cuda/sm90/tensor_map.h"
#include "kernels.h"

namespace block_sparse::cuda::sm90 {
namespace {

using namespace resident_product;

// Shared memory for W, beside that of plan.h for x.
constexpr int kRing = 32 << 10, kRingOfOne = 96 << 10;

bool takes_side(int64_t block) { return block == 16 || block == 32 || block % 64 == 0; }

// Measured on an H100: for more, panels and strips are faster, which do less for each block.
double max_density(BlockShape block) {
  const int64_t side = std::min(block.out, block.in);
  return side >= 64 ? 0.4 : side >= 32 ? 0.6 : 0.25;
}

// So deep that a CTA has fewer than 128 tokens: fast only where the others leave the chip empty.
constexpr int64_t kFullDepth = 768, kMaxOfDeep = 2048 * 1024;  // outputs

Refusal why_not(const ProductDesc& desc) {
  if (desc.product == Product::grad_weight) return "it computes forward and grad_input";
  if (Refusal refusal = why_not_hopper(desc)) return refusal;
  if (!takes_side(desc.block.out) || !takes_side(desc.block.in)) {
    return concat("the block is ", desc.block.out, "x", desc.block.in,
                  "; it takes sides of 16, 32 and multiples of 64");
  }
  const Sides s = sides(desc);
  if (slabs_of(s) * kSlab > kMaxDepth) {
    return concat("sums are over ", s.k, " features; it takes up to ", kMaxDepth);
  }
  if (desc.rounded) return "results are float; it stores 16 bits";
  if (desc.forced) return std::nullopt;
  const double density = dense_weight::density_of(desc);
  if (density > max_density(desc.block)) {
    return concat("at density ", density, " others are faster");
  }
  if (slabs_of(s) * kSlab > kFullDepth && desc.tokens * s.m > kMaxOfDeep) {
    return concat("sums are over ", s.k, " features: others are faster with many outputs");
  }
  return std::nullopt;
}

int64_t workspace(const ProductDesc&, const Execution&) { return 0; }

template <class T, class Config, bool kTransposed>
void launch(const ProductDesc& desc, const ProductArgs& args, const Plan& plan,
            cudaStream_t stream) {
  const Sides s = sides(desc);
  const PatternView& pattern = args.weight.pattern;
  const ConstDenseView& input = kTransposed ? args.dy : args.x;

  Params params{};
  params.slabs = static_cast<int>(slabs_of(s));
  params.input = tensor_map(input.data, desc.dtype, desc.tokens, s.k, input.row_stride,
                            {static_cast<uint32_t>(plan.tokens), kSlab}, kSlab * 2);
  if constexpr (kTransposed) {
    params.values = tensor_map(args.weight.values, desc.dtype, desc.nnz * s.block_k, s.block_m,
                               s.block_m, {Config::kDepth, Config::kWidth}, Config::kWidth * 2);
  } else {
    using Ordered = Order<Config::kWidth>;
    constexpr uint32_t kTwo = 2, kQuad = 4;
    params.values =
        tensor_map<5>(args.weight.values, desc.dtype,
                      {{{s.block_k, 1, Config::kDepth},
                        {kTwo, s.block_k, kTwo},
                        {kQuad, Ordered::kNeighbours * s.block_k, kQuad},
                        {Ordered::kOutputs / 8, 2 * s.block_k, Ordered::kOutputs / 8},
                        {desc.nnz * s.block_m / Ordered::kOutputs, Ordered::kOutputs * s.block_k,
                         Config::kWidth / Ordered::kOutputs}}},
                      Config::kDepth * 2, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
  }
  const GridShape grid = pattern.grid;
  params.walk = {kTransposed ? pattern.ccol : pattern.crow,
                 kTransposed ? pattern.trow : pattern.col,
                 kTransposed ? pattern.perm : nullptr,
                 static_cast<int>(grid.nnz),
                 static_cast<int>(kTransposed ? grid.block_cols : grid.block_rows),
                 static_cast<int>(s.block_m),
                 static_cast<int>(s.block_k),
                 static_cast<int>(s.block_m / Config::kWidth),
                 static_cast<int>(s.block_k / Config::kDepth)};
  params.splits = plan.splits;
  params.bias = desc.epilogue == Epilogue::bias ? args.bias : nullptr;
  params.output = args.output.data;
  params.output_stride = args.output.row_stride;
  params.features_m = static_cast<int>(s.m);
  params.tokens = static_cast<int>(desc.tokens);
  params.tile_tokens = plan.tokens;

  const auto kernel = resident_kernel<T, Config, kTransposed>;
  const auto bytes = static_cast<int>(plan.tokens * token_bytes(s) + sizeof(Shared<Config>));
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "cuda_sm90_resident");
  const int64_t tiles = (desc.tokens + plan.tokens - 1) / plan.tokens;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(tiles * plan.splits);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, params), "cuda_sm90_resident");
}

// Calls f with the side of a piece: at most `kMax` of a block's.
template <int kMax, class F>
void with_side(int64_t block, const F& f) {
  if (block == 16) return f(std::integral_constant<int, 16>{});
  if (block == 32 || kMax == 32) return f(std::integral_constant<int, 32>{});
  f(std::integral_constant<int, kMax>{});
}

template <class T, bool kTransposed>
void launch_for_block(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  const Plan plan = plan_of(desc, multiprocessors());
  const Sides s = sides(desc);
  with_side<64>(s.block_m, [&](auto width) {
    constexpr int kWidth = width;
    with_side<kWidth == 64 ? 32 : 64>(s.block_k, [&](auto depth) {
      if (plan.tokens > kHalfTokens) {
        launch<T, Config<2, kRing, kWidth, depth>, kTransposed>(desc, args, plan, stream);
      } else {
        launch<T, Config<1, kRingOfOne, kWidth, depth>, kTransposed>(desc, args, plan, stream);
      }
    });
  });
}

template <class T>
void run_as(const ProductDesc& desc, const ProductArgs& args, cudaStream_t stream) {
  desc.product == Product::forward ? launch_for_block<T, false>(desc, args, stream)
                                   : launch_for_block<T, true>(desc, args, stream);
}

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  const cudaStream_t stream = stream_of(execution.stream);
  desc.dtype == Dtype::bf16 ? run_as<BFloat16>(desc, args, stream)
                            : run_as<Float16>(desc, args, stream);
}

}  // namespace

Kernel resident() { return {"cuda_sm90_resident", why_not, workspace, run}; }

}  // namespace block_sparse::cuda::sm90
