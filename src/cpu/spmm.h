// Spmm: forward and grad_input, dense = dense x sparse. Tokens are the lanes: x arrives transposed
// in strips, the blocks are read where they are, one scalar at a time, and sums are transposed back
// when they are stored. So it takes any block shape and reads canonical values.
#pragma once

#include "block_sparse/product.h"
#include "cpu/blocks.h"
#include "cpu/epilogue.h"
#include "cpu/split.h"
#include "cpu/strip.h"
#include "cpu/tile.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

template <class Math, Product kProduct, class Value = typename Math::Storage>
class Spmm {
  using Storage = typename Math::Storage;
  using Packed = typename Math::Packed;
  using Sum = typename Math::Sum;
  using Weights = Blocks<Math, kProduct, Value>;

  static constexpr int64_t kStripTokens = kTileVectors * kLanes<Sum>;
  // Outputs of a strip that are collected before they are transposed: whole cache lines.
  static constexpr int64_t kPanelOutputs = 32;
  // Depth of the entries that rows take in turn: half of the first cache.
  static constexpr int64_t kGroupDepth = kChainSteps * Math::kDepth;
  // The blocks are read once per chunk of x. While they stay in the last cache, a chunk that stays
  // in the second is best; blocks that come from memory, or are converted each time, want few
  // chunks, in the last cache.
  static constexpr int64_t kCachedBytes = 8 << 20;
  static constexpr int64_t kSmallChunkBytes = 512 << 10;
  static constexpr int64_t kLargeChunkBytes = 10 << 20;

 public:
  static int64_t workspace(const ProductDesc& desc, const Execution& execution) {
    return part_bytes(desc) * useful_threads(desc, execution);
  }

  static void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
    const int64_t count = useful_threads(desc, execution);
    const int64_t token_parts = parts_by_tokens(count, desc.tokens, kStripTokens * 2 / 3);
    parallel_for(execution, count, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const Spmm spmm(desc, args, static_cast<char*>(args.workspace) + part * part_bytes(desc));
        spmm.run_part(even_part(desc.tokens, kLanes<Sum>, part % token_parts, token_parts),
                      spmm.output_part(part / token_parts, count / token_parts));
      }
    });
  }

 private:
  Spmm(const ProductDesc& desc, const ProductArgs& args, void* workspace)
      : walk_(Walk::of<kProduct>(desc, args.weight.pattern)),
        x_(kProduct == Product::forward ? args.x : args.dy),
        epilogue_(OutputEpilogue<Math, Value>::of(desc, args)),
        y_(args.output),
        stream_(streams<Math>(args.output, desc.tokens)),
        last_entry_(desc.nnz - 1),
        group_(std::max<int64_t>(1, kGroupDepth / walk_.depth_block)),
        chunk_tokens_(chunk_strips(desc) * kStripTokens),
        chunk_(static_cast<Packed*>(workspace)),
        weights_(walk_, static_cast<const Value*>(args.weight.values), desc.block,
                 chunk_ + chunk_strips(desc) * strip_elements(desc)) {}

  static int64_t strip_elements(const ProductDesc& desc) {
    const int64_t depths = kProduct == Product::forward ? desc.in_features : desc.out_features;
    return (depths + Math::kDepth - 1) / Math::kDepth * kStripTokens;
  }
  static int64_t chunk_strips(const ProductDesc& desc) {
    const int64_t strips = (desc.tokens + kStripTokens - 1) / kStripTokens;
    const int64_t bytes = strip_elements(desc) * int64_t{sizeof(Packed)};
    const int64_t blocks = desc.nnz * desc.block.out * desc.block.in * int64_t{sizeof(Value)};
    const int64_t chunk =
        Weights::kDirect && blocks <= kCachedBytes ? kSmallChunkBytes : kLargeChunkBytes;
    return std::clamp<int64_t>(chunk / std::max<int64_t>(1, bytes), 1,
                               std::max<int64_t>(1, strips));
  }
  static int64_t part_bytes(const ProductDesc& desc) {
    const int64_t elements =
        chunk_strips(desc) * strip_elements(desc) + Weights::prepared_elements(desc, kPanelOutputs);
    return (elements * int64_t{sizeof(Packed)} + 63) / 64 * 64;
  }

  // Outputs in whole panels, so that the parts have about the same number of blocks.
  Range output_part(int64_t index, int64_t parts) const {
    return {walk_.split(index, parts, kPanelOutputs), walk_.split(index + 1, parts, kPanelOutputs)};
  }

  void run_part(Range tokens, Range outputs) const {
    for (int64_t token = tokens.begin; token < tokens.end; token += chunk_tokens_) {
      run_chunk({token, std::min(tokens.end, token + chunk_tokens_)}, outputs);
    }
    if (stream_) end_of_stream();
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
      const Range panel{output, std::min(outputs.end, output + kPanelOutputs)};
      weights_.prepare(panel);
      for_each_strip([&](int64_t token, int64_t count, const Packed* strip) {
        with_constant<kTileVectors>(strip_width(count) / kLanes<Sum>, [&](auto vectors) {
          run_panel<vectors()>(panel, token, count, strip);
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
    weights_.for_each_slice(outputs, [&](const typename Weights::Slice& slice) {
      run_slice<kVectors>(slice, strip, sums + (slice.output - outputs.begin) * kWidth);
    });
    const auto unpack =
        stream_ ? unpack_strip<Math, true, Value> : unpack_strip<Math, false, Value>;
    unpack(sums, kWidth, tokens, outputs.begin, outputs.end - outputs.begin, epilogue_,
           static_cast<Storage*>(y_.data) + token * y_.row_stride + outputs.begin, y_.row_stride);
  }

  // Some rows of one output block. They take the same few entries in turn, so that what these need
  // of the strip is read from the cache next to the core by all but the first.
  template <int kVectors>
  void run_slice(const typename Weights::Slice& slice, const Packed* strip, Sum* sums) const {
    constexpr int kWidth = kVectors * kLanes<Sum>;
    Range entries{slice.entries.begin, slice.entries.begin};
    do {
      entries = {entries.end, std::min(slice.entries.end, entries.end + group_)};
      for (int64_t row = 0; row < slice.rows; row += kTileRows) {
        with_constant<kTileRows>(std::min<int64_t>(kTileRows, slice.rows - row), [&](auto rows) {
          run_tile<rows(), kVectors>(slice, entries, row, strip, sums + row * kWidth);
        });
      }
    } while (entries.end < slice.entries.end);
  }

  template <int kRows, int kVectors>
  __attribute__((noinline)) void run_tile(const typename Weights::Slice& slice, Range entries,
                                          int64_t row, const Packed* strip, Sum* sums) const {
    constexpr int kWidth = kVectors * kLanes<Sum>;
    Tile<Math, kRows, kVectors> tile;
    const bool first = entries.begin == slice.entries.begin;
    if (Math::kDepth == 1 && walk_.depth_block == 1) {
      multiply_singles(tile, slice, entries, row, strip);
      return tile.add_to(sums, kWidth, first);
    }
    for (int64_t entry = entries.begin; entry < entries.end; ++entry) {
      const int64_t depth = walk_.depth[entry] * walk_.depth_block;
      const int64_t steps =
          (std::min(walk_.depth_block, walk_.depths - depth) + Math::kDepth - 1) / Math::kDepth;
      // Each row of tiles fetches its share of what the group after this one needs.
      const int64_t later = std::min(entry + group_, slice.entries.end - 1);
      weights_.fetch(slice, std::min(entry + group_, last_entry_), row, kRows);
      const Packed* ahead = strip + walk_.depth[later] * walk_.depth_block / Math::kDepth * kWidth +
                            row / kTileRows * steps * kLanes<Sum>;
      tile.multiply(weights_.scalars(slice, entry, row),
                    Vectors<Packed>{strip + depth / Math::kDepth * kWidth, kWidth, ahead}, steps);
    }
    tile.add_to(sums, kWidth, first);
  }

  // Blocks that are one step deep: an entry each would be more of a loop than of a product.
  template <int kRows, int kVectors>
  BLOCK_SPARSE_INLINE void multiply_singles(Tile<Math, kRows, kVectors>& tile,
                                            const typename Weights::Slice& slice, Range entries,
                                            int64_t row, const Packed* strip) const {
    constexpr int kWidth = kVectors * kLanes<Sum>;
    // Each row of tiles fetches its share of what the next entries need.
    const int64_t count = entries.end - entries.begin;
    const int64_t next = std::min(count, slice.entries.end - entries.end);
    for (int64_t i = next * row / slice.rows; i < next * (row + kRows) / slice.rows; ++i) {
      const Packed* ahead = strip + walk_.depth[entries.end + i] * kWidth;
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(ahead + v * kLanes<Sum>);
      weights_.fetch(slice, entries.end + i, 0, static_cast<int>(slice.rows));
    }
    tile.multiply(weights_.single_scalars(slice, entries.begin, row),
                  NumberedVectors<Packed>{strip, walk_.depth + entries.begin, kWidth}, count);
  }

  Walk walk_;
  ConstDenseView x_;
  OutputEpilogue<Math, Value> epilogue_;
  MutableDenseView y_;
  bool stream_;
  int64_t last_entry_;
  int64_t group_;  // entries that the rows of a block take in turn
  int64_t chunk_tokens_;
  Packed* chunk_;
  Weights weights_;
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
