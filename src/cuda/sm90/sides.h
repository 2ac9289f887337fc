// Forward and grad_input as one product: y[tokens, M] = x[tokens, K] W.
#pragma once

#include "block_sparse/product.h"

namespace block_sparse::cuda::sm90 {

struct Sides {
  int64_t m, k;
  int64_t block_m, block_k;
};

inline Sides sides(const ProductDesc& desc) {
  const Sides s{desc.out_features, desc.in_features, desc.block.out, desc.block.in};
  return desc.product == Product::forward ? s : Sides{s.k, s.m, s.block_k, s.block_m};
}

}  // namespace block_sparse::cuda::sm90
