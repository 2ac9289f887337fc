// Scatter: forward of blocks one output high and grad_input of blocks one input wide, where each
// block has a single output. Some rows of x, tokens as lanes, stay in registers while all blocks
// that meet them add to their outputs. (Gathered by output, as in Spmm, a vector of x would be read
// for each multiplication.) Not for int8 or sixteen bits: scalars are read where they are stored.
#pragma once

#include <type_traits>
#include <utility>

#include "block_sparse/product.h"
#include "cpu/split.h"
#include "cpu/strip.h"
#include "cpu/tile.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

// Whether blocks are of those that the class below takes, in a product that is not grad_weight. In
// forward they lie in another order than they are taken in: a short one is not worth its cache
// line.
template <Product kProduct>
bool has_single_outputs(BlockShape block) {
  return kProduct == Product::forward ? block.out == 1 && block.in >= 4
                                      : block.in == 1 && block.out >= 2;
}

template <class Math, Product kProduct>
class Scatter {
  static_assert(std::is_same_v<typename Math::Storage, typename Math::Sum>);
  using Scalar = typename Math::Sum;
  static constexpr bool kForward = kProduct == Product::forward;
  static constexpr int64_t kLane = kLanes<Scalar>;
  // Rows of x x vectors of tokens, their sums, and a scalar fill the registers.
  static constexpr int kRows = kRegisters == 32 ? 8 : 6;
  static constexpr int kVectors = kRegisters == 32 ? 3 : 2;
  static constexpr int64_t kStripTokens = kVectors * kLane;
  // Outputs whose sums stay in the first cache.
  static constexpr int64_t kSumBytes = 16 << 10;
  static constexpr int64_t kChunkOutputs =
      kSumBytes / int64_t{sizeof(Scalar)} / kStripTokens / kLane * kLane;
  // Sums of a few rows each that are added up in a chain, on average.
  static constexpr int64_t kChainSums = 64;
  static constexpr int64_t kEntriesAhead = 8;

 public:
  static int64_t workspace(const ProductDesc& desc, const Execution& execution) {
    return part_bytes(desc) * useful_threads(desc, execution);
  }

  static void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
    const int64_t count = useful_threads(desc, execution);
    const int64_t token_parts = parts_by_tokens(count, desc.tokens, kStripTokens);
    const int64_t output_parts = count / token_parts;
    parallel_for(execution, count, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const Scatter scatter(desc, args,
                              static_cast<char*>(args.workspace) + part * part_bytes(desc));
        scatter.run_part(even_part(desc.tokens, kLane, part % token_parts, token_parts),
                         even_part(outputs(desc), kLane, part / token_parts, output_parts));
      }
    });
  }

 private:
  Scatter(const ProductDesc& desc, const ProductArgs& args, void* workspace)
      : depth_block_(depth_block(desc)),
        depths_(depths(desc)),
        last_entry_(desc.nnz - 1),
        x_(kForward ? args.x : args.dy),
        values_(static_cast<const Scalar*>(args.weight.values)),
        epilogue_(OutputEpilogue<Math>::of(desc, args)),
        y_(args.output),
        strip_(static_cast<Scalar*>(workspace)),
        next_(reinterpret_cast<int32_t*>(strip_ + depths_ * kStripTokens)) {
    const PatternView& pattern = args.weight.pattern;
    first_ = kForward ? pattern.ccol : pattern.crow;
    output_ = kForward ? pattern.trow : pattern.col;
    number_ = kForward ? pattern.perm : nullptr;
  }

  static int64_t outputs(const ProductDesc& desc) {
    return kForward ? desc.out_features : desc.in_features;
  }
  static int64_t depths(const ProductDesc& desc) {
    return kForward ? desc.in_features : desc.out_features;
  }
  static int64_t depth_block(const ProductDesc& desc) {
    return kForward ? desc.block.in : desc.block.out;
  }
  static int64_t part_bytes(const ProductDesc& desc) {
    const int64_t blocks = (depths(desc) + depth_block(desc) - 1) / depth_block(desc);
    const int64_t bytes =
        depths(desc) * kStripTokens * int64_t{sizeof(Scalar)} + blocks * int64_t{sizeof(int32_t)};
    return (bytes + 63) / 64 * 64;
  }

  void run_part(Range tokens, Range outputs) const {
    for (int64_t token = tokens.begin; token < tokens.end; token += kStripTokens) {
      const int64_t count = std::min(kStripTokens, tokens.end - token);
      with_constant<kVectors>((count + kLane - 1) / kLane,
                              [&](auto vectors) { run_strip<vectors()>(token, count, outputs); });
    }
  }

  template <int kWide>
  void run_strip(int64_t token, int64_t tokens, Range outputs) const {
    pack_strip<Math>(static_cast<const Scalar*>(x_.data) + token * x_.row_stride, x_.row_stride,
                     tokens, depths_, strip_, kWide * kLane);
    for (int64_t block = 0; block * depth_block_ < depths_; ++block) {
      const int32_t* end = output_ + first_[block + 1];
      next_[block] = static_cast<int32_t>(
          std::lower_bound(output_ + first_[block], end, outputs.begin) - output_);
    }
    for (int64_t output = outputs.begin; output < outputs.end; output += kChunkOutputs) {
      run_chunk<kWide>(token, tokens, {output, std::min(outputs.end, output + kChunkOutputs)});
    }
  }

  template <int kWide>
  void run_chunk(int64_t token, int64_t tokens, Range outputs) const {
    constexpr int64_t kWidth = kWide * kLane;
    alignas(64) Scalar sums[kChunkOutputs * kWidth] = {}, summed[kChunkOutputs * kWidth];
    const int64_t count = outputs.end - outputs.begin;
    int64_t chains = 0;  // links of them, of all outputs together
    bool any_summed = false;
    for (int64_t block = 0, depth = 0; depth < depths_; ++block, depth += depth_block_) {
      const Range entries = entries_of(block, outputs);
      if (entries.begin == entries.end) continue;
      const int64_t rows = std::min(depth_block_, depths_ - depth);
      const int64_t groups = (rows + kRows - 1) / kRows;
      for (int64_t group = 0; group < groups; ++group) {
        const Range part = even_part(rows, 1, group, groups);
        with_constant<kRows>(part.end - part.begin, [&](auto high) {
          add_entries<high(), kWide>(entries, part.begin, strip_ + (depth + part.begin) * kWidth,
                                     sums, outputs.begin);
        });
      }
      chains += (entries.end - entries.begin) * groups;
      if (chains > kChainSums * count) {
        move_sums(sums, summed, count * kWidth, std::exchange(any_summed, true));
        chains = 0;
      }
    }
    if (any_summed) move_sums(sums, summed, count * kWidth, true);
    unpack_strip<Math, false, Scalar>(
        any_summed ? summed : sums, kWidth, tokens, outputs.begin, count, epilogue_,
        static_cast<Scalar*>(y_.data) + token * y_.row_stride + outputs.begin, y_.row_stride);
  }

  // `add`: to those that are there.
  static void move_sums(Scalar* from, Scalar* to, int64_t count, bool add) {
    for (int64_t i = 0; i < count; i += kLane) {
      const Vec<Scalar> sum = load(from + i);
      store(to + i, add ? load(to + i) + sum : sum);
      store(from + i, Vec<Scalar>{});
    }
  }

  // The next entries of a block of the depth, as far as their outputs are among these.
  Range entries_of(int64_t block, Range outputs) const {
    const int64_t begin = next_[block], last = first_[block + 1];
    const auto count = static_cast<uint32_t>(outputs.end - outputs.begin);
    const auto first = static_cast<uint32_t>(outputs.begin);
    int64_t end = begin;
    // Unsigned: an output before the first, which no valid pattern has here, ends it too.
    while (end < last && static_cast<uint32_t>(output_[end]) - first < count) ++end;
    next_[block] = static_cast<int32_t>(end);
    return {begin, end};
  }

  // Rows of x times a scalar each, from `row` of every block on, summed and added to its output.
  template <int kHigh, int kWide>
  __attribute__((noinline)) void add_entries(Range entries, int64_t row, const Scalar* x,
                                             Scalar* sums, int64_t first_output) const {
    Vec<Scalar> rows[kHigh][kWide];
    for (int r = 0; r < kHigh; ++r) {
      for (int v = 0; v < kWide; ++v) rows[r][v] = load(x + (r * kWide + v) * kLane);
    }
    // Copies: the compiler cannot know that a store leaves the members alone.
    const int32_t* const output = output_;
    const int32_t* const number = number_;
    const int64_t depth_block = depth_block_, last_entry = last_entry_;
    const Scalar* const values = values_ + row;
    const auto block = [=](int64_t entry) BLOCK_SPARSE_INLINE_LAMBDA {
      return values + (kForward ? int64_t{number[entry]} : entry) * depth_block;
    };
    for (int64_t entry = entries.begin; entry < entries.end; ++entry) {
      const Scalar* w = block(entry);
      if constexpr (kForward) {
        __builtin_prefetch(block(std::min(entry + kEntriesAhead, last_entry)));
      }
      Scalar* to = sums + (output[entry] - first_output) * kWide * kLane;
      Vec<Scalar> sum[kWide] = {};
#pragma GCC unroll 8
      for (int r = 0; r < kHigh; ++r) {
        const Scalar a = w[r];
#pragma GCC unroll 4
        for (int v = 0; v < kWide; ++v) sum[v] = Math::multiply_add(a, rows[r][v], sum[v]);
      }
      for (int v = 0; v < kWide; ++v) {
        BLOCK_SPARSE_LEVEL::store(to + v * kLane, load(to + v * kLane) + sum[v]);
      }
    }
  }

  int64_t depth_block_, depths_;
  int64_t last_entry_;
  ConstDenseView x_;
  const Scalar* values_;
  OutputEpilogue<Math> epilogue_;
  MutableDenseView y_;
  Scalar* strip_;          // [depths][tokens of a strip]
  int32_t* next_;          // first entry of each block of the depth that is still to come
  const int32_t* first_;   // first entry of each block of the depth
  const int32_t* output_;  // of each entry
  const int32_t* number_;  // block number of each entry; null where that is the entry
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
