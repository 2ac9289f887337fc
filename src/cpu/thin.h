// Thin: grad_weight of blocks that are one element high or one wide. The side that the blocks are
// long on gives lanes, and all blocks that meet there take turns at one panel of it: a tile is a
// few blocks, each with a scalar of its own per token. (By rows, as in Sddmm, a block would read a
// panel of its own from a far cache for a single row of sums.) The other side is transposed, so
// that the scalars of a block lie in order.
#pragma once

#include "block_sparse/product.h"
#include "cpu/split.h"
#include "cpu/strip.h"
#include "cpu/tile.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

// Whether the class below computes a grad_weight.
inline bool is_thin(BlockShape block) {
  return std::min(block.out, block.in) == 1 && block.out != block.in;
}

template <class Math>
class Thin {
  static_assert(Math::kDepth == 1, "scalars are single tokens");
  using Storage = typename Math::Storage;
  using Packed = typename Math::Packed;
  using Sum = typename Math::Sum;
  static constexpr int64_t kLane = kLanes<Sum>;
  static constexpr bool kPartial = !std::is_same_v<Storage, Sum>;
  static constexpr int kBlocks = kRegisters == 32 ? 12 : 6;
  static constexpr int kVectors = 2;
  // Tokens are taken in chunks, so that the transposed side stays in the last cache.
  static constexpr int64_t kMaxChunkTokens = 512;
  static constexpr int64_t kMaxChunkBytes = 8 << 20;

 public:
  static int64_t workspace(const ProductDesc& desc, const Execution& execution) {
    const int64_t count = useful_threads(desc, execution);
    return Thin(desc, {}, nullptr).part_bytes(count) * count;
  }

  static void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
    const int64_t count = useful_threads(desc, execution);
    parallel_for(execution, count, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const int64_t offset = part * Thin(desc, args, nullptr).part_bytes(count);
        Thin(desc, args, static_cast<char*>(args.workspace) + offset)
            .run_part(even_part(desc.nnz, 1, part, count));
      }
    });
  }

 private:
  Thin(const ProductDesc& desc, const ProductArgs& args, void* workspace)
      : tokens_(desc.tokens), nnz_(desc.nnz) {
    const PatternView& pattern = args.weight.pattern;
    const bool inputs_are_lanes = desc.block.out == 1;
    lanes_ = inputs_are_lanes ? args.x : args.dy;
    scalars_ = inputs_are_lanes ? args.dy : args.x;
    lane_features_ = inputs_are_lanes ? desc.in_features : desc.out_features;
    scalar_features_ = inputs_are_lanes ? desc.out_features : desc.in_features;
    first_ = inputs_are_lanes ? pattern.ccol : pattern.crow;
    scalar_ = inputs_are_lanes ? pattern.trow : pattern.col;
    number_ = inputs_are_lanes ? pattern.perm : nullptr;
    block_ = std::max(desc.block.out, desc.block.in);
    width_ = (block_ + kLane - 1) / kLane * kLane;
    values_ = static_cast<Storage*>(args.output.data);

    const int64_t token_bytes = std::max<int64_t>(1, scalar_features_ * int64_t{sizeof(Packed)});
    const int64_t most = std::clamp(kMaxChunkBytes / token_bytes, kLane, kMaxChunkTokens);
    chunk_tokens_ = std::min(most, std::max<int64_t>(1, tokens_)) / kLane * kLane + kLane;
    transposed_ = static_cast<Packed*>(workspace);
    panel_ = transposed_ + scalar_features_ * chunk_tokens_;
    partial_ = reinterpret_cast<Sum*>(panel_ + chunk_tokens_ * width_);
  }

  int64_t part_bytes(int64_t parts) const {
    const int64_t partial =
        kPartial && chunk_tokens_ < tokens_ ? (nnz_ + parts - 1) / parts * block_ : 0;
    const int64_t elements = (scalar_features_ + width_) * chunk_tokens_ + partial;
    return (elements * int64_t{sizeof(Sum)} + 63) / 64 * 64;
  }

  void run_part(Range entries) {
    if (entries.begin == entries.end) return;
    part_ = entries;
    int64_t token = 0;
    do {  // once even without tokens: the gradient is zero then, not left as it was
      chunk_ = {token, std::min(tokens_, token + chunk_tokens_)};
      pack_strip<Math>(rows_of(scalars_), scalars_.row_stride, chunk_.end - chunk_.begin,
                       scalar_features_, transposed_, chunk_tokens_);
      const int64_t panels = (lane_features_ + block_ - 1) / block_;
      int64_t panel = std::upper_bound(first_, first_ + panels + 1, entries.begin) - first_ - 1;
      for (; panel < panels && first_[panel] < entries.end; ++panel) {
        run_panel(panel, {std::max<int64_t>(entries.begin, first_[panel]),
                          std::min<int64_t>(entries.end, first_[panel + 1])});
      }
      token = chunk_.end;
    } while (token < tokens_);
  }

  const Storage* rows_of(ConstDenseView view) const {
    return static_cast<const Storage*>(view.data) + chunk_.begin * view.row_stride;
  }

  void pack_panel(int64_t panel) const {
    const int64_t feature = panel * block_, present = std::min(block_, lane_features_ - feature);
    const Storage* from = rows_of(lanes_) + feature;
    Packed* to = panel_;
    for (int64_t token = chunk_.begin; token < chunk_.end; ++token, from += lanes_.row_stride) {
      for (int64_t i = 0; i < width_; i += kLane, to += kLane) {
        const int64_t count = std::clamp<int64_t>(present - i, 0, kLane);
        store(to, count == kLane ? Math::load(from + i) : Math::load(from + i, count));
      }
    }
  }

  void run_panel(int64_t panel, Range entries) const {
    if (entries.begin >= entries.end) return;
    pack_panel(panel);
    for (int64_t lane = 0; lane < width_; lane += kVectors * kLane) {
      with_constant<kVectors>(
          std::min<int64_t>(kVectors, (width_ - lane) / kLane), [&](auto vectors) {
            for (int64_t entry = entries.begin; entry < entries.end; entry += kBlocks) {
              run_tile<vectors()>(entry, std::min<int64_t>(kBlocks, entries.end - entry), lane);
            }
          });
    }
  }

  // Fewer blocks than a tile has: the last one several times over. A tile of another height would
  // add up in another order, and results would depend on the number of threads.
  template <int kWide>
  __attribute__((noinline)) void run_tile(int64_t entry, int64_t count, int64_t lane) const {
    Tile<Math, kBlocks, kWide> tile;
    GatheredScalars<Packed, kBlocks> scalars;
    for (int i = 0; i < kBlocks; ++i) {
      const int64_t block = entry + std::min<int64_t>(i, count - 1);
      scalars.data[i] = transposed_ + scalar_[block] * chunk_tokens_;
    }
    tile.multiply(scalars, Vectors<Packed, 0>{panel_ + lane, width_, nullptr},
                  chunk_.end - chunk_.begin);
    tile.for_each([&](int i, int v, Vec<Sum> sum) {
      if (i < count) emit(entry + i, lane + v * kLane, sum);
    });
  }

  void emit(int64_t entry, int64_t lane, Vec<Sum> sum) const {
    const int64_t lanes = std::min(kLane, block_ - lane);
    const int64_t number = number_ == nullptr ? entry : number_[entry];
    Storage* to = values_ + number * block_ + lane;
    const bool first = chunk_.begin == 0, last = chunk_.end == tokens_;
    if constexpr (kPartial) {
      Sum* partial = partial_ + (entry - part_.begin) * block_ + lane;
      if (!first) sum += load(partial, lanes);
      if (!last) return store(partial, sum, lanes);
    } else {
      if (!first) sum += Math::load_sum(to, lanes);
    }
    Math::store(to, sum, lanes);
  }

  int64_t tokens_, nnz_;
  ConstDenseView lanes_, scalars_;
  int64_t lane_features_, scalar_features_;
  const int32_t* first_;   // first entry of each block of the lanes' side
  const int32_t* scalar_;  // feature of the scalars' side of each entry
  const int32_t* number_;  // block number of each entry; null where that is the entry
  int64_t block_, width_;  // elements of a block, rounded up to vectors
  Storage* values_;
  int64_t chunk_tokens_;
  Packed* transposed_;
  Packed* panel_;
  Sum* partial_;
  Range part_{};   // the entries of this part
  Range chunk_{};  // the tokens of this chunk
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
