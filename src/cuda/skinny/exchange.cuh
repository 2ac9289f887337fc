// Exchange: sums of a row of blocks that several CTAs share, on their way through workspace to the
// CTA in which the row ends. That one waits for CTAs before its own only, and these for nobody
// later. CTAs are started in the order of their numbers, as every GPU does it and none promises: so
// all get on, however few multiprocessors there are.
//
// Nobody knows what is in workspace before. So each 16 bytes, which are written and read at once,
// say in their second half whose they are: a number that no other launch has. Who has read them
// takes the number out, since a CUDA graph launches with the same one every time.
#pragma once

#include "cuda/skinny/multiply.cuh"
#include "cuda/skinny/store.cuh"

namespace block_sparse::cuda::skinny {

// Tags of a launch: its number, which is even, or the next where the row comes from an earlier CTA.
enum class Origin : uint64_t { begun_here = 0, from_before = 1 };

// [ctas][strips][kHigh * kWide][2][32]
template <class C>
__device__ __forceinline__ Part* parts_of(const Params& params, int cta, int strip, int lane) {
  return params.parts + (int64_t{cta} * params.strips + strip) * (2 * C::kSums) + lane;
}

template <class C>
__device__ __forceinline__ void publish(const Params& params, Sums<C>& sums, int strip, int lane,
                                        Origin origin) {
  const uint64_t tag = params.launch + static_cast<uint64_t>(origin);
  Part* const parts = parts_of<C>(params, blockIdx.x, strip, lane);
  sums.for_each([&](const float4& of, int i, int j) {
    Part* to = parts + 64 * (i * C::kWide + j);
    ptx::store(to, {of.x, of.y, tag});
    ptx::store(to + 32, {of.z, of.w, tag});
  });
}

// What one CTA has of a lane's sums of 16 outputs x 8 tokens: a piece.
struct Piece {
  Part parts[2];

  __device__ __forceinline__ void read(const Part* from) {
    parts[0] = ptx::load(from);
    parts[1] = ptx::load(from + 32);
  }
  __device__ __forceinline__ bool is_there(uint64_t launch) const {
    return ((parts[0].tag ^ launch) | (parts[1].tag ^ launch)) <= 1;
  }
  __device__ __forceinline__ bool is_last(uint64_t launch) const { return parts[0].tag == launch; }
  // What it was read from counts as not there from now on.
  __device__ __forceinline__ void add_to(float4& sums, Part* from) const {
    sums.x += parts[0].x, sums.y += parts[0].y, sums.z += parts[1].x, sums.w += parts[1].y;
    ptx::store(from, {});
    ptx::store(from + 32, {});
  }
};

// Ends the row that CTAs before began, when all warps of this one have multiplied: adds their
// pieces to `sums`, those of this CTA in shared memory, from the nearest CTA on. The warps of a
// strip take pieces in turn.
template <class C>
class RowFromBefore {
  static constexpr int kPieces = C::kSums / 32;
  static constexpr int kAtOnce = kPieces < 4 ? kPieces : 4;  // reads of a lane on their way
  static constexpr int kCtasAtOnce = 4;

 public:
  __device__ RowFromBefore(const Params& params, float4* sums, int strip, int warp, int lane)
      : params_(params), sums_(sums), strip_(strip), warp_(warp), lane_(lane) {}

  __device__ void end(int output) {
    bool more = false;
    for (int first = warp_; first < kPieces; first += kAtOnce * warps()) more = add_nearest(first);
    for (int piece = warp_; piece < kPieces; piece += warps()) {
      if (more) add_rest(piece);
      const Outputs<C> outputs(params_, output + piece / C::kWide * 16, lane_);
      outputs.store(piece % C::kWide, sums_[32 * piece + lane_]);
    }
  }

 private:
  // Whether CTAs before the nearest one have had the row too.
  __device__ bool add_nearest(int first) {
    Part* const from = place(first, 1);
    const int step = 64 * warps();
    Piece pieces[kAtOnce];
    while (true) {
      bool there = true;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * warps() < kPieces) pieces[i].read(from + i * step);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i * warps() < kPieces) there &= pieces[i].is_there(params_.launch);
      }
      if (__all_sync(~0u, there)) break;
      wait_for(from);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int piece = first + i * warps();
      if (piece < kPieces) pieces[i].add_to(sums_[32 * piece + lane_], from + i * step);
    }
    return !pieces[0].is_last(params_.launch);
  }

  // One lane asks again and again: all of them would be in the way of those who still multiply.
  __device__ void wait_for(const Part* from) {
    if (lane_ == 0) {
      while ((ptx::load(from).tag ^ params_.launch) > 1) {
      }
    }
    __syncwarp();
  }

  __device__ void add_rest(int piece) {
    float4 sums = sums_[32 * piece + lane_];
    for (int distance = 2; distance != 0;) {
      Piece ahead[kCtasAtOnce];
#pragma unroll
      for (int i = 0; i < kCtasAtOnce; ++i) ahead[i].read(place(piece, distance + i));
#pragma unroll
      for (int i = 0; i < kCtasAtOnce; ++i) {
        if (distance == 0) break;
        Part* const from = place(piece, distance);
        while (!ahead[i].is_there(params_.launch)) ahead[i].read(from);
        ahead[i].add_to(sums, from);
        distance = ahead[i].is_last(params_.launch) ? 0 : distance + 1;
      }
    }
    sums_[32 * piece + lane_] = sums;
  }

  // What the CTA `distance` teams before, if there is one, has of a piece.
  __device__ Part* place(int piece, int distance) const {
    const int cta = static_cast<int>(blockIdx.x) - distance * params_.team_ctas.divisor();
    return parts_of<C>(params_, max(cta, 0), strip_, lane_) + 64 * piece;
  }

  __device__ int warps() const { return params_.warps_per_strip.divisor(); }

  const Params& params_;
  float4* const sums_;
  const int strip_;
  const int warp_;
  const int lane_;
};

}  // namespace block_sparse::cuda::skinny
