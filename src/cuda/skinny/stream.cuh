// Stream: the units of one warp on their way through its ring of stages in shared memory, several
// stages ahead of their use. The ring belongs to the warp, so nobody else is waited for.
#pragma once

#include "cuda/skinny/params.h"
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
// index says stays as it is until it is asked for: nobody waits for it before. The first 64 may be
// looked up while the kernel before still runs, which may write the index; so past the first cache.
template <class C>
class Places {
 public:
  __device__ Places(const Params& params, Range units, int lane)
      : params_(params), units_(units), lane_(lane) {
    look_up_blocks(near_, 0);
    look_up_blocks(far_, 32);
    look_up_rest(near_, 0);
    look_up_rest(far_, 32);
  }

  // Whether both have found the same, before either went on.
  __device__ bool equal(const Places& other) const {
    return __all_sync(~0u, near_.equals(other.near_) && far_.equals(other.far_));
  }
  __device__ void replace(const Places& other) { near_ = other.near_, far_ = other.far_; }

  // All lanes ask for the same unit, counted from the first of the range: one of the 32 that
  // `advance` named last, or of the next 32. The first element of the unit, in a first strip.
  __device__ __forceinline__ int64_t offset(int i) const {
    const int block =
        C::kTransposed ? clamped(get(&Place::block, i), params_.nnz) : get(&Place::block, i);
    const int pitch = C::kTransposed ? params_.block_pitch : 1;
    return block * params_.block_size + int64_t{get(&Place::step, i)} * (C::kDepth * pitch);
  }
  // The first input.
  __device__ __forceinline__ int depth(int i) const {
    const int block = clamped(get(&Place::depth_block, i), params_.depth_grid);
    return block * params_.block_depth + get(&Place::step, i) * C::kDepth;
  }
  // Of blocks, along the outputs.
  __device__ __forceinline__ int row(int i) const {
    return clamped(get(&Place::row, i), params_.output_grid);
  }

  // What is before `i` is not asked for any more.
  __device__ __forceinline__ void advance(int i) {
    if (i - first_ < 32) return;
    first_ += 32;
    near_ = far_;
    look_up_blocks(far_, first_ + 32);
    look_up_rest(far_, first_ + 32);
  }

 private:
  struct Place {
    int entry;
    int step;  // in the block
    int block;
    int depth_block;
    int row;

    __device__ bool equals(const Place& other) const {
      return block == other.block && depth_block == other.depth_block && row == other.row;
    }
  };

  __device__ __forceinline__ void look_up_blocks(Place& place, int i) {
    const int unit = units_.begin + i + lane_;
    if (unit >= units_.end) return;
    place.entry = params_.depth_units.quotient(unit);
    place.step = unit - place.entry * params_.depth_units.divisor();
    place.block = C::kTransposed ? __ldcg(params_.blocks + place.entry) : place.entry;
  }
  __device__ __forceinline__ void look_up_rest(Place& place, int i) {
    if (units_.begin + i + lane_ >= units_.end) return;
    const int block = C::kTransposed ? clamped(place.block, params_.nnz) : place.block;
    place.depth_block = __ldcg(params_.depth_blocks + place.entry);
    place.row = __ldcg(params_.output_blocks + block);
  }
  __device__ __forceinline__ int get(int Place::* member, int i) const {
    return __shfl_sync(~0u, i - first_ < 32 ? near_.*member : far_.*member, (i - first_) % 32);
  }

  const Params& params_;
  const Range units_;
  const int lane_;
  int first_ = 0;  // of the 32 of near_; far_ has the next
  Place near_{};
  Place far_{};
};

// Brings the first blocks of a warp's share to L2, of each as many bytes as the warp's strip has.
// This may be done while the kernel before still runs, which may write W and the index: what is in
// L2 is always the newest, and where the index says something else later, other blocks have been
// brought than those that are read.
template <class C>
__device__ void prefetch(const Params& params, Range units, int strip, int lane) {
  using Value = typename C::Value;
  if (units.begin >= units.end) return;
  const int size = C::kOutputs * params.block_depth;
  const int bytes = size * static_cast<int>(sizeof(Value));
  const int entry = params.depth_units.quotient(units.begin) + lane;
  const int last = params.depth_units.quotient(units.end - 1);
  if (lane * bytes >= params.prefetch_bytes || entry > last) return;
  const int block = C::kTransposed ? clamped(__ldcg(params.blocks + entry), params.nnz) : entry;
  ptx::prefetch(
      static_cast<const Value*>(params.values) + block * params.block_size + int64_t{strip} * size,
      bytes);
}

template <class C>
using Ring = Tile<C>[C::kStages][C::kUnits];

template <class C>
class Stream {
  using Value = typename C::Value;

 public:
  __device__ Stream(const Params& params, const Places<C>& places, Ring<C>& ring, int units,
                    int strip, int lane)
      : places_(places), ring_(ring), pitch_(params.block_pitch), lane_(lane), units_(units) {
    values_ = static_cast<const Value*>(params.values) +
              strip * C::kOutputs * (C::kTransposed ? 1 : pitch_) +
              Tile<C>::first_element(pitch_, lane);
    fill();
  }

  // Nothing has been used yet: all anew, where units lie elsewhere than they did.
  __device__ void begin_again() {
    ptx::wait_for_copies<0>();
    __syncwarp();
    fetched_ = 0;
    filled_ = 0;
    fill();
  }

  using Stage = Tile<C>[C::kUnits];

  // The next stage, when it is there.
  __device__ __forceinline__ const Stage& next() {
    ptx::wait_for_copies<C::kStages - 2>();
    __syncwarp();  // the copies of all lanes; and all have used the stage that is filled next
    fetch();
    const int stage = used_;
    used_ = used_ + 1 < C::kStages ? used_ + 1 : 0;
    return ring_[stage];
  }

 private:
  __device__ void fill() {
#pragma unroll 1
    for (int i = 0; i < C::kStages - 1; ++i) fetch();
  }

  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int i = 0; i < C::kUnits; ++i) {
      if (fetched_ + i >= units_) break;
      ring_[filled_][i].copy(values_ + places_.offset(fetched_ + i), pitch_, lane_);
    }
    ptx::commit_copies();
    fetched_ += C::kUnits;
    filled_ = filled_ + 1 < C::kStages ? filled_ + 1 : 0;
  }

  const Places<C>& places_;
  Ring<C>& ring_;
  const Value* values_;
  const int pitch_;
  const int lane_;
  const int units_;
  int fetched_ = 0;
  int filled_ = 0;  // stages, as places in the ring
  int used_ = 0;
};

}  // namespace block_sparse::cuda::skinny
