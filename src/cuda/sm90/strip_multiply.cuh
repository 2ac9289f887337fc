// The consumers of a strip kernel: fragments of W from shared memory, wgmma with a stage of x, and
// the stores. They follow their lists of items.
#pragma once

#define CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED  // an N of 176
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <utility>

#include "cuda/sm90/strip_params.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace block_sparse::cuda::sm90::strips {

using Fragment = uint32_t[4];

// wgmma with W in registers, by element type and tokens.
template <Dtype kDtype, int kTokens>
struct StripMma;
template <>
struct StripMma<Dtype::bf16, 176>
    : cute::SM90::GMMA::MMA_64x176x16_F32BF16BF16_RS<Major::K, Major::K> {};
template <>
struct StripMma<Dtype::f16, 176>
    : cute::SM90::GMMA::MMA_64x176x16_F32F16F16_RS<Major::K, Major::K> {};
template <>
struct StripMma<Dtype::bf16, 192>
    : cute::SM90::GMMA::MMA_64x192x16_F32BF16BF16_RS<Major::K, Major::K> {};
template <>
struct StripMma<Dtype::f16, 192>
    : cute::SM90::GMMA::MMA_64x192x16_F32F16F16_RS<Major::K, Major::K> {};

// sums[64, tokens] += W[64, 16] xt[16, tokens].
template <Dtype kDtype, int kSums>
__device__ __forceinline__ void multiply_strip(float (&sums)[kSums], const Fragment& w,
                                               uint64_t x) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    StripMma<kDtype, 2 * kSums>::fma(w[0], w[1], w[2], w[3], x, sums[I]..., ScaleOut::One);
  }(std::make_index_sequence<kSums>{});
}

template <Dtype kDtype>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (kDtype == Dtype::bf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <Dtype kDtype>
__device__ __forceinline__ float to_float(uint16_t bits) {
  if constexpr (kDtype == Dtype::bf16) {
    return __uint_as_float(uint32_t{bits} << 16);
  } else {
    return __half2float(__ushort_as_half(bits));
  }
}

// An item as the warps of one row of pieces see it.
struct Item {
  static constexpr int kWithin = 16, kGroup = 19, kNone = 20, kSlot = 24;
  uint32_t bits;  // stage (16), where the column is in it (3, in 16 bytes), group, none, slot (8)

  __device__ int stage() const { return bits & 0xffff; }
  __device__ uint32_t within() const { return bits >> kWithin & 7; }
  __device__ int group() const { return bits >> kGroup & 1; }
  __device__ bool none() const { return bits >> kNone & 1; }
  __device__ uint32_t slot() const { return bits >> kSlot; }
};

template <Config kConfig>
class Multiply {
 public:
  using Size = Sizes<kConfig>;
  static constexpr Piece kPiece = kConfig.piece;
  static constexpr Tile kTile = kConfig.tile;
  static constexpr int kGroups = kTile.groups;
  using Sums = float[kTile.tokens / 2];  // of a thread, for each group
  static constexpr int kBatch = batch_of(kPiece.depth);
  using Fragments = Fragment[Size::kPieceSteps];
  using Batch = Fragments[kBatch];

  __device__ Multiply(const Params& params, Shared<kConfig>& shared, int rank)
      : params_(params), rank_(rank), warpgroup_(threadIdx.x / 128), lane_(threadIdx.x % 32) {
    const int warp = threadIdx.x / 32 % 4;
    row_ = warp * kWarpOutputs / kPiece.outputs;
    within_piece_ = warp * kWarpOutputs % kPiece.outputs;
    w_ = ptx::address_of(shared.w) + fragment_offset();
    x_ = static_cast<uint32_t>(kOperand | descriptor_address(ptx::address_of(shared.x)));
    full_ = ptx::address_of(shared.full);
    empty_ = ptx::at_rank(ptx::address_of(shared.empty), lane_ % kCluster);
    speaks_ = lane_ < kCluster;
    ptx::keep_in_register(w_);
    ptx::keep_in_register(x_);
    ptx::keep_in_register(empty_);
    ptx::keep_in_register(speaks_);
  }

  __device__ __forceinline__ void run(int first_tile, int clusters) {
    Sums sums[kGroups];
    Batch fragments[2];
    int tile = first_tile;
    begin(tile);
    begin_list();
    for (; tile < params_.raster.tiles(); tile += clusters) {
#pragma unroll
      for (Sums& group : sums) {
#pragma unroll
        for (float& sum : group) sum = 0;
      }
      stage_ = -1;
      held_ = 0;
#pragma unroll 1
      for (int from = 0; from < items_; from += 32) {
        const Item mine = item_of(next_);
        next_ = __ldg(list_ + from + 32);
        Item items[2][kBatch];
#pragma unroll
        for (int u = 0; u < 2; ++u) read_batch(items[u], mine, u * kBatch);
        const int count = min(32, items_ - from);
#pragma unroll 1
        for (int i = 0; i < count; i += 2 * kBatch) {
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            if (u > 0 && items[u][0].none()) break;
            multiply(items[u], sums, fragments[u]);
            read_batch(items[u], mine, i + (2 + u) * kBatch);
          }
        }
      }
      cute::warpgroup_wait<0>();
      keep(fragments[0]);
      keep(fragments[1]);
      release(held_);
      if (stage_ >= 0) release(1);
      skip_to(params_.stages);
      settled(sums);

      const Outputs outputs = outputs_of_coming();
      begin(tile + clusters);
      store<0>(sums, outputs);
      begin_list();  // on its way while the rest is stored
      store<1>(sums, outputs);
    }
  }

 private:
  static constexpr uint64_t kOperand = swizzled_operand<kStageDepth * 2>();
  static constexpr uint32_t kHigh = kOperand >> 32;

  static constexpr int kReadAhead = static_cast<int>(WalkLayout::kItemPadding);

  // Where a tile's results go: first token, first output of each group.
  struct Outputs {
    int token;
    int first[kGroups];
  };

  // Fetches what is known of a tile. Nothing is computed from it yet: that would wait for it.
  __device__ __forceinline__ void begin(int tile) {
    if (tile >= params_.raster.tiles()) return;
    const Raster::Place place = params_.raster.at(tile);
    const int panel = place.panel_cluster * kCluster + rank_;
    const Span* span = params_.spans + panel * kTile.warpgroups + warpgroup_;
    coming_.span = {__ldg(&span->first), __ldg(&span->count)};
    coming_.token = place.token_tile * kTile.tokens;
    coming_.place = (panel * kTile.warpgroups + warpgroup_) * kGroups * Size::kGroupRows + row_;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      coming_.line[g] = line_at(params_, coming_.place + g * Size::kGroupRows);
    }
  }

  // Then the first of its items.
  __device__ __forceinline__ void begin_list() {
    const int first = min(max(coming_.span.first, 0), params_.item_capacity - kReadAhead);
    items_ = max(min(coming_.span.count, params_.item_capacity - kReadAhead - first), 0);
    list_ = params_.items + first + lane_;
    next_ = __ldg(list_);
  }

  __device__ __forceinline__ Outputs outputs_of_coming() const {
    Outputs outputs{coming_.token, {}};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int place = coming_.place + g * Size::kGroupRows;
      outputs.first[g] = first_output<kConfig>(params_, place, coming_.line[g]) + within_piece_;
    }
    return outputs;
  }

  // A word of the list (strip_walk.h). What it says may be nonsense, but leads nowhere else.
  __device__ Item item_of(uint32_t word) const {
    constexpr uint32_t kRows = (1u << Size::kGroupRows) - 1;
    const uint32_t rows = word >> kItemRows & kRows;
    const uint32_t depth = (word >> kItemColumn) * kPiece.depth;
    uint32_t slot = (word & 255) + __popc(rows & ((1u << row_) - 1));
    if (slot >= Size::kRing) slot -= Size::kRing;
    slot = rows >> row_ & 1 ? min(slot, uint32_t{Size::kRing}) : uint32_t{Size::kRing};
    return {min(depth / kStageDepth, static_cast<uint32_t>(params_.stages - 1)) |
            depth % kStageDepth / 8 << Item::kWithin | (word >> kItemGroup & 1) << Item::kGroup |
            uint32_t{rows == 0} << Item::kNone | slot << Item::kSlot};
  }

  __device__ static void read_batch(Item (&items)[kBatch], const Item& mine, int lane) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) items[i].bits = __shfl_sync(kAllLanes, mine.bits, lane + i);
  }

  // One batch is always under way: its fragments and its stage are in use until the next one waits.
  __device__ __forceinline__ void multiply(const Item (&items)[kBatch], Sums (&sums)[kGroups],
                                           Batch& fragments) {
    cute::warpgroup_wait<kBatch>();
    keep(fragments);
    release(held_);
    held_ = 0;
    if (items[0].stage() > stage_) arrive_at(items[0].stage());
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t piece = piece_at(items[i].slot());
#pragma unroll
      for (int step = 0; step < Size::kPieceSteps; ++step) {
        ptx::load_matrices<kPiece.transposed>(fragments[i][step], at_step(piece, step));
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (i == 0 || !items[i].none()) multiply(items[i], sums, fragments[i]);
    }
  }

  __device__ __forceinline__ void multiply(const Item& item, Sums (&sums)[kGroups],
                                           const Fragments& fragments) {
    const uint32_t x = x_stage_ + item.within();
    static_assert(kGroups <= 2);
    if (item.group() == 0) multiply_group(sums[0], fragments, x);
    if (kGroups == 2 && item.group() == 1) multiply_group(sums[kGroups - 1], fragments, x);
  }

  // Fence and commit stand in the branch, or ptxas serialises (C7520).
  __device__ __forceinline__ static void multiply_group(Sums& sums, const Fragments& fragments,
                                                        uint32_t x) {
    cute::warpgroup_arrive();
#pragma unroll
    for (int step = 0; step < Size::kPieceSteps; ++step) {
      multiply_strip<kConfig.dtype>(sums, fragments[step],
                                    uint64_t{kHigh} << 32 | (x + step * (kStepDepth / 8)));
    }
    cute::warpgroup_commit_batch();
  }

  // Makes `stage` the one in use. The stage before it is released when its last item is done,
  // but never held while waiting: its pieces may be where the next ones go.
  __device__ __forceinline__ void arrive_at(int stage) {
    if (stage > stage_ + 1) {
      cute::warpgroup_wait<0>();
      release(stage_ >= 0);
      skip_to(stage);
      wait_for_next();
    } else {
      held_ = stage_ >= 0;
      ++stage_;
      const uint32_t barrier = full_ + at_.slot * 8;
      if (!ptx::is_over(barrier, at_.lap)) {
        cute::warpgroup_wait<0>();
        release(held_);
        held_ = 0;
        ptx::wait(barrier, at_.lap);
      }
      x_stage_ = x_ + at_.slot * (kTile.stage_bytes() / 16);
      at_.advance();
    }
  }

  // Releases all stages before `stage` that nothing is needed of.
  __device__ void skip_to(int stage) {
#pragma unroll 1
    while (stage_ + 1 < stage) {
      wait_for_next();
      release(1);
    }
  }

  __device__ void wait_for_next() {
    ++stage_;
    ptx::wait(full_ + at_.slot * 8, at_.lap);
    x_stage_ = x_ + at_.slot * (kTile.stage_bytes() / 16);
    at_.advance();
  }

  // Lane i tells CTA i of the cluster that this warp is done with the oldest stage it held.
  __device__ __forceinline__ void release(int on) {
    ptx::arrive_remote_if(on & speaks_, empty_ + released_ * 8);
    released_ += on;
    released_ = released_ == kTile.stages ? 0 : released_;
  }

  // Row `lane % 8` of the 8x8 matrix `lane / 8` of a fragment, within a warp's part of a piece.
  // In memory 16 bytes of a row are swapped within the swizzle. Forward: row 8 i + g of the
  // fragment is output 4 (g / 2) + 2 (i ^ (g / 4)) + g % 2, so that a thread ends up with four
  // outputs side by side. Transposed: a matrix has 8 outputs side by side, rows are the depth.
  __device__ uint32_t fragment_offset() const {
    const int g = lane_ % 8, i = lane_ / 8 % 2, half = lane_ / 16;
    int row = 0, chunk = 0;
    if constexpr (kPiece.transposed) {
      row = half * 8 + g;
      chunk = within_piece_ / 8 + i;
    } else {
      row = within_piece_ + g / 2 * 4 + 2 * (i ^ g / 4) + g % 2;
      chunk = half;
    }
    const int line = row / Size::kLineRows;
    chunk += row % Size::kLineRows * (Size::kRowBytes / 16);
    const int swizzle = Size::kLineBytes == 128 ? line % 8 : line / 2 % 4;
    return line * Size::kLineBytes + ((chunk ^ swizzle) << 4);
  }

  // The same in another slot. The swizzle repeats after 8 lines of 128 bytes; half as many make a
  // slot of 512.
  __device__ uint32_t piece_at(uint32_t slot) const {
    const uint32_t piece = w_ + slot * Size::kPieceBytes;
    return Size::kPieceBytes == 512 ? piece ^ (slot & 1) << 6 : piece;
  }

  // The same, 16 of the depth further: transposed by rows, which may be half of what the swizzle
  // repeats after.
  __device__ static uint32_t at_step(uint32_t piece, int step) {
    if constexpr (kPiece.transposed) {
      constexpr int kBytes = kStepDepth * Size::kRowBytes;
      const uint32_t further = piece + step * kBytes;
      return kBytes == 512 && Size::kLineBytes == 128 ? further ^ step % 2 << 6 : further;
    } else {
      return piece ^ step * (kStepDepth * 2);
    }
  }

  // A fragment must live until the wait for its products: ptxas does not know that they read it,
  // and would give two items under way the same registers.
  __device__ __forceinline__ static void keep(const Batch& batch) {
#pragma unroll
    for (const Fragments& fragments : batch) {
#pragma unroll
      for (const Fragment& f : fragments) {
        asm volatile("" ::"r"(f[0]), "r"(f[1]), "r"(f[2]), "r"(f[3]) : "memory");
      }
    }
  }

  // Plain code may touch the sums from here on, and not before.
  __device__ __forceinline__ static void settled(Sums (&sums)[kGroups]) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (float& sum : sums[g]) asm volatile("" : "+f"(sum)::"memory");
    }
  }

  template <int kHalf>
  __device__ __forceinline__ void store(const Sums (&sums)[kGroups], const Outputs& outputs) const {
    store<0, kHalf>(sums, outputs);
    if constexpr (kGroups == 2) store<1, kHalf>(sums, outputs);
  }

  // Half the tokens of group g. 8 outputs x 8 tokens at a time are transposed within the warp; a
  // thread then has four outputs of a token.
  template <int g, int kHalf>
  __device__ __forceinline__ void store(const Sums (&sums)[kGroups], const Outputs& outputs) const {
    const int token = outputs.token + lane_ / 4;
    const int quad = lane_ % 4;
    const bool odd = kPiece.transposed ? lane_ & 1 : lane_ & 2;
    const int within =
        kPiece.transposed ? quad / 2 * 4 + (odd ? 8 : 0) : quad * 4;  // of this thread's outputs
    const int output = outputs.first[g] + within;
    const int tokens = output < params_.outputs ? params_.tokens : 0;
    float bias[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) bias[i] = bias_of(outputs.first[g], i);
    uint16_t* to = static_cast<uint16_t*>(params_.output) + token * params_.output_stride + output;
#pragma unroll
    for (int j = kHalf * kTile.tokens / 16; j < (kHalf + 1) * kTile.tokens / 16; ++j) {
      uint32_t pairs[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* sum = &sums[g][j * 4 + i * 2];
        pairs[i] = ptx::transpose_matrix(pack<kConfig.dtype>(sum[0] + bias[i], sum[1] + bias[i]));
      }
      if constexpr (kPiece.transposed) {
        const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? pairs[0] : pairs[1], 1);
        pairs[0] = odd ? got : pairs[0];
        pairs[1] = odd ? pairs[1] : got;
      }
      const uint2 four = !kPiece.transposed && odd ? make_uint2(pairs[1], pairs[0])
                                                   : make_uint2(pairs[0], pairs[1]);
      if (token + j * 8 < tokens) {
        __stcs(reinterpret_cast<uint2*>(to + j * 8 * params_.output_stride), four);
      }
    }
  }

  // Of row 8 i + lane / 4 of the fragment (fragment_offset).
  __device__ float bias_of(int first, int i) const {
    const int g = lane_ / 4;
    const int output =
        first + (kPiece.transposed ? 8 * i + g : g / 2 * 4 + 2 * (i ^ g / 4) + g % 2);
    if (params_.bias == nullptr || output >= params_.outputs) return 0;
    return to_float<kConfig.dtype>(__ldg(static_cast<const uint16_t*>(params_.bias) + output));
  }

  const Params& params_;
  const int rank_;
  const int warpgroup_;
  const int lane_;
  int row_;           // of the group's rows, this warp's
  int within_piece_;  // its first output there
  uint32_t w_;        // of the row of a piece in slot 0 that this lane names to ldmatrix
  uint32_t x_;        // low word of the descriptor of stage 0
  uint32_t full_;     // the barriers
  uint32_t empty_;    // of the CTA that this lane tells
  int speaks_;        // 1: this lane does

  // Of the tile that is next, or being computed: as it was read.
  struct {
    Span span;
    int token;
    int place;  // of the first group's row
    int line[kGroups];
  } coming_{};

  const uint32_t* list_ = nullptr;
  int items_ = 0;
  uint32_t next_ = 0;  // of the list

  Cursor<kTile.stages> at_;  // the next stage to wait for
  uint32_t released_ = 0;    // the slot to release next
  int stage_ = -1;           // in use
  int held_ = 0;             // 1: the one before it is still to be released
  uint32_t x_stage_ = 0;     // low word of the descriptor of the stage in use
};

}  // namespace block_sparse::cuda::sm90::strips
