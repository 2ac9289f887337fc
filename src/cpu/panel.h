// Panel: forward and grad_input with the outputs as lanes. A tile of tokens x outputs sums over all
// entries of its output block in registers and is stored once, where it belongs: the output, which
// is the largest operand, is never re-ordered. x is copied into columns, a block is a vector per
// step; in forward it is transposed first, once per chunk of tokens. Not for few tokens (a block is
// brought into form for each chunk), nor for blocks whose output side is no multiple of the lanes.
#pragma once

#include "block_sparse/product.h"
#include "cpu/blocks.h"
#include "cpu/split.h"
#include "cpu/strip.h"
#include "cpu/tile.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

template <class Math, Product kProduct>
class Panel {
  using Storage = typename Math::Storage;
  using Packed = typename Math::Packed;
  using Sum = typename Math::Sum;

  static constexpr int64_t kLane = kLanes<Sum>;
  static constexpr int kVectors = 2;
  static constexpr int kTokens = kRegisters == 32 ? 12 : 6;
  static constexpr int64_t kSliceOutputs = kVectors * kLane;
  // Columns of x are a cache line wide, whatever the depth of a block: the rows of a tile are then
  // a constant apart.
  static constexpr int64_t kColumn = 64 / sizeof(Packed);
  // Canonical blocks are [out][in]: for grad_input each row is a vector of outputs.
  static constexpr bool kInPlace =
      kProduct == Product::grad_input && Math::kDepth == 1 && sizeof(Storage) == sizeof(Packed);
  static constexpr int64_t kChunkBytes = kInPlace ? 512 << 10 : 8 << 20;
  static constexpr int64_t kMinTokensPerPart = 64;

 public:
  static int64_t workspace(const ProductDesc& desc, const Execution& execution) {
    return part_bytes(desc) * useful_threads(desc, execution);
  }

  static void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
    const int64_t count = useful_threads(desc, execution);
    const int64_t token_parts = parts_by_tokens(count, desc.tokens, kMinTokensPerPart);
    parallel_for(execution, count, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const Panel panel(desc, args, static_cast<char*>(args.workspace) + part * part_bytes(desc));
        panel.run_part(even_part(desc.tokens, kTokens, part % token_parts, token_parts),
                       panel.output_part(part / token_parts, count / token_parts));
      }
    });
  }

 private:
  // Some outputs of one output block.
  struct Slice {
    int64_t output, row, count;
    Range entries;
  };

  Panel(const ProductDesc& desc, const ProductArgs& args, void* workspace)
      : walk_(Walk::of<kProduct>(desc, args.weight.pattern)),
        block_(desc.block),
        x_(kProduct == Product::forward ? args.x : args.dy),
        values_(static_cast<const Storage*>(args.weight.values)),
        bias_(desc.epilogue == Epilogue::bias ? static_cast<const Storage*>(args.bias) : nullptr),
        y_(args.output),
        stream_(streams<Math>(args.output, desc.tokens)),
        chunk_tokens_(chunk_tokens(desc)),
        column_stride_(column_stride(desc)),
        columns_(static_cast<Packed*>(workspace)),
        prepared_(columns_ + columns(desc) * column_stride_) {}

  static int64_t columns(const ProductDesc& desc) {
    const int64_t depths = kProduct == Product::forward ? desc.in_features : desc.out_features;
    return (depths + kColumn * Math::kDepth - 1) / (kColumn * Math::kDepth);
  }
  static int64_t chunk_tokens(const ProductDesc& desc) {
    const int64_t token_bytes = std::max<int64_t>(1, columns(desc)) * 64;
    const int64_t chunks = (desc.tokens * token_bytes + kChunkBytes - 1) / kChunkBytes;
    const int64_t tiles = (desc.tokens + kTokens - 1) / kTokens;
    return (tiles + chunks - 1) / chunks * kTokens;
  }
  // An odd number of lines: the lines of a token do not all compete for the same place in a cache.
  static int64_t column_stride(const ProductDesc& desc) {
    return (chunk_tokens(desc) | 1) * kColumn;
  }
  static int64_t part_bytes(const ProductDesc& desc) {
    int64_t elements = columns(desc) * column_stride(desc);
    if constexpr (!kInPlace) {
      const GridShape grid = desc.grid();
      elements += kSliceOutputs * (kProduct == Product::forward
                                       ? grid.block_cols * desc.block.in
                                       : grid.block_rows * desc.block.out + grid.block_rows);
    }
    return (elements * int64_t{sizeof(Packed)} + 63) / 64 * 64;
  }

  Range output_part(int64_t index, int64_t parts) const {
    return {walk_.split(index, parts, walk_.output_block),
            walk_.split(index + 1, parts, walk_.output_block)};
  }

  void run_part(Range tokens, Range outputs) const {
    for (int64_t token = tokens.begin; token < tokens.end; token += chunk_tokens_) {
      run_chunk({token, std::min(tokens.end, token + chunk_tokens_)}, outputs);
    }
    if (stream_) end_of_stream();
  }

  void run_chunk(Range tokens, Range outputs) const {
    pack(tokens);
    for (int64_t output = outputs.begin; output < outputs.end;) {
      const int64_t block = output / walk_.output_block;
      const int64_t row = output % walk_.output_block;
      const int64_t end = std::min(outputs.end, output - row + walk_.output_block);
      const Slice slice{output,
                        row,
                        std::min(kSliceOutputs, end - output),
                        {walk_.first[block], walk_.first[block + 1]}};
      with_constant<kVectors>((slice.count + kLane - 1) / kLane,
                              [&](auto vectors) { run_slice<vectors()>(slice, tokens); });
      output += slice.count;
    }
  }

  // [tokens][features] -> [features / kColumn][tokens][kColumn]
  void pack(Range tokens) const {
    constexpr int64_t kStep = kLane * Math::kDepth, kTogether = 4;
    const Storage* from = static_cast<const Storage*>(x_.data);
    for (int64_t first = tokens.begin; first < tokens.end; first += kTogether) {
      const int64_t last = std::min(tokens.end, first + kTogether);
      Packed* to = columns_ + (first - tokens.begin) * kColumn;
      for (int64_t depth = 0; depth < walk_.depths; depth += kColumn * Math::kDepth) {
        for (int64_t token = first; token < last; ++token) {
          const Storage* row = from + token * x_.row_stride + depth;
          Packed* line = to + (token - first) * kColumn;
          __builtin_prefetch(row + 8 * kColumn * Math::kDepth);
#pragma GCC unroll 4
          for (int64_t i = 0; i < kColumn; i += kLane) {
            const int64_t left = walk_.depths - depth - i * Math::kDepth;
            store(line + i, left >= kStep
                                ? Math::load(row + i * Math::kDepth)
                                : Math::load(row + i * Math::kDepth, std::max<int64_t>(0, left)));
          }
        }
        to += column_stride_;
      }
    }
  }

  template <int kWide>
  void run_slice(const Slice& slice, Range tokens) const {
    prepare<kWide>(slice);
    // Tiles of about the same height.
    const int64_t count = tokens.end - tokens.begin;
    const int64_t tiles = (count + kTokens - 1) / kTokens;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Range part = even_part(count, 1, tile, tiles);
      with_constant<kTokens>(part.end - part.begin, [&](auto height) {
        run_tile<height(), kWide>(slice, tokens.begin + part.begin,
                                  columns_ + part.begin * kColumn);
      });
    }
  }

  int64_t steps() const { return (walk_.depth_block + Math::kDepth - 1) / Math::kDepth; }

  // Brings the blocks of a slice into the form [entry][step][outputs].
  template <int kWide>
  void prepare(const Slice& slice) const {
    constexpr int64_t kWidth = kWide * kLane;
    if constexpr (!kInPlace) {
      Packed* to = prepared_;
      for (int64_t entry = slice.entries.begin; entry < slice.entries.end; ++entry) {
        if constexpr (kProduct == Product::forward) {
          pack_strip<Math>(values_ + (entry * block_.out + slice.row) * block_.in, block_.in,
                           kWidth, block_.in, to, kWidth);
        } else {
          const Storage* from = values_ + walk_.number[entry] * block_.out * block_.in + slice.row;
          Packed* vector = to;
          for (int64_t row = 0; row < block_.out; row += Math::kDepth) {
            for (int64_t i = 0; i < kWidth; i += kLane, vector += kLane) {
              store(vector,
                    Math::join(from + row * block_.in + i, block_.in, block_.out - row, kLane));
            }
          }
        }
        to += steps() * kWidth;
      }
    }
  }

  // Where the vectors of an entry are, and how far apart.
  template <int kWide>
  BLOCK_SPARSE_INLINE const Packed* block(const Slice& slice, int64_t entry) const {
    if constexpr (kInPlace) {
      return values_ + walk_.number[entry] * block_.out * block_.in + slice.row;
    } else {
      return prepared_ + (entry - slice.entries.begin) * steps() * (kWide * kLane);
    }
  }

  template <int kHigh, int kWide>
  __attribute__((noinline)) void run_tile(const Slice& slice, int64_t token,
                                          const Packed* x) const {
    const int64_t stride = kInPlace ? block_.in : kWide * kLane;
    Tile<Math, kHigh, kWide> tile;
    const auto column = [&](const Packed* from, int64_t step) {
      return from + step / kColumn * column_stride_ + step % kColumn;
    };
    for (int64_t entry = slice.entries.begin; entry < slice.entries.end; ++entry) {
      const int64_t depth = walk_.depth[entry] * walk_.depth_block;
      const int64_t begin = depth / Math::kDepth;
      const int64_t end =
          begin +
          (std::min(walk_.depth_block, walk_.depths - depth) + Math::kDepth - 1) / Math::kDepth;
      // What is needed next: the same steps of the entry after this one, or of the next tile.
      const bool last = entry + 1 == slice.entries.end;
      const int64_t next = last ? slice.entries.begin : entry + 1;
      const Packed* x_ahead = last ? x + kHigh * kColumn : x;
      const int64_t ahead = walk_.depth[next] * walk_.depth_block / Math::kDepth - begin;
      const Packed* w = block<kWide>(slice, entry);
      const Packed* w_ahead = block<kWide>(slice, next);
      for (int64_t step = begin; step < end;) {
        const int64_t count = std::min(kColumn - step % kColumn, end - step);
        tile.multiply(Column<Packed, kColumn>{column(x, step), column(x_ahead, step + ahead)},
                      Vectors<Packed, kWide>{w, stride, w_ahead, stride}, count);
        w += count * stride;
        w_ahead += count * stride;
        step += count;
      }
    }
    store_tile(tile, slice, token);
  }

  template <int kHigh, int kWide>
  BLOCK_SPARSE_INLINE void store_tile(const Tile<Math, kHigh, kWide>& tile, const Slice& slice,
                                      int64_t token) const {
    Vec<Sum> bias[kWide] = {};
    if (bias_ != nullptr) {
      for (int v = 0; v < kWide; ++v) {
        bias[v] = Math::load_sum(bias_ + slice.output + v * kLane,
                                 std::min(kLane, slice.count - v * kLane));
      }
    }
    Storage* y = static_cast<Storage*>(y_.data) + token * y_.row_stride + slice.output;
    const auto at = [&](int row, int v) { return y + row * y_.row_stride + v * kLane; };
    if (slice.count < kWide * kLane) {
      tile.for_each([&](int row, int v, Vec<Sum> sum) BLOCK_SPARSE_INLINE_LAMBDA {
        Math::store(at(row, v), sum + bias[v], std::min(kLane, slice.count - v * kLane));
      });
    } else if (stream_) {
      tile.for_each([&](int row, int v, Vec<Sum> sum)
                        BLOCK_SPARSE_INLINE_LAMBDA { Math::stream(at(row, v), sum + bias[v]); });
    } else {
      tile.for_each([&](int row, int v, Vec<Sum> sum)
                        BLOCK_SPARSE_INLINE_LAMBDA { Math::store(at(row, v), sum + bias[v]); });
    }
  }

  Walk walk_;
  BlockShape block_;
  ConstDenseView x_;
  const Storage* values_;
  const Storage* bias_;
  MutableDenseView y_;
  bool stream_;
  int64_t chunk_tokens_;
  int64_t column_stride_;  // elements
  Packed* columns_;
  Packed* prepared_;
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
