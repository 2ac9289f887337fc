// Few: forward and grad_input for a handful of tokens, where the time is that of reading the
// weights. They are read once, as vectors along their rows, in the order in which they are stored;
// nothing is packed. Not for many tokens: the sums of a tile would not suffice to hide the reads.
#pragma once

#include <utility>

#include "block_sparse/product.h"
#include "cpu/blocks.h"
#include "cpu/epilogue.h"
#include "cpu/split.h"
#include "cpu/tile.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

template <class Math, Product kProduct, class Value = typename Math::Storage>
class Few {
  using Storage = typename Math::Storage;
  using Packed = typename Math::Packed;
  using Sum = typename Math::Sum;
  static constexpr int64_t kLane = kLanes<Sum>;
  static constexpr int kTokens = 4;  // taken together
  static constexpr int kRows = 4;    // outputs taken together in forward
  static constexpr int64_t kPanelOutputs = 32;
  static constexpr int64_t kEntriesAhead = 4;

 public:
  static void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
    const Few few(desc, args);
    const int64_t count = useful_threads(desc, execution);
    parallel_for(execution, count, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t unit = few.walk_.output_block;
        few.run_outputs(
            {few.walk_.split(part, count, unit), few.walk_.split(part + 1, count, unit)});
      }
    });
  }

 private:
  Few(const ProductDesc& desc, const ProductArgs& args)
      : walk_(Walk::of<kProduct>(desc, args.weight.pattern)),
        block_(desc.block),
        x_(kProduct == Product::forward ? args.x : args.dy),
        values_(static_cast<const Value*>(args.weight.values)),
        epilogue_(OutputEpilogue<Math, Value>::of(desc, args)),
        y_(args.output),
        tokens_(desc.tokens),
        last_entry_(desc.nnz - 1) {}

  // Some outputs of one block at a time, all tokens of them while their weights are at hand.
  void run_outputs(Range outputs) const {
    for (int64_t output = outputs.begin; output < outputs.end;) {
      const int64_t row = output % walk_.output_block;
      const int64_t count =
          std::min({kPanelOutputs, walk_.output_block - row, outputs.end - output});
      for (int64_t token = 0; token < tokens_; token += kTokens) {
        with_constant<kTokens>(std::min<int64_t>(kTokens, tokens_ - token), [&](auto tokens) {
          run_panel<tokens()>(output, row, count, token);
        });
      }
      output += count;
    }
  }

  template <int kCount>
  void run_panel(int64_t output, int64_t row, int64_t count, int64_t token) const {
    alignas(64) Sum sums[kCount * kPanelOutputs];
    const Storage* x = static_cast<const Storage*>(x_.data) + token * x_.row_stride;
    const int64_t block = output / walk_.output_block;
    const Range entries{walk_.first[block], walk_.first[block + 1]};
    if constexpr (kProduct == Product::forward) {
      for (int64_t r = 0; r < count; r += kRows) {
        with_constant<kRows>(std::min<int64_t>(kRows, count - r), [&](auto rows) {
          dot_rows<rows(), kCount>(entries, row + r, x, sums + r);
        });
      }
    } else {
      for (int64_t i = 0; i < count; i += 2 * kLane) {
        with_constant<2>(std::min<int64_t>(2, (count - i + kLane - 1) / kLane), [&](auto vectors) {
          add_rows<vectors(), kCount>(entries, row + i, x, sums + i);
        });
      }
    }
    for (int t = 0; t < kCount; ++t) {
      Storage* y = static_cast<Storage*>(y_.data) + (token + t) * y_.row_stride + output;
      for (int64_t i = 0; i < count; i += kLane) {
        const int64_t n = std::min(kLane, count - i);
        const Vec<Sum> sum = load(sums + t * kPanelOutputs + i, n);
        Math::store(y + i, epilogue_.lanes(output + i, n)(sum), n);
      }
    }
  }

  // Forward: rows of the weights are vectors along the depth, and so is x; lanes are added last.
  template <int kOutputs, int kCount>
  void dot_rows(Range entries, int64_t row, const Storage* x, Sum* to) const {
    constexpr int64_t kStep = kLane * Math::kDepth;
    Vec<Sum> sums[kOutputs][kCount] = {}, summed[kOutputs][kCount] = {};
    int64_t chain = 0;
    for (int64_t entry = entries.begin; entry < entries.end; ++entry) {
      const int64_t depth = walk_.depth[entry] * block_.in;
      const int64_t count = std::min(block_.in, walk_.depths - depth);
      const int64_t later = std::min(entry + kEntriesAhead, last_entry_);
      const Value* w = values_ + (entry * block_.out + row) * block_.in;
      const Value* ahead = values_ + (later * block_.out + row) * block_.in;
      for (int64_t k = 0; k < count; k += kStep) {
        const int64_t n = std::min(kStep, count - k);
        Vec<Packed> b[kCount];
#pragma GCC unroll 4
        for (int t = 0; t < kCount; ++t) {
          b[t] = load_values<Math>(x + t * x_.row_stride + depth + k, n);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kOutputs; ++r) {
          __builtin_prefetch(ahead + r * block_.in + k);
          const Vec<Packed> a = load_values<Math>(w + r * block_.in + k, n);
#pragma GCC unroll 4
          for (int t = 0; t < kCount; ++t) sums[r][t] = Math::multiply_add(a, b[t], sums[r][t]);
        }
      }
      chain += (count + kStep - 1) / kStep;
      if (chain >= kChainSteps) {
        chain = 0;
        for (int r = 0; r < kOutputs; ++r) {
          for (int t = 0; t < kCount; ++t) summed[r][t] += std::exchange(sums[r][t], Vec<Sum>{});
        }
      }
    }
    for (int r = 0; r < kOutputs; ++r) {
      for (int t = 0; t < kCount; ++t) {
        to[t * kPanelOutputs + r] = add_lanes<Sum>(summed[r][t] + sums[r][t]);
      }
    }
  }

  // grad_input: rows of the weights are vectors of outputs, each times one element of dy.
  template <int kVectors, int kCount>
  void add_rows(Range entries, int64_t output, const Storage* dy, Sum* to) const {
    Tile<Math, kCount, kVectors> tile;
    bool first = true;
    int64_t chain = 0;
    for (int64_t entry = entries.begin; entry < entries.end; ++entry) {
      const int64_t depth = walk_.depth[entry] * block_.out;
      const int64_t steps = std::min(block_.out, walk_.depths - depth);
      const int64_t later = std::min(entry + 1, last_entry_);
      const auto block = [&](int64_t e) {
        return values_ + walk_.number[e] * block_.out * block_.in + output;
      };
      tile.multiply(Scalars<Packed, false>{dy + depth, x_.row_stride},
                    Vectors<Packed>{block(entry), block_.in, block(later), block_.in}, steps);
      chain += steps;
      if (chain >= kChainSteps) {
        tile.add_to(to, kPanelOutputs, std::exchange(first, false));
        tile = {};
        chain = 0;
      }
    }
    tile.add_to(to, kPanelOutputs, first);
  }

  Walk walk_;
  BlockShape block_;
  ConstDenseView x_;
  const Value* values_;
  OutputEpilogue<Math, Value> epilogue_;
  MutableDenseView y_;
  int64_t tokens_;
  int64_t last_entry_;
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
