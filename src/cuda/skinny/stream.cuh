// Stream: units, and the inputs that they meet, on their way through a ring of stages in shared
// memory, several stages ahead of their use. The ring belongs to the few warps that multiply the same
// units, or to one alone, so nobody else is waited for.
#pragma once

#include "cuda/skinny/params.h"
#include "cuda/skinny/ptx.cuh"
#include "cuda/skinny/tile.cuh"

namespace block_sparse::cuda::skinny {

// What may be out of range comes back in range.
__device__ __forceinline__ int clamped(int index, int size) {
  return static_cast<int>(min(static_cast<unsigned>(index), static_cast<unsigned>(size - 1)));
}

// The row of blocks, along the outputs, that a unit belongs to.
template <class C>
__device__ __forceinline__ int row_of(const Params& params, int unit) {
  int block = params.depth_units.quotient(unit);
  if constexpr (C::kTransposed) block = clamped(params.blocks[block], params.nnz);
  return clamped(params.output_blocks[block], params.output_grid);
}

// Where the units of a range lie, looked up 32 at a time, one by each lane, and 32 ahead. What the
// index says stays as it is until it is asked for: nobody waits for it before.
template <class C>
class Places {
 public:
  __device__ Places(const Params& params, Range units, int lane)
      : params_(params), units_(units), lane_(lane) {
    look_up(near_, 0);
    look_up(far_, 32);
  }

  // All lanes ask for the same unit, counted from the first of the range: one of the 32 that
  // `advance` named last, or of the next 32. Bytes before the unit, in a first strip.
  __device__ __forceinline__ int64_t offset(int i) const {
    return static_cast<int64_t>(uint64_t{static_cast<unsigned>(get(&Place::chunk, i))} * 16);
  }
  // The first input.
  __device__ __forceinline__ int depth(int i) const {
    const int block = clamped(get(&Place::depth_block, i), params_.depth_grid);
    return block * params_.block_depth + get(&Place::within, i);
  }
  // Of blocks, along the outputs.
  __device__ __forceinline__ int row(int i) const {
    return clamped(get(&Place::row, i), params_.output_grid);
  }

  // Asks L2 for the blocks that begin with one of `count` units from `i` on.
  __device__ __forceinline__ void prefetch(int i, int count, int member) const {
    const int at = i - first_;
    const bool mine = static_cast<unsigned>((lane_ - at) & 31) < static_cast<unsigned>(count);
    const Place& place = at + ((lane_ - at) & 31) < 32 ? near_ : far_;
    if (!mine || i + ((lane_ - at) & 31) >= units_.end - units_.begin || place.within != 0) return;
    const int bytes = C::kOutputs * params_.block_depth / C::kParts * static_cast<int>(sizeof(typename C::Value));
    ptx::prefetch(static_cast<const char*>(params_.values) + static_cast<int64_t>(uint64_t{static_cast<unsigned>(place.chunk)} * 16) + member * bytes, bytes);
  }

  // What is before `i` is not asked for any more.
  __device__ __forceinline__ void advance(int i) {
    if (i - first_ < 32) return;
    first_ += 32;
    near_ = far_;
    look_up(far_, first_ + 32);
  }

 private:
  struct Place {
    int chunk;   // of 16 bytes of the values: 64 GB of them are addressed so
    int within;  // the block, along the depth
    int depth_block;
    int row;
  };

  __device__ __forceinline__ void look_up(Place& place, int i) {
    const int unit = units_.begin + i + lane_;
    if (unit >= units_.end) return;
    const int entry = params_.depth_units.quotient(unit);
    place.within = (unit - entry * params_.depth_units.divisor()) * C::kDepth;
    place.depth_block = params_.depth_blocks[entry];
    int block = entry;
    if constexpr (C::kTransposed) block = clamped(params_.blocks[entry], params_.nnz);
    place.row = params_.output_blocks[block];
    const int pitch = C::kTransposed ? params_.block_pitch : 1;
    place.chunk = static_cast<int>((block * params_.block_size + int64_t{place.within} * pitch) *
                                   static_cast<int>(sizeof(typename C::Value)) / 16);
  }
  __device__ __forceinline__ int get(int Place::* member, int i) const {
    const int at = i - first_;
    return __shfl_sync(~0u, at < 32 ? near_.*member : far_.*member, at & 31);
  }

  const Params& params_;
  const Range units_;
  const int lane_;
  int first_ = 0;  // of the 32 of near_; far_ has the next
  Place near_{};
  Place far_{};
};

// Brings the first blocks of a warp's share to L2, of each the part that has as many bytes as the
// warp's strip. This alone may be done while the kernel before still runs, which may write W and the
// index: what is in L2 is always the newest, and if the index says something else later, the wrong
// blocks have been brought.
template <class C>
__device__ void prefetch(const Params& params, Range units, int member, int lane) {
  using Value = typename C::Value;
  if (units.begin >= units.end) return;
  const int size = C::kOutputs * params.block_depth / C::kParts;
  const int bytes = size * static_cast<int>(sizeof(Value));
  const int entry = params.depth_units.quotient(units.begin) + lane;
  const int last = params.depth_units.quotient(units.end - 1);
  if (lane * bytes >= params.prefetch_bytes || entry > last) return;
  const int block = C::kTransposed ? clamped(__ldcg(params.blocks + entry), params.nnz) : entry;
  ptx::prefetch(static_cast<const Value*>(params.values) + block * params.block_size +
                    int64_t{member} * size,
                bytes);
}

// The ring of a team: the warps that multiply the same units, one for each strip of the blocks and part
// of the tokens. They share the x that these meet. A stage has kUnits units, each of them [strips of W, then x].
template <class C>
class Stream {
  using Values = Tile<C>;
  using Inputs = InputTile<C>;

 public:
  __device__ Stream(const Params& params, const Places<C>& places, uint32_t ring, int units,
                    int member, int team, int lane)
      : params_(params), places_(places), units_(units), barrier_(team + 1) {
    const int strip = member / C::kParts;
    const int chunk = member % C::kParts * kValueCopies * 32 + lane;  // of the unit
    no_values_ = chunk * 16 >= C::kUnitBytes;
    const int64_t first = strip * C::kOutputs * (C::kTransposed ? 1 : params.block_pitch) +
                          chunk / Values::kChunks * params.block_pitch;
    values_ = ptx::kept(static_cast<const char*>(params.values) +
                        first * static_cast<int>(sizeof(typename C::Value)) +
                        chunk % Values::kChunks * 16);
    values_to_ = ptx::kept(ring + strip * C::kUnitBytes +
                           Values::offset(chunk / Values::kChunks, chunk % Values::kChunks));
    const int row = lane / Inputs::kChunks;
    column_ = lane % Inputs::kChunks * (16 / static_cast<int>(sizeof(typename C::T)));
    input_step_ = Inputs::kRowsAtOnce * params.x_stride * static_cast<int>(sizeof(typename C::T));
    inputs_ = ptx::kept(static_cast<const char*>(params.x) +
                        (row * params.x_stride + column_) * static_cast<int>(sizeof(typename C::T)));
    inputs_to_ = ptx::kept(ring + params.strips * C::kUnitBytes +
                           Inputs::offset(row, lane % Inputs::kChunks));
    unsigned copies = 0;
#pragma unroll
    for (int i = 0; i < Inputs::kCopies; ++i) {
      const bool mine = i % params.members == member && row < C::kTokens &&
                        i * Inputs::kRowsAtOnce + row < params.tokens;
      copies |= static_cast<unsigned>(mine) << i;
    }
    copies_ = ptx::kept(copies);
    // In forward, where values lie is known before the index has been read.
    const int ahead = params.stages - 1;
    for (int i = 0; i < ahead; ++i) copy_values(i * C::kUnits, i * params.stage_bytes);
    for (int i = 0; i < ahead; ++i) {
      copy_inputs(i * C::kUnits, i * params.stage_bytes);
      ptx::commit_copies();
    }
    fetched_ = ahead * C::kUnits;
    filled_ = ahead * params.stage_bytes;
  }

  // Where the next stage begins in the ring, when it is there.
  __device__ __forceinline__ int next() {
    ptx::wait_for_copies(params_.stages - 2);
    // The copies of all; and all have used the stage that is filled next.
    if (params_.members == 1) {
      __syncwarp();
    } else {
      ptx::sync(barrier_, params_.members * 32);
    }
    copy_values(fetched_, filled_);
    copy_inputs(fetched_, filled_);
    ptx::commit_copies();
    fetched_ += C::kUnits;
    const int stage = used_;
    filled_ = after(filled_);
    used_ = after(used_);
    return stage;
  }

 private:
  __device__ __forceinline__ int after(int stage) const {
    stage += params_.stage_bytes;
    return stage < params_.ring_bytes ? stage : 0;
  }

  __device__ __forceinline__ void copy_values(int first, int stage) {
    // A unit of 16 x 16 int8 has fewer chunks than the warp has lanes.
    if (no_values_) return;
#pragma unroll
    for (int i = 0; i < C::kUnits; ++i) {
      if (first + i >= units_) break;
      const char* from = values_ + places_.offset(first + i);
      const uint32_t to = values_to_ + stage + i * params_.unit_bytes;
#pragma unroll
      for (int copied = 0; copied < kValueCopies; ++copied) {
        ptx::copy_16_bytes(to + copied * 512, from);
        from += params_.value_step;
      }
    }
  }

  __device__ __forceinline__ void copy_inputs(int first, int stage) {
#pragma unroll
    for (int i = 0; i < C::kUnits; ++i) {
      if (first + i >= units_) break;
      const int depth = places_.depth(first + i);
      const bool inside = depth + column_ < params_.x_depth;
      const int64_t first = C::kOrdered ? int64_t{depth} * C::kTokens : depth;
      const char* from =
          inputs_ + (inside ? first : -column_) * static_cast<int>(sizeof(typename C::T));
      const uint32_t to = inputs_to_ + stage + i * params_.unit_bytes;
#pragma unroll
      for (int copy = 0; copy < Inputs::kCopies; ++copy) {
        if (copies_ >> copy & 1) ptx::copy_16_bytes_or_zero(to + copy * 512, from, inside);
        from += input_step_;
      }
    }
  }

  const Params& params_;
  const Places<C>& places_;
  // Of W: the warps of a strip take turns.
  static constexpr int kValueCopies = (C::kUnitBytes + 512 * C::kParts - 1) / (512 * C::kParts);

  const int units_;
  const int barrier_;
  // Of this lane: the chunk that it copies first, and where to. Copies are 512 bytes apart.
  const char* values_;
  const char* inputs_;
  uint32_t values_to_;
  uint32_t inputs_to_;
  int64_t input_step_;
  bool no_values_;   // a small unit has fewer chunks than there are lanes
  int column_;       // elements
  unsigned copies_;  // of x, in which this lane has a part
  int fetched_;
  int filled_;  // places in the ring
  int used_ = 0;
};

}  // namespace block_sparse::cuda::skinny
