// Panel: forward and grad_input with the outputs as lanes. A tile of tokens x outputs sums over all
// entries of its output block in registers and is stored once, where it belongs: the output, which
// is the largest operand, is never re-ordered. x is copied into columns, a block is a vector per
// step; in forward it is transposed first, once or per chunk of tokens, unless the values are
// packed. Canonical ones: not for few tokens (a block is brought into form for each chunk). Never
// for blocks whose output side is no multiple of the lanes.
#pragma once

#include "block_sparse/packed.h"
#include "block_sparse/product.h"
#include "cpu/blocks.h"
#include "cpu/columns.h"
#include "cpu/epilogue.h"
#include "cpu/split.h"
#include "cpu/strip.h"
#include "cpu/tile.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

template <class Math, Product kProduct, bool kPacked = false, class Value = typename Math::Storage>
class Panel {
  using Storage = typename Math::Storage;
  using Packed = typename Math::Packed;
  using Sum = typename Math::Sum;

  static constexpr bool kForward = kProduct == Product::forward;
  static constexpr int64_t kLane = kLanes<Sum>;
  static constexpr int kVectors = 2;
  static constexpr int kTokens = kRegisters == 32 ? 12 : 6;
  static constexpr int64_t kSliceOutputs = kVectors * kLane;
  static constexpr int64_t kColumn = BLOCK_SPARSE_LEVEL::kColumn<Packed>;
  // Canonical blocks are [out][in]: for grad_input each row is a vector of outputs. Narrower
  // vectors than a cache line would read the half of a row, and leave half of the first cache
  // unused.
  static constexpr bool kInPlace =
      kPacked || (kProduct == Product::grad_input && Math::kDepth == 1 && !kWidened<Math> &&
                  kVectorBytes == 64);
  // Blocks up to this size stay in the last cache: they are brought into form once, and then, as
  // when they are read in place, a chunk of x that stays in the second cache is best. Larger ones
  // are read, and brought into form, once per chunk: few chunks.
  static constexpr int64_t kCachedBytes = 8 << 20;
  static constexpr int64_t kSmallChunkBytes = 256 << 10;
  static constexpr int64_t kLargeChunkBytes = kInPlace ? 2 << 20 : 8 << 20;
  static constexpr int64_t kManyTokens = 256;
  // Blocks from this size on are fetched ahead of their use in each chunk, smaller ones in the
  // first, where they are prepared.
  static constexpr int64_t kFetchedBytes = 4 << 20;
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
    int64_t in_block;  // where its elements begin in a block that is read in place
    Packed* prepared;
  };

  Panel(const ProductDesc& desc, const ProductArgs& args, void* workspace)
      : walk_(Walk::of<kProduct>(desc, args.weight.pattern)),
        block_(desc.block),
        order_(packed_order(desc.dtype, desc.block)),
        x_(kForward ? args.x : args.dy),
        values_(static_cast<const Value*>(args.weight.values)),
        epilogue_(OutputEpilogue<Math, Value>::of(desc, args)),
        y_(args.output),
        stream_(streams<Math>(args.output, desc.tokens)),
        chunk_tokens_(chunk_tokens(desc)),
        column_stride_(column_stride(desc)),
        columns_(static_cast<Packed*>(workspace)),
        prepare_all_(prepares_all(desc)),
        large_blocks_(block_bytes(desc) >= kFetchedBytes),
        prepared_(columns_ + columns(desc) * column_stride_) {}

  static int64_t steps_of(int64_t features) { return (features + Math::kDepth - 1) / Math::kDepth; }
  int64_t steps() const { return steps_of(walk_.depth_block); }

  static int64_t columns(const ProductDesc& desc) {
    return (steps_of(kForward ? desc.in_features : desc.out_features) + kColumn - 1) / kColumn;
  }
  static int64_t block_elements(const ProductDesc& desc) {
    return kForward ? desc.block.out * steps_of(desc.block.in)
                    : desc.block.in * steps_of(desc.block.out);
  }
  static int64_t block_bytes(const ProductDesc& desc) {
    if (kPacked) return desc.nnz * desc.block.out * desc.block.in * int64_t{sizeof(Storage)};
    return desc.nnz * block_elements(desc) * int64_t{sizeof(Packed)};
  }
  static bool prepares_all(const ProductDesc& desc) {
    return !kInPlace && desc.tokens >= kManyTokens && block_bytes(desc) <= kCachedBytes;
  }
  static int64_t chunk_tokens(const ProductDesc& desc) {
    const bool small = kInPlace ? block_bytes(desc) <= kCachedBytes : prepares_all(desc);
    const int64_t most = small ? kSmallChunkBytes : kLargeChunkBytes;
    const int64_t bytes = desc.tokens * std::max<int64_t>(1, columns(desc)) * 64;
    const int64_t chunks = std::max<int64_t>(1, (bytes + most - 1) / most);
    const int64_t tiles = (desc.tokens + kTokens - 1) / kTokens;
    return (tiles + chunks - 1) / chunks * kTokens;
  }
  // An odd number of lines: the lines of a token do not all compete for the same place in a cache.
  static int64_t column_stride(const ProductDesc& desc) {
    return (chunk_tokens(desc) | 1) * kColumn;
  }
  static int64_t part_bytes(const ProductDesc& desc) {
    int64_t elements = columns(desc) * column_stride(desc);
    if (prepares_all(desc)) {
      elements += desc.nnz * block_elements(desc);
    } else if (!kInPlace) {
      const GridShape grid = desc.grid();
      elements += (kForward ? grid.block_cols : grid.block_rows) * block_elements(desc);
    }
    return (elements * int64_t{sizeof(Packed)} + 63) / 64 * 64;
  }

  Range output_part(int64_t index, int64_t parts) const {
    return {walk_.split(index, parts, walk_.output_block),
            walk_.split(index + 1, parts, walk_.output_block)};
  }

  void run_part(Range tokens, Range outputs) const {
    const Slice first = slice_at(outputs.begin, outputs, prepared_);
    for (int64_t token = tokens.begin; token < tokens.end; token += chunk_tokens_) {
      // Where all is prepared, with the first chunk: the blocks of a slice are fetched while the
      // one before it is multiplied.
      const bool prepares = !kInPlace && (!prepare_all_ || token == tokens.begin);
      const bool fetches = kForward && prepares && (prepare_all_ || large_blocks_);
      const Range chunk{token, std::min(tokens.end, token + chunk_tokens_)};
      pack_columns<Math>(static_cast<const Storage*>(x_.data) + token * x_.row_stride,
                         x_.row_stride, chunk.end - token, walk_.depths, columns_, column_stride_);
      for (Slice slice = first; slice.count > 0;) {
        if (prepares) prepare(slice);
        const Slice next = after(slice, outputs);
        with_constant<kVectors>(vectors(slice), [&](auto wide) {
          run_slice<wide()>(slice, next, chunk, tokens.end, fetches);
        });
        slice = next;
      }
    }
    if (stream_) end_of_stream();
  }

  // None (count 0) at the end of the outputs.
  Slice slice_at(int64_t output, Range outputs, Packed* prepared) const {
    if (output >= outputs.end) return {};
    const int64_t block = output / walk_.output_block;
    const int64_t row = output % walk_.output_block;
    const int64_t end = std::min(outputs.end, output - row + walk_.output_block);
    return {output,
            row,
            std::min(kSliceOutputs, end - output),
            {walk_.first[block], walk_.first[block + 1]},
            kPacked ? order_.offset(row, 0) : row,
            prepared};
  }
  Slice after(const Slice& slice, Range outputs) const {
    const int64_t size =
        prepare_all_ ? (slice.entries.end - slice.entries.begin) * steps() * vectors(slice) * kLane
                     : 0;
    return slice_at(slice.output + slice.count, outputs, slice.prepared + size);
  }
  static int64_t vectors(const Slice& slice) { return (slice.count + kLane - 1) / kLane; }

  template <int kWide>
  void run_slice(const Slice& slice, const Slice& next, Range tokens, int64_t tokens_end,
                 bool fetches) const {
    // Tiles of about the same height.
    const int64_t count = tokens.end - tokens.begin;
    const int64_t tiles = (count + kTokens - 1) / kTokens;
    const int64_t lines =
        fetches ? kSliceOutputs * walk_.depth_block * int64_t{sizeof(Value)} / 64 : 0;
    const int64_t each = (lines + tiles - 1) / tiles;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Range part = even_part(count, 1, tile, tiles);
      with_constant<kTokens>(part.end - part.begin, [&](auto height) {
        const int64_t token = tokens.begin + part.begin;
        const Later later{next,
                          {std::min(lines, each * tile), std::min(lines, each * (tile + 1))},
                          token + chunk_tokens_,
                          std::min<int64_t>(height(), tokens_end - token - chunk_tokens_)};
        run_tile<height(), kWide>(slice, token, columns_ + part.begin * kColumn, later);
      });
    }
  }

  // What a tile fetches for later: its share of the blocks of the next slice, a little with each
  // entry, and its share of the tokens of the next chunk.
  struct Later {
    const Slice& next;
    Range lines;
    int64_t token, tokens;
  };
  BLOCK_SPARSE_INLINE void fetch_block(const Later& later, int64_t index) const {
    const int64_t entry = later.next.entries.begin + index;
    if (entry >= later.next.entries.end) return;
    const Value* from = values_ + (entry * block_.out + later.next.row) * block_.in;
    for (int64_t i = later.lines.begin; i < later.lines.end; ++i) {
      __builtin_prefetch(from + i * int64_t{64 / sizeof(Value)}, 0, 2);
    }
  }
  BLOCK_SPARSE_INLINE void fetch_tokens(const Later& later, const Slice& slice) const {
    constexpr int64_t kLine = 64 / sizeof(Storage);
    const int64_t begin = walk_.depths * slice.output / walk_.outputs / kLine * kLine;
    const int64_t end = walk_.depths * (slice.output + slice.count) / walk_.outputs;
    const Storage* from = static_cast<const Storage*>(x_.data) + later.token * x_.row_stride;
    for (int64_t token = 0; token < later.tokens; ++token, from += x_.row_stride) {
      for (int64_t i = begin; i < end; i += kLine) __builtin_prefetch(from + i, 0, 2);
    }
  }
  // Brings the blocks of a slice into the form [entry][step][outputs].
  void prepare(const Slice& slice) const {
    if constexpr (!kInPlace) {
      const int64_t width = vectors(slice) * kLane;
      Packed* to = slice.prepared;
      for (int64_t entry = slice.entries.begin; entry < slice.entries.end; ++entry) {
        if constexpr (kForward) {
          pack_strip<Math>(values_ + (entry * block_.out + slice.row) * block_.in, block_.in, width,
                           block_.in, to, width);
        } else {
          const Value* from = values_ + walk_.number[entry] * block_.out * block_.in + slice.row;
          Packed* vector = to;
          for (int64_t row = 0; row < block_.out; row += Math::kDepth) {
            for (int64_t i = 0; i < width; i += kLane, vector += kLane) {
              store(vector,
                    Math::join(from + row * block_.in + i, block_.in, block_.out - row, kLane));
            }
          }
        }
        to += steps() * width;
      }
    }
  }

  // The vectors of a slice in an entry, with those of `next` to be fetched.
  template <int kWide>
  BLOCK_SPARSE_INLINE auto vectors_of(const Slice& slice, int64_t entry, int64_t next) const {
    const auto in_place = [&](int64_t e) {
      const int64_t number = kForward ? e : walk_.number[e];
      return values_ + number * block_.out * block_.in + slice.in_block;
    };
    if constexpr (kPacked) {
      return StripVectors<Math, kWide>{in_place(entry), in_place(next), block_.in, order_.pair};
    } else if constexpr (kInPlace) {
      return Vectors<Packed, kWide>{in_place(entry), block_.in, in_place(next), block_.in};
    } else {
      constexpr int64_t kStride = kWide * kLane;
      const auto prepared = [&](int64_t e) {
        return slice.prepared + (e - slice.entries.begin) * steps() * kStride;
      };
      return Vectors<Packed, kWide>{prepared(entry), kStride, prepared(next), kStride};
    }
  }

  // The steps of an entry: where they begin in the columns, how many, and how many there is
  // room for before the next column.
  struct Steps {
    int64_t offset, count, in_column;
  };
  BLOCK_SPARSE_INLINE Steps steps_of_entry(int64_t entry) const {
    const uint64_t depth = static_cast<uint64_t>(walk_.depth[entry] * walk_.depth_block);
    const uint64_t begin = depth / Math::kDepth, within = begin % kColumn;
    const int64_t left = walk_.depths - static_cast<int64_t>(depth);
    return {static_cast<int64_t>(begin / kColumn) * column_stride_ + static_cast<int64_t>(within),
            steps_of(std::min(walk_.depth_block, left)), kColumn - static_cast<int64_t>(within)};
  }

  template <int kHigh, int kWide>
  __attribute__((noinline)) void run_tile(const Slice& slice, int64_t token, const Packed* x,
                                          const Later& later) const {
    Tile<Math, kHigh, kWide> tile;
    alignas(64) Sum sums[kHigh * kWide * kLane];  // of the steps before those in the tile
    int64_t summed = 0, in_tile = 0;              // steps
    Storage* to = static_cast<Storage*>(y_.data) + token * y_.row_stride + slice.output;
    if (!stream_) {
      for (int row = 0; row < kHigh; ++row) __builtin_prefetch(to + row * y_.row_stride, 1);
    }
    if (later.tokens > 0) fetch_tokens(later, slice);
    for (int64_t entry = slice.entries.begin; entry < slice.entries.end; ++entry) {
      const Steps steps = steps_of_entry(entry);
      if (in_tile + steps.count > kChainSteps && in_tile > 0) {
        tile.add_to(sums, kWide * kLane, summed == 0);
        tile = {};
        summed += in_tile;
        in_tile = 0;
      }
      in_tile += steps.count;
      // What is needed next: the same steps of the entry after this one, or of the next tile.
      if (later.lines.end > 0) fetch_block(later, entry - slice.entries.begin);
      const bool last = entry + 1 == slice.entries.end;
      const int64_t next = last ? slice.entries.begin : entry + 1;
      const Packed* ahead = (last ? x + kHigh * kColumn : x) + steps_of_entry(next).offset;
      const Packed* at = x + steps.offset;
      auto vectors = vectors_of<kWide>(slice, entry, next);
      // A column at a time. Addresses are moved on: what finds them anew takes as long as a step.
      for (int64_t left = steps.count, count = std::min(left, steps.in_column); true;
           count = std::min(left, kColumn)) {
        tile.multiply(Column<Packed, kColumn, kHigh>{at, ahead}, vectors, count);
        left -= count;
        if (left == 0) break;
        vectors = vectors.from(count);
        at += column_stride_ - kColumn + count;
        ahead += column_stride_;
      }
    }
    if (summed > 0) tile.add(sums, kWide * kLane);
    store_rows(tile, to, y_.row_stride, slice.output, slice.count, epilogue_, stream_);
  }

  Walk walk_;
  BlockShape block_;
  PackedOrder order_;  // of packed values
  ConstDenseView x_;
  const Value* values_;
  OutputEpilogue<Math, Value> epilogue_;
  MutableDenseView y_;
  bool stream_;
  int64_t chunk_tokens_;
  int64_t column_stride_;  // elements
  Packed* columns_;
  bool prepare_all_;   // once for all chunks
  bool large_blocks_;  // they come from memory
  Packed* prepared_;
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
