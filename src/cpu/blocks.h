// Blocks: the sparse operand of spmm. A walk says which blocks an output needs and where they meet
// the dense operand; the blocks themselves are read in place where that can be done, and else
// brought into the form that the inner loop multiplies, a panel of outputs at a time.
#pragma once

#include "block_sparse/product.h"
#include "cpu/split.h"
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

  // The output at which part `index` of `parts` begins, a multiple of `unit`.
  int64_t split(int64_t index, int64_t parts, int64_t unit) const {
    if (index == 0) return 0;
    if (index == parts) return outputs;
    // An output block costs its entries, and a little for being stored.
    const int64_t blocks = (outputs + output_block - 1) / output_block;
    const auto cost = [&](int64_t block) { return first[block] + block; };
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
    return std::min(outputs, (low * output_block + unit - 1) / unit * unit);
  }
};

template <class Math, Product kProduct, class Value = typename Math::Storage>
class Blocks {
  using Packed = typename Math::Packed;
  // Canonical blocks are [out][in]: for grad_input, adjacent elements are adjacent outputs.
  static constexpr bool kAdjacentRows = kProduct == Product::grad_input;

 public:
  // True where stored elements, as they lie, are what the inner loop multiplies.
  static constexpr bool kDirect =
      sizeof(Value) * Math::kDepth == sizeof(Packed) && (Math::kDepth == 1 || !kAdjacentRows);

  // Rows of one output block, and the entries that they sum over.
  struct Slice {
    int64_t output, row, rows;
    Range entries;
    const Packed* prepared;
  };

  // The scratch that `prepare` needs for panels of `outputs`.
  static int64_t prepared_elements(const ProductDesc& desc, int64_t outputs) {
    if constexpr (kDirect) return 0;
    const GridShape grid = desc.grid();
    const int64_t depth =
        kAdjacentRows ? grid.block_rows * desc.block.out : grid.block_cols * desc.block.in;
    return outputs * depth / Math::kDepth + kLanes<Packed>;
  }

  Blocks(const Walk& walk, const Value* values, BlockShape block, Packed* prepared)
      : walk_(walk), values_(values), block_(block), prepared_(prepared) {}

  template <class F>
  void for_each_slice(Range outputs, const F& f) const {
    const Packed* prepared = prepared_;
    for (int64_t output = outputs.begin; output < outputs.end;) {
      const int64_t block = output / walk_.output_block;
      const int64_t row = output % walk_.output_block;
      const int64_t rows = std::min(walk_.output_block - row, outputs.end - output);
      const Range entries{walk_.first[block], walk_.first[block + 1]};
      f(Slice{output, row, rows, entries, prepared});
      prepared += (entries.end - entries.begin) * rows * walk_.depth_block / Math::kDepth;
      output += rows;
    }
  }

  // Brings the blocks of a panel into form, in the order of its slices.
  void prepare(Range outputs) const {
    if constexpr (!kDirect) {
      Packed* to = prepared_;
      for_each_slice(outputs, [&](const Slice& slice) {
        for (int64_t entry = slice.entries.begin; entry < slice.entries.end; ++entry) {
          const Value* from = values_ + number(entry) * block_.out * block_.in;
          // Row after row of the block as it is stored; for grad_input the slice is columns of it.
          const int64_t first = kAdjacentRows ? 0 : slice.row;
          const int64_t end = kAdjacentRows ? block_.out : slice.row + slice.rows;
          const int64_t column = kAdjacentRows ? slice.row : 0;
          const int64_t columns = kAdjacentRows ? slice.rows : block_.in;
          for (int64_t row = first; row < end; row += Math::kDepth, to += columns) {
            for (int64_t i = 0; i < columns; i += kLanes<Packed>) {
              store(to + i,
                    join_values<Math>(from + row * block_.in + column + i, block_.in, Math::kDepth,
                                      std::min<int64_t>(kLanes<Packed>, columns - i)));
            }
          }
        }
      });
    }
  }

  // Fetches the rows of a tile in a later entry: blocks are read row by row, out of order, where
  // the hardware does not foresee it.
  BLOCK_SPARSE_INLINE void fetch(const Slice& slice, int64_t entry, int64_t row, int rows) const {
    if constexpr (kDirect) {
      constexpr int64_t kLine = 64 / sizeof(Packed);
      const int64_t stride = block_.in / Math::kDepth;
      const int64_t share = kAdjacentRows ? block_.out * rows / slice.rows : rows;
      const Packed* from = reinterpret_cast<const Packed*>(values_) +
                           number(entry) * block_.out * stride +
                           (kAdjacentRows ? row * share / rows : slice.row + row) * stride;
      for (int64_t i = 0; i < share * stride; i += kLine) __builtin_prefetch(from + i);
    }
  }

  // The scalars of a tile: rows from `row` of a slice on. Where a block is one step deep, in the
  // entries from `first` on, each of them a step.
  BLOCK_SPARSE_INLINE auto single_scalars(const Slice& slice, int64_t first, int64_t row) const {
    if constexpr (kDirect && kAdjacentRows) {
      const Packed* from = reinterpret_cast<const Packed*>(values_) + slice.row + row;
      return NumberedScalars<Packed>{from, walk_.number + first, block_.in};
    } else if constexpr (kDirect) {
      const Packed* from = reinterpret_cast<const Packed*>(values_) + slice.row + row;
      return Scalars<Packed, true>{from + first * block_.out, block_.out};
    } else {
      const int64_t skipped = (first - slice.entries.begin) * slice.rows;
      return Scalars<Packed, true>{slice.prepared + skipped + row, slice.rows};
    }
  }

  // Else in one entry.
  BLOCK_SPARSE_INLINE Scalars<Packed, kAdjacentRows> scalars(const Slice& slice, int64_t entry,
                                                             int64_t row) const {
    if constexpr (kDirect) {
      const int64_t stride = block_.in / Math::kDepth;
      const int64_t first = slice.row + row;
      return {reinterpret_cast<const Packed*>(values_) + number(entry) * block_.out * stride +
                  (kAdjacentRows ? first : first * stride),
              stride};
    } else {
      const int64_t stride = kAdjacentRows ? slice.rows : block_.in;
      const int64_t size = slice.rows * walk_.depth_block / Math::kDepth;
      return {slice.prepared + (entry - slice.entries.begin) * size +
                  (kAdjacentRows ? row : row * stride),
              stride};
    }
  }

 private:
  BLOCK_SPARSE_INLINE int64_t number(int64_t entry) const {
    return kProduct == Product::forward ? entry : walk_.number[entry];
  }

  Walk walk_;
  const Value* values_;
  BlockShape block_;
  Packed* prepared_;
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
