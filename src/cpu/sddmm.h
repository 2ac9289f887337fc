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
  // Sums of several chunks are added up in a buffer where dW itself is too coarse for them.
  static constexpr bool kPartial = !std::is_same_v<Storage, Sum>;
  // Tokens are taken in chunks, so that the panels of one stay in the last cache. Each chunk reads
  // and writes all of dW again, so they should be few.
  static constexpr int64_t kMaxChunkTokens = 512 * Math::kDepth;
  static constexpr int64_t kMaxChunkBytes = 8 << 20;
  // Steps that the tiles of a block take in turn: what they read then is half of the first cache.
  static constexpr int64_t kTurnSteps = 64;
  // Rows of a dense operand that are fetched before they are packed.
  static constexpr int64_t kRowsAhead = 16;
  // Rows of a block that take turns.
  static constexpr int64_t kBandRows = 32;

 public:
  static int64_t workspace(const ProductDesc& desc, const Execution& execution) {
    return Sddmm(desc, {}, nullptr).part_bytes(useful_threads(desc, execution)) *
           useful_threads(desc, execution);
  }

  static void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
    const int64_t count = useful_threads(desc, execution);
    parallel_for(execution, count, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t offset = part * Sddmm(desc, args, nullptr).part_bytes(count);
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
  static int64_t round_up(int64_t value) { return (value + kLane - 1) / kLane * kLane; }

  // True where the outputs should be the lanes: inputs would leave more of them empty, or are so
  // many more that each thread should pack only its own.
  static bool outputs_are_lanes(const ProductDesc& desc) {
    const int64_t out = round_up(desc.block.out) * desc.block.in;
    const int64_t in = round_up(desc.block.in) * desc.block.out;
    return out < in || (out == in && desc.in_features > 2 * desc.out_features);
  }

  Sddmm(const ProductDesc& desc, const ProductArgs& args, void* workspace)
      : swapped_(outputs_are_lanes(desc)),
        tokens_(desc.tokens),
        nnz_(desc.nnz),
        block_(desc.block) {
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

    const int64_t token_bytes = std::max<int64_t>(
        1, lanes_.panels() * lanes_.width * int64_t{sizeof(Packed)} / Math::kDepth);
    chunk_tokens_ = std::clamp<int64_t>(kMaxChunkBytes / token_bytes, 16, kMaxChunkTokens);
    chunk_tokens_ = std::min(round_up(chunk_tokens_), round_up(std::max<int64_t>(1, tokens_)));
    chunk_steps_ = chunk_tokens_ / Math::kDepth;
    lane_panels_ = static_cast<Packed*>(workspace);
    row_panel_ = lane_panels_ + lanes_.panels() * chunk_steps_ * lanes_.width;
    partial_ = reinterpret_cast<Sum*>(row_panel_ + chunk_steps_ * round_up(rows_.width));
  }

  int64_t part_bytes(int64_t parts) const {
    const int64_t panels = chunk_steps_ * (lanes_.panels() * lanes_.width + round_up(rows_.width));
    const int64_t partial = kPartial && chunk_tokens_ < tokens_
                                ? (nnz_ + parts - 1) / parts * block_.out * block_.in
                                : 0;
    return ((panels + partial) * int64_t{sizeof(Sum)} + 63) / 64 * 64;
  }

  void run_part(Range entries) {
    if (entries.begin == entries.end) return;
    part_ = entries;
    int64_t token = 0;
    do {  // once even without tokens: the gradient is zero then, not left as it was
      const int64_t count = std::min(chunk_tokens_, tokens_ - token);
      chunk_ = {token, token + count};
      for (int64_t panel = 0; panel < lanes_.panels(); ++panel) {
        pack_panel(lanes_, panel, lane_panels_ + panel * chunk_steps_ * lanes_.width);
      }
      for (int64_t row = row_of(entries.begin); first_[row] < entries.end; ++row) {
        const Range range{std::max<int64_t>(entries.begin, first_[row]),
                          std::min<int64_t>(entries.end, first_[row + 1])};
        if (range.begin >= range.end) continue;
        pack_panel(rows_, row, row_panel_);
        fetcher_ = {std::min(row + 1, rows_.panels() - 1) * rows_.block, chunk_.begin,
                    fetcher_share(range)};
        run_row(range);
      }
      token += count;
    } while (token < tokens_);
  }

  // The row that holds an entry.
  int64_t row_of(int64_t entry) const {
    return std::upper_bound(first_, first_ + rows_.panels() + 1, entry) - first_ - 1;
  }

  void pack_panel(const Side& side, int64_t panel, Packed* to) const {
    const int64_t feature = panel * side.block;
    const int64_t present = std::min(side.block, side.features - feature);
    const int64_t stride = side.data.row_stride;
    const auto* from = static_cast<const Storage*>(side.data.data) + feature;
    for (int64_t token = chunk_.begin; token < chunk_.end;
         token += Math::kDepth, to += side.width) {
      for (int64_t i = 0; i < side.width; i += kLane) {
        const int64_t count = std::clamp<int64_t>(present - i, 0, kLane);
        // The next rows are far away, in other pages: the hardware does not follow.
        __builtin_prefetch(from + (token + kRowsAhead) * stride + i);
        store(to + i, Math::join(from + token * stride + i, stride, chunk_.end - token, count));
      }
    }
  }

  // Fetches some more of what the next row will be packed from, while this one is multiplied.
  struct Fetcher {
    int64_t feature, token, tokens;
  };
  int64_t fetcher_share(Range entries) const {
    const int64_t groups =
        ((entries.end - entries.begin) * (lanes_.width / kLane) + kTileVectors - 1) / kTileVectors;
    const int64_t tiles = groups * ((rows_.block + kTileRows - 1) / kTileRows) *
                          ((chunk_.end - chunk_.begin + kTurnSteps - 1) / kTurnSteps);
    return (chunk_.end - chunk_.begin + tiles - 1) / std::max<int64_t>(1, tiles);
  }
  void fetch_next_row() const {
    const int64_t end = std::min(chunk_.end, fetcher_.token + fetcher_.tokens);
    const auto* from = static_cast<const Storage*>(rows_.data.data) + fetcher_.feature;
    for (; fetcher_.token < end; ++fetcher_.token) {
      for (int64_t i = 0; i < rows_.block; i += 64 / int64_t{sizeof(Storage)}) {
        __builtin_prefetch(from + fetcher_.token * rows_.data.row_stride + i, 0, 2);
      }
    }
  }

  // Where a vector of a tile belongs, and where its panel is.
  struct Target {
    int64_t entry, lane;
  };
  Target target(Range entries, int64_t vector) const {
    const int64_t per_block = lanes_.width / kLane;
    return {entries.begin + vector / per_block, vector % per_block * kLane};
  }
  const Packed* panel_of(Target target) const {
    return lane_panels_ + lane_block_[target.entry] * chunk_steps_ * lanes_.width + target.lane;
  }

  // The vectors of all entries of a row, some at a time: a block narrower than a tile shares it.
  void run_row(Range entries) const {
    const int64_t count = (entries.end - entries.begin) * (lanes_.width / kLane);
    const int64_t groups = (count + kTileVectors - 1) / kTileVectors;
    for (int64_t group = 0; group < groups; ++group) {
      const Range now = even_part(count, 1, group, groups);
      const Range next = even_part(count, 1, std::min(group + 1, groups - 1), groups);
      with_constant<kTileVectors>(now.end - now.begin, [&](auto n) {
        Target targets[n()];
        const Packed* panels[n()];
        const Packed* ahead[n()];
        for (int v = 0; v < n(); ++v) {
          targets[v] = target(entries, now.begin + v);
          panels[v] = panel_of(targets[v]);
          ahead[v] = panel_of(target(entries, std::min(next.begin + v, next.end - 1)));
        }
        for (int64_t row = 0; row < rows_.block; row += kBandRows) {
          run_band<n()>(row, std::min(kBandRows, rows_.block - row), targets, panels, ahead);
        }
      });
    }
  }

  template <int kVectors>
  void run_band(int64_t row, int64_t rows, const Target* targets, const Packed* const* panels,
                const Packed* const* ahead) const {
    constexpr int kWidth = kVectors * kLane;
    alignas(64) Sum sums[kBandRows * kWidth];
    const int64_t steps = (chunk_.end - chunk_.begin + Math::kDepth - 1) / Math::kDepth;
    int64_t step = 0;
    do {
      const int64_t turn = std::min(kTurnSteps, steps - step);
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t offset = step * lanes_.width;
        GatheredVectors<Packed, kVectors> vectors{
            {}, lanes_.width, ahead[r / kTileRows % kVectors] + offset};
        for (int v = 0; v < kVectors; ++v) vectors.data[v] = panels[v] + offset;
        fetch_next_row();
        if (step + turn == steps) {
          for (int v = 0; v < kVectors; ++v) fetch_output(targets[v], row + r);
        }
        with_constant<kTileRows>(std::min<int64_t>(kTileRows, rows - r), [&](auto n) {
          run_tile<n(), kVectors>(row_panel_ + step * rows_.width + row + r, vectors, turn,
                                  step > 0, sums + r * kWidth);
        });
      }
      step += turn;
    } while (step < steps);
    for (int v = 0; v < kVectors; ++v) emit(targets[v], row, rows, sums + v * kLane, kWidth);
  }

  template <int kRows, int kVectors>
  __attribute__((noinline)) void run_tile(const Packed* scalars,
                                          const GatheredVectors<Packed, kVectors>& vectors,
                                          int64_t steps, bool add, Sum* sums) const {
    Tile<Math, kRows, kVectors> tile;
    tile.multiply(Scalars<Packed, true>{scalars, rows_.width}, GatheredVectors(vectors), steps);
    tile.add_to(sums, kVectors * kLane, !add);
  }

  // Fetches what the rows of a tile will be written to.
  void fetch_output(Target target, int64_t row) const {
    const int64_t number = number_ == nullptr ? target.entry : number_[target.entry];
    const Storage* block = values_ + number * block_.out * block_.in;
    if (!swapped_) {
      const Storage* to = block + row * block_.in + target.lane;
      for (int i = 0; i < kTileRows; ++i) __builtin_prefetch(to + i * block_.in, 1);
    } else if (row * int64_t{sizeof(Storage)} % 64 == 0) {
      const Storage* to = block + target.lane * block_.in + row;
      for (int64_t i = 0; i < kLane; ++i) __builtin_prefetch(to + i * block_.in, 1);
    }
  }

  // Sums of some rows in one vector, to where they belong in dW: transposed where outputs are
  // lanes.
  void emit(Target target, int64_t row, int64_t rows, const Sum* sums, int64_t stride) const {
    const int64_t number = number_ == nullptr ? target.entry : number_[target.entry];
    const int64_t size = block_.out * block_.in;
    const int64_t lanes = std::min(kLane, lanes_.block - target.lane);
    for (int64_t r = 0; r < rows; r += kLane) {
      Vec<Sum> square[kLane];
      for (int64_t i = 0; i < kLane; ++i) {
        square[i] = r + i < rows ? load(sums + (r + i) * stride) : Vec<Sum>{};
      }
      const int64_t square_rows = std::min(kLane, rows - r);
      if (swapped_) transpose<Sum>(square);
      const int64_t offset =
          swapped_ ? target.lane * block_.in + row + r : (row + r) * block_.in + target.lane;
      emit_square(square, swapped_ ? lanes : square_rows, swapped_ ? square_rows : lanes,
                  values_ + number * size + offset,
                  partial_ + (target.entry - part_.begin) * size + offset);
    }
  }

  void emit_square(const Vec<Sum> (&square)[kLane], int64_t rows, int64_t count, Storage* to,
                   Sum* partial) const {
    const bool first = chunk_.begin == 0, last = chunk_.end == tokens_;
    for (int64_t i = 0; i < rows; ++i, to += block_.in, partial += block_.in) {
      Vec<Sum> sum = square[i];
      if constexpr (kPartial) {
        if (!first) sum += load(partial, count);
        if (!last) {
          store(partial, sum, count);
          continue;
        }
      } else {
        if (!first) sum += Math::load_sum(to, count);
      }
      Math::store(to, sum, count);
    }
  }

  bool swapped_;
  int64_t tokens_;
  int64_t nnz_;
  BlockShape block_;
  Side rows_, lanes_;
  const int32_t* first_;       // first entry of each block of the rows' side
  const int32_t* lane_block_;  // block of the lanes' side of each entry
  const int32_t* number_;      // block number of each entry; null where that is the entry
  Storage* values_;
  int64_t chunk_tokens_, chunk_steps_;
  Packed* lane_panels_;
  Packed* row_panel_;
  Sum* partial_;
  Range part_{};   // the entries of this part
  Range chunk_{};  // the tokens of this chunk
  mutable Fetcher fetcher_{};
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
