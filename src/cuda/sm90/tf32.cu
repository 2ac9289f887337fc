// cuda_sm90_tf32: float32 on Hopper where it may be rounded to TF32. The operands are rounded to as
// many bits in f16 (round.cuh), of which the tensor cores multiply twice as many, and for which
// there are kernels: one of them multiplies, with sums and results in float. What it takes, and how
// long it takes; the passes over the operands are in round.cuh.
#include <algorithm>
#include <cstddef>

#include "cuda/dense/choice.h"
#include "cuda/sm90/hopper.h"
#include "cuda/sm90/round.cuh"
#include "kernels.h"

namespace block_sparse::cuda::sm90 {
namespace {

ProductDesc rounded(const ProductDesc& desc) {
  ProductDesc inner = desc;
  inner.dtype = Dtype::f16;
  inner.rounded = true;
  inner.forced = true;  // whether something else is faster was asked of float32
  return inner;
}

// The kernel that multiplies: why none does, if so.
Refusal find_inner(const ProductDesc& inner, Kernel& found) {
  found = inner.product == Product::grad_weight ? sampled() : panel();
  Refusal refusal = found.why_not(inner);
  if (refusal && inner.product != Product::grad_weight) {
    found = strip();
    refusal = found.why_not(inner);
  }
  return refusal;
}

// The two operands of a product, as elements.
struct Elements {
  int64_t first, second;
};
Elements elements_of(const ProductDesc& desc) {
  const int64_t values = desc.nnz * desc.block.out * desc.block.in;
  const int64_t x = desc.tokens * desc.in_features, dy = desc.tokens * desc.out_features;
  switch (desc.product) {
    case Product::forward:
      return {x, values};
    case Product::grad_input:
      return {dy, values};
    default:
      return {dy, x};
  }
}

// Microseconds, from rates that were measured on an H100 (docs/notebook.md).
double cost(const ProductDesc& desc) {
  const auto [first, second] = elements_of(desc);
  const int64_t side = std::min(desc.block.out, desc.block.in);
  const dense_weight::Rates rates = side >= 64   ? dense_weight::Rates{.present = 760, .all = 9000}
                                    : side >= 32 ? dense_weight::Rates{.present = 750, .all = 2700}
                                                 : dense_weight::Rates{.present = 600, .all = 1900};
  constexpr int64_t kBytes = 4 + 4 + 2;  // of an element: read twice, and written
  const double megabytes = 1e-6 * static_cast<double>((first + second) * kBytes);
  return 30 + megabytes / 2.7 + rates.microseconds(desc);
}

Refusal why_not(const ProductDesc& desc) {
  if (desc.dtype != Dtype::f32) return concat("dtype is ", to_string(desc.dtype), "; it takes f32");
  if (!desc.tf32) return "float32 may not be rounded to TF32, or there are no more than 64 tokens";
  if (desc.alignment < 16) {
    return concat("an address or a row stride is a multiple of ", desc.alignment,
                  " bytes only; it needs 16");
  }
  if (desc.out_features % desc.block.out != 0 || desc.in_features % desc.block.in != 0) {
    return "the last block row or column reaches outside, and what is there may be large";
  }
  Kernel kernel;
  if (Refusal refusal = find_inner(rounded(desc), kernel)) return "rounded to f16: " + *refusal;
  if (desc.forced) return std::nullopt;
  const double mine = cost(desc);
  if (desc.dense_product && dense_weight::cost(desc) < mine) return "cuda_dense is faster";
  if (dense_weight::cost_of_tiles(desc) < mine) return "cuda_tiled is faster";
  return std::nullopt;
}

// The workspace: the largest elements and the factors, the two operands, what the kernel wants.
struct Layout {
  static constexpr int64_t kFactorsAt = 64, kFirstAt = 256;
  int64_t second_at, inner_at;

  explicit Layout(const ProductDesc& desc) {
    const auto align = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
    const auto [first, second] = elements_of(desc);
    second_at = kFirstAt + align(first * 2);
    inner_at = second_at + align(second * 2);
  }
};

int64_t workspace(const ProductDesc& desc, const Execution& execution) {
  Kernel kernel;
  find_inner(rounded(desc), kernel);
  return Layout(desc).inner_at + kernel.workspace(rounded(desc), execution);
}

// A matrix of `features` a row, rounded to `to`.
Operand operand_of(const void* data, int64_t rows, int64_t features, int64_t row_stride, void* to) {
  const bool contiguous = row_stride == features;
  return {.from = static_cast<const float*>(data),
          .to = static_cast<uint16_t*>(to),
          .lines = contiguous ? 1 : rows,
          .line_pieces = (contiguous ? rows * features : features) / 8,
          .stride = row_stride};
}

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  const cudaStream_t stream = stream_of(execution.stream);
  const ProductDesc inner = rounded(desc);
  Kernel kernel;
  find_inner(inner, kernel);
  const Layout layout(desc);
  auto* workspace = static_cast<std::byte*>(args.workspace);
  std::byte* const first = workspace + Layout::kFirstAt;
  std::byte* const second = workspace + layout.second_at;

  const auto dense = [&](ConstDenseView& view, int64_t features, std::byte* to) {
    const Operand operand = operand_of(view.data, desc.tokens, features, view.row_stride, to);
    view = {to, features};
    return operand;
  };
  ProductArgs halves = args;
  Rounding rounding{};
  rounding.operands[0] = desc.product == Product::forward
                             ? dense(halves.x, desc.in_features, first)
                             : dense(halves.dy, desc.out_features, first);
  if (desc.product == Product::grad_weight) {
    rounding.operands[1] = dense(halves.x, desc.in_features, second);
  } else {
    const int64_t rows = desc.nnz * desc.block.out;
    rounding.operands[1] =
        operand_of(args.weight.values, rows, desc.block.in, desc.block.in, second);
    halves.weight.values = second;
  }
  rounding.largest = reinterpret_cast<uint32_t*>(workspace);
  rounding.factors = reinterpret_cast<float*>(workspace + Layout::kFactorsAt);
  check_cuda(cudaMemsetAsync(rounding.largest, 0, 2 * sizeof(uint32_t), stream), "cuda_sm90_tf32");
  const dim3 grid(static_cast<unsigned>(multiprocessors() * 4), 2);
  find_largest<<<grid, kRoundThreads, 0, stream>>>(rounding);
  round_to_half<<<grid, kRoundThreads, 0, stream>>>(rounding);
  check_cuda(cudaGetLastError(), "cuda_sm90_tf32");

  halves.factors = rounding.factors;
  halves.workspace = workspace + layout.inner_at;
  kernel.run(inner, halves, execution);
}

}  // namespace

Kernel tf32() { return {"cuda_sm90_tf32", why_not, workspace, run}; }

}  // namespace block_sparse::cuda::sm90
