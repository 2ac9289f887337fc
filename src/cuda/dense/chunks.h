// Chunks: which part of W is written out at a time, so that the workspace stays bounded. No device
// code.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block_sparse/product.h"

namespace block_sparse::cuda::dense_weight {

// What a chunk takes at most, unless a single line of W (or eight, in grad_input) takes more.
// Smaller chunks leave the dense product too few tiles to fill a GPU.
constexpr int64_t kChunkBytes = int64_t{64} << 20;

// Rows of a chunk begin at multiples of 16 bytes, for wide stores and the tensor cores.
constexpr int64_t padded(int64_t elements, Dtype dtype) {
  const int64_t unit = 16 / size_of(dtype);
  return (elements + unit - 1) / unit * unit;
}

// Rows of W (of dW in grad_weight), or columns in grad_input: so no product is a sum over chunks.
struct Chunks {
  int64_t lines;  // in all
  int64_t step;   // lines of a chunk; the last may have fewer
  int64_t rows;   // of the chunk in memory
  int64_t pitch;  // elements from one of its rows to the next
};

constexpr Chunks chunks_of(const ProductDesc& desc) {
  const bool by_columns = desc.product == Product::grad_input;
  Chunks chunks{};
  chunks.lines = by_columns ? desc.in_features : desc.out_features;
  const int64_t line = by_columns ? desc.out_features : padded(desc.in_features, desc.dtype);
  const int64_t room = kChunkBytes / (line * size_of(desc.dtype));
  // Of equal size, and a multiple of the tiles of dense products where that fits.
  const int64_t tile = room >= 256 ? 256 : room >= 8 ? 8 : 1;
  const int64_t most = std::max<int64_t>(room / tile * tile, 1);
  const int64_t count = std::max<int64_t>((chunks.lines + most - 1) / most, 1);
  chunks.step = ((chunks.lines + count - 1) / count + tile - 1) / tile * tile;
  if (by_columns) chunks.step = padded(chunks.step, desc.dtype);
  chunks.step = std::clamp<int64_t>(chunks.step, 1, std::max<int64_t>(chunks.lines, 1));
  chunks.rows = by_columns ? desc.out_features : chunks.step;
  chunks.pitch = padded(by_columns ? chunks.step : desc.in_features, desc.dtype);
  return chunks;
}

constexpr int64_t bytes_of(const Chunks& chunks, Dtype dtype) {
  return chunks.rows * chunks.pitch * size_of(dtype);
}

}  // namespace block_sparse::cuda::dense_weight
