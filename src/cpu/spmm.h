// Spmm: forward and grad_input, dense = dense x sparse. Tokens are the lanes: x arrives transposed
// in strips, the blocks are read where they are, one scalar at a time, and sums are transposed back
// when they are stored. So it takes any block shape, reads canonical values and never moves them.
#pragma once

#include "block_sparse/product.h"
#include "cpu/split.h"
#include "cpu/strip.h"
#include "cpu/tile.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

// One direction through a pattern: an output block sums over its entries, each of them a block and
// the block of the depth that it meets.
struct Walk {
  const int32_t* first;   // [output blocks + 1]  first entry of each output block
  const int32_t* depth;   // [entries]            depth block of each entry
  const int32_t* number;  // [entries]            block number; null where that is the entry
  int64_t output_block, depth_block;
  int64_t outputs, depths;  // features on either side

  template <Product kProduct>
  static Walk of(const ProductDesc& desc, const PatternView& pattern) {
    if constexpr (kProduct == Product::forward) {
      return {pattern.crow,  pattern.col,       nullptr,         desc.block.out,
              desc.block.in, desc.out_features, desc.in_features};
    } else {
      return {pattern.ccol,   pattern.trow,     pattern.perm,     desc.block.in,
              desc.block.out, desc.in_features, desc.out_features};
    }
  }
};

template <class Math, Product kProduct>
class Spmm {
  using Storage = typename Math::Storage;
  using Packed = typename Math::Packed;
  using Sum = typename Math::Sum;
  // Canonical blocks are [out][in]: for grad_input, adjacent elements are adjacent outputs.
  static constexpr bool kAdjacentRows = kProduct == Product::grad_input;
  static constexpr int64_t kStripTokens = kTileVectors * kLanes<Sum>;
  // Outputs of a strip that are collected before they are transposed: whole cache lines.
  static constexpr int64_t kPanelOutputs = 32;
  // A thread packs this many bytes of x at a time: a good part of its share of the caches.
  static constexpr int64_t kChunkBytes = 1 << 20;

 public:
  static int64_t workspace(const ProductDesc& desc, const Execution& execution) {
    return chunk_bytes(desc) * parts(execution);
  }

  static void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
    const int64_t count = parts(execution);
    // Tokens are all alike, so splitting them balances any pattern; only few tokens do not suffice.
    int64_t token_parts = count;
    while (token_parts > 1 &&
           (count % token_parts != 0 || desc.tokens < token_parts * (kStripTokens * 2 / 3))) {
      --token_parts;
    }
    parallel_for(execution, count, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const Spmm spmm(desc, args, static_cast<char*>(args.workspace) + part * chunk_bytes(desc));
        spmm.run_part(even_part(desc.tokens, kLanes<Sum>, part % token_parts, token_parts),
                      spmm.output_part(part / token_parts, count / token_parts));
      }
    });
  }

 private:
  Spmm(const ProductDesc& desc, const ProductArgs& args, void* workspace)
      : walk_(Walk::of<kProduct>(desc, args.weight.pattern)),
        x_(kProduct == Product::forward ? args.x : args.dy),
        values_(static_cast<const Packed*>(args.weight.values)),
        bias_(desc.epilogue == Epilogue::bias ? static_cast<const Storage*>(args.bias) : nullptr),
        y_(args.output),
        block_elements_(desc.block.out * desc.block.in),
        block_stride_(desc.block.in / Math::kDepth),
        chunk_tokens_(chunk_strips(desc) * kStripTokens),
        chunk_(static_cast<Packed*>(workspace)) {}

  static int64_t parts(const Execution& execution) { return std::max(1, execution.threads); }

  static int64_t strip_elements(const ProductDesc& desc) {
    const int64_t depths = kProduct == Product::forward ? desc.in_features : desc.out_features;
    return (depths + Math::kDepth - 1) / Math::kDepth * kStripTokens;
  }
  static int64_t chunk_strips(const ProductDesc& desc) {
    const int64_t strips = (desc.tokens + kStripTokens - 1) / kStripTokens;
    const int64_t bytes = strip_elements(desc) * static_cast<int64_t>(sizeof(Packed));
    return std::clamp<int64_t>(kChunkBytes / std::max<int64_t>(1, bytes), 1, strips);
  }
  static int64_t chunk_bytes(const ProductDesc& desc) {
    const int64_t bytes =
        chunk_strips(desc) * strip_elements(desc) * static_cast<int64_t>(sizeof(Packed));
    return (bytes + 63) / 64 * 64;
  }

  // Outputs in whole panels, so that the parts have about the same number of blocks.
  Range output_part(int64_t index, int64_t parts) const {
    return {output_split(index, parts), output_split(index + 1, parts)};
  }
  int64_t output_split(int64_t index, int64_t parts) const {
    if (index == 0) return 0;
    if (index == parts) return walk_.outputs;
    // An output block costs its entries, and a little for being stored.
    const int64_t blocks = (walk_.outputs + walk_.output_block - 1) / walk_.output_block;
    const auto cost = [&](int64_t block) { return walk_.first[block] + block; };
    const int64_t wanted = cost(blocks) * index / parts;
    int64_t low = 0, high = blocks;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const int64_t output = low * walk_.output_block;
    return std::min(walk_.outputs, (output + kPanelOutputs - 1) / kPanelOutputs * kPanelOutputs);
  }

  void run_part(Range tokens, Range outputs) const {
    for (int64_t token = tokens.begin; token < tokens.end; token += chunk_tokens_) {
      run_chunk({token, std::min(tokens.end, token + chunk_tokens_)}, outputs);
    }
  }

  void run_chunk(Range tokens, Range outputs) const {
    const int64_t strip_stride = (walk_.depths + Math::kDepth - 1) / Math::kDepth * kStripTokens;
    const auto for_each_strip = [&](const auto& f) {
      Packed* strip = chunk_;
      for (int64_t token = tokens.begin; token < tokens.end; token += kStripTokens) {
        f(token, std::min(kStripTokens, tokens.end - token), strip);
        strip += strip_stride;
      }
    };
    for_each_strip([&](int64_t token, int64_t count, Packed* strip) {
      pack_strip<Math>(static_cast<const Storage*>(x_.data) + token * x_.row_stride, x_.row_stride,
                       count, walk_.depths, strip, strip_width(count));
    });
    for (int64_t output = outputs.begin; output < outputs.end; output += kPanelOutputs) {
      const int64_t end = std::min(outputs.end, output + kPanelOutputs);
      for_each_strip([&](int64_t token, int64_t count, const Packed* strip) {
        with_constant<kTileVectors>(strip_width(count) / kLanes<Sum>, [&](auto vectors) {
          run_panel<vectors()>({output, end}, token, count, strip);
        });
      });
    }
  }

  static int64_t strip_width(int64_t tokens) {
    return (tokens + kLanes<Sum> - 1) / kLanes<Sum> * kLanes<Sum>;
  }

  template <int kVectors>
  void run_panel(Range outputs, int64_t token, int64_t tokens, const Packed* strip) const {
    constexpr int kWidth = kVectors * kLanes<Sum>;
    alignas(64) Sum sums[kPanelOutputs * kWidth];
    for (int64_t output = outputs.begin; output < outputs.end;) {
      const int64_t block = output / walk_.output_block;
      const int64_t row = output % walk_.output_block;
      const int64_t rows =
          std::min({int64_t{kTileRows}, walk_.output_block - row, outputs.end - output});
      Sum* to = sums + (output - outputs.begin) * kWidth;
      with_constant<kTileRows>(
          rows, [&](auto constant) { run_tile<constant(), kVectors>(block, row, strip, to); });
      output += rows;
    }
    unpack_strip<Math>(sums, kWidth, tokens, outputs.end - outputs.begin,
                       bias_ == nullptr ? nullptr : bias_ + outputs.begin,
                       static_cast<Storage*>(y_.data) + token * y_.row_stride + outputs.begin,
                       y_.row_stride);
  }

  template <int kRows, int kVectors>
  __attribute__((noinline)) void run_tile(int64_t block, int64_t row, const Packed* strip,
                                          Sum* to) const {
    constexpr int kWidth = kVectors * kLanes<Sum>;
    Tile<Math, kRows, kVectors> tile;
    const int64_t end = walk_.first[block + 1];
    for (int64_t entry = walk_.first[block]; entry < end; ++entry) {
      const int64_t number = kProduct == Product::forward ? entry : walk_.number[entry];
      const int64_t depth = walk_.depth[entry] * walk_.depth_block;
      const int64_t steps =
          (std::min(walk_.depth_block, walk_.depths - depth) + Math::kDepth - 1) / Math::kDepth;
      const Packed* values = values_ + number * block_elements_ / Math::kDepth +
                             (kAdjacentRows ? row : row * block_stride_);
      tile.multiply(Scalars<Packed, kAdjacentRows>{values, block_stride_},
                    Vectors<Packed>{strip + depth / Math::kDepth * kWidth, kWidth}, steps);
    }
    tile.store(to, kWidth);
  }

  Walk walk_;
  ConstDenseView x_;
  const Packed* values_;
  const Storage* bias_;
  MutableDenseView y_;
  int64_t block_elements_;
  int64_t block_stride_;
  int64_t chunk_tokens_;
  Packed* chunk_;
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
