// Choice: what the way by a dense W costs, and whether that is less than what cuda_tiled takes. A
// few rates that were measured on an H100 (docs/notebook.md). No device code.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_sparse/check.h"
#include "kernel.h"

namespace block_sparse::cuda::dense_weight {

inline double density_of(const ProductDesc& desc) {
  const GridShape grid = desc.grid();
  return static_cast<double>(desc.nnz) /
         (static_cast<double>(grid.block_rows) * static_cast<double>(grid.block_cols));
}

// Multiplications and additions of a product, in millions: over rates in TFLOP/s, microseconds.
inline double mflop(int64_t tokens, int64_t weights) {
  return 2e-6 * static_cast<double>(tokens) * static_cast<double>(weights);
}

// Microseconds. W is written once and read once; while a dense product reads it, it multiplies.
inline double cost(const ProductDesc& desc) {
  const int64_t weights = desc.out_features * desc.in_features;
  const double megabytes = 1e-6 * static_cast<double>(weights * size_of(desc.dtype));
  const double rate = size_of(desc.dtype) == 2   ? 720
                      : desc.tf32                ? 400
                      : desc.dtype == Dtype::f64 ? 55
                                                 : 47;
  return 15 + megabytes / 1.5 + std::max(megabytes / 2, mflop(desc.tokens, weights) / rate);
}

// TFLOP/s of a kernel with tensor cores: what it multiplies for present blocks; and, as if all were
// present, what it spends on tokens and outputs as such.
struct Rates {
  double present, all;

  double microseconds(const ProductDesc& desc) const {
    return mflop(desc.tokens, desc.nnz * desc.block.out * desc.block.in) / present +
           mflop(desc.tokens, desc.out_features * desc.in_features) / all;
  }
};

// Why a kernel that could compute the product leaves it to cuda_dense, if it does.
inline Refusal why_dense(const ProductDesc& desc, Rates rates) {
  const bool faster = rates.microseconds(desc) <= cost(desc);
  if (!desc.dense_product || desc.forced || faster) return std::nullopt;
  return concat("at density ", density_of(desc), " cuda_dense is faster");
}

// Microseconds of cuda_tiled, whose tiles are of many tokens; the outputs of a block that is
// narrower than a tile leave some of it unused.
inline double cost_of_tiles(const ProductDesc& desc) {
  constexpr int64_t kTileTokens = 256;
  const BlockShape block = desc.block;
  const int64_t side = desc.product == Product::forward      ? block.out
                       : desc.product == Product::grad_input ? block.in
                                                             : std::min(block.out, block.in);
  const double rate =
      (desc.dtype == Dtype::f64 ? 12.5 : 30) * std::min(1.0, static_cast<double>(side) / 24);
  return mflop(std::max(desc.tokens, kTileTokens), desc.nnz * block.out * block.in) / rate;
}

inline bool is_fastest(const ProductDesc& desc) { return cost(desc) < cost_of_tiles(desc); }

}  // namespace block_sparse::cuda::dense_weight
