// Sddmm: grad_weight, dense x dense sampled at the pattern. A block is a sum over tokens of outer
// products of a row of dy and a row of x: one side gives scalars, one element a time, the other
// lanes. Both are packed into panels [block][token][features of a block], so that the inner loop
// reads in order. Which side has the lanes is chosen per product: the one that fills them better.
#pragma once

#include "block_sparse/product.h"
#include "cpu/split.h"
#include "cpu/tile.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

template <class Math>
class Sddmm {
  using Storage = typename Math::Storage;
  using Packed = typename Math::Packed;
  using Sum = typename Math::Sum;
  static constexpr int64_t kLane = kLanes<Sum>;
  static constexpr int64_t kMaxChunkTokens = 256;
  static constexpr int64_t kMaxChunkBytes = 4 << 20;

 public:
  static int64_t workspace(const ProductDesc& desc, const Execution& execution) {
    return Sddmm(desc, {}, nullptr).part_bytes() * parts(execution);
  }

  static void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
    const int64_t count = parts(execution);
    parallel_for(execution, count, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t offset = part * Sddmm(desc, args, nullptr).part_bytes();
        Sddmm(desc, args, static_cast<char*>(args.workspace) + offset)
            .run_part(even_part(desc.nnz, 1, part, count));
      }
    });
  }

 private:
  // One of the two dense operands.
  struct Side {
    ConstDenseView data;
    int64_t features, block, width;  // width: of a panel's row; zeros beyond the block

    int64_t panels() const { return (features + block - 1) / block; }
  };

  static int64_t parts(const Execution& execution) { return std::max(1, execution.threads); }
  static int64_t round_up(int64_t value) { return (value + kLane - 1) / kLane * kLane; }

  // True where the outputs should be the lanes: inputs would leave more of them empty, or are so
  // many more that each thread should pack only its own.
  static bool outputs_are_lanes(const ProductDesc& desc) {
    const int64_t out = round_up(desc.block.out) * desc.block.in;
    const int64_t in = round_up(desc.block.in) * desc.block.out;
    return out < in || (out == in && desc.in_features > 2 * desc.out_features);
  }

  Sddmm(const ProductDesc& desc, const ProductArgs& args, void* workspace)
      : swapped_(outputs_are_lanes(desc)), tokens_(desc.tokens), block_(desc.block) {
    const PatternView& pattern = args.weight.pattern;
    const Side out{args.dy, desc.out_features, desc.block.out, desc.block.out};
    const Side in{args.x, desc.in_features, desc.block.in, desc.block.in};
    rows_ = swapped_ ? in : out;
    lanes_ = swapped_ ? out : in;
    lanes_.width = round_up(lanes_.block);
    first_ = swapped_ ? pattern.ccol : pattern.crow;
    lane_block_ = swapped_ ? pattern.trow : pattern.col;
    number_ = swapped_ ? pattern.perm : nullptr;
    values_ = static_cast<Storage*>(args.output.data);

    const int64_t token_bytes =
        std::max<int64_t>(1, lanes_.panels() * lanes_.width * int64_t{sizeof(Packed)});
    chunk_tokens_ = std::clamp<int64_t>(kMaxChunkBytes / token_bytes, 16, kMaxChunkTokens);
    chunk_tokens_ = std::min(chunk_tokens_, std::max<int64_t>(1, tokens_));
    lane_panels_ = static_cast<Packed*>(workspace);
    row_panel_ = lane_panels_ + lanes_.panels() * chunk_tokens_ * lanes_.width;
  }

  int64_t part_bytes() const {
    const int64_t elements =
        chunk_tokens_ * (lanes_.panels() * lanes_.width + round_up(rows_.width));
    return (elements * int64_t{sizeof(Packed)} + 63) / 64 * 64;
  }

  void run_part(Range entries) const {
    if (entries.begin == entries.end) return;
    int64_t token = 0;
    do {  // once even without tokens: the gradient is zero then, not left as it was
      const int64_t count = std::min(chunk_tokens_, tokens_ - token);
      for (int64_t panel = 0; panel < lanes_.panels(); ++panel) {
        pack_panel(lanes_, panel, token, count, lane_panels_ + panel * count * lanes_.width);
      }
      for (int64_t row = row_of(entries.begin); first_[row] < entries.end; ++row) {
        const Range range{std::max<int64_t>(entries.begin, first_[row]),
                          std::min<int64_t>(entries.end, first_[row + 1])};
        if (range.begin >= range.end) continue;
        pack_panel(rows_, row, token, count, row_panel_);
        run_row(range, count, token > 0);
      }
      token += count;
    } while (token < tokens_);
  }

  // The row that holds an entry.
  int64_t row_of(int64_t entry) const {
    return std::upper_bound(first_, first_ + rows_.panels() + 1, entry) - first_ - 1;
  }

  static void pack_panel(const Side& side, int64_t panel, int64_t token, int64_t tokens,
                         Packed* to) {
    const int64_t feature = panel * side.block;
    const int64_t present = std::min(side.block, side.features - feature);
    const auto* from =
        static_cast<const Storage*>(side.data.data) + token * side.data.row_stride + feature;
    for (int64_t t = 0; t < tokens; ++t, from += side.data.row_stride, to += side.width) {
      int64_t i = 0;
      for (; i + kLane <= present; i += kLane) store(to + i, Math::load(from + i));
      for (; i < side.width; ++i) to[i] = i < present ? from[i] : Packed{};
    }
  }

  // The vectors of all entries of a row, some at a time: a block narrower than a tile shares it.
  void run_row(Range entries, int64_t tokens, bool add) const {
    const int64_t per_block = lanes_.width / kLane;
    const int64_t count = (entries.end - entries.begin) * per_block;
    for (int64_t begin = 0; begin < count; begin += kTileVectors) {
      with_constant<kTileVectors>(std::min<int64_t>(kTileVectors, count - begin), [&](auto n) {
        Target targets[n()];
        GatheredVectors<Packed, n()> vectors{{}, lanes_.width};
        for (int v = 0; v < n(); ++v) {
          const int64_t entry = entries.begin + (begin + v) / per_block;
          const int64_t lane = (begin + v) % per_block * kLane;
          vectors.data[v] = lane_panels_ + lane_block_[entry] * tokens * lanes_.width + lane;
          targets[v] = {number_ == nullptr ? entry : number_[entry], lane};
        }
        for (int64_t row = 0; row < rows_.block; row += kTileRows) {
          with_constant<kTileRows>(std::min<int64_t>(kTileRows, rows_.block - row), [&](auto rows) {
            run_tile<rows(), n()>(row, vectors, targets, tokens, add);
          });
        }
      });
    }
  }

  // Where a vector of a tile belongs.
  struct Target {
    int64_t number, lane;
  };

  template <int kRows, int kVectors>
  __attribute__((noinline)) void run_tile(int64_t row, GatheredVectors<Packed, kVectors> vectors,
                                          const Target* targets, int64_t tokens, bool add) const {
    alignas(64) Sum sums[kRows * kVectors * kLane];
    Tile<Math, kRows, kVectors> tile;
    tile.multiply(Scalars<Packed, true>{row_panel_ + row, rows_.width}, vectors, tokens);
    tile.store(sums, kVectors * kLane);
    for (int v = 0; v < kVectors; ++v) {
      Storage* block = values_ + targets[v].number * block_.out * block_.in;
      const int64_t count = std::min(kLane, lanes_.block - targets[v].lane);
      for (int r = 0; r < kRows; ++r) {
        const Sum* from = sums + (r * kVectors + v) * kLane;
        if (swapped_) {
          Storage* to = block + targets[v].lane * block_.in + row + r;
          for (int64_t i = 0; i < count; ++i)
            to[i * block_.in] = from[i] + (add ? to[i * block_.in] : Sum{});
        } else {
          Storage* to = block + (row + r) * block_.in + targets[v].lane;
          for (int64_t i = 0; i < count; ++i) to[i] = from[i] + (add ? to[i] : Sum{});
        }
      }
    }
  }

  bool swapped_;
  int64_t tokens_;
  BlockShape block_;
  Side rows_, lanes_;
  const int32_t* first_;       // first entry of each block of the rows' side
  const int32_t* lane_block_;  // block of the lanes' side of each entry
  const int32_t* number_;      // block number of each entry; null where that is the entry
  Storage* values_;
  int64_t chunk_tokens_;
  Packed* lane_panels_;
  Packed* row_panel_;
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
