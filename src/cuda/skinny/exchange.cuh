// Exchange: sums of a row of blocks that several CTAs share, on their way through workspace to the
// CTA in which the row ends. That one waits for CTAs before its own only, which have been started
// earlier and wait for nobody later: so all get on, however few multiprocessors there are.
//
// Nobody knows what is in workspace before. So each 16 bytes, which are written and read at once,
// say in their second half whose they are: a number that no other launch has. Who has read them
// takes the number out, since a CUDA graph launches with the same one every time.
#pragma once

#include "cuda/skinny/multiply.cuh"
#include "cuda/skinny/store.cuh"

namespace block_sparse::cuda::skinny {

// Tags of a launch: its number, which is even, and the next. Whether the CTA has the row from an
// earlier one.
enum class Origin : uint64_t { begun_here = 0, from_before = 1 };

// [ctas][strips][kHigh * kWide][2][32]
template <class C>
__device__ __forceinline__ Part* part_of(const Params& params, int cta, int strip, int piece,
                                         int lane) {
  const int64_t pieces = (int64_t{cta} * params.strips + strip) * (C::kSums / 32) + piece;
  return params.parts + pieces * 64 + lane;
}

template <class C>
__device__ __forceinline__ void publish(const Params& params, Sums<C>& sums, int strip, int lane,
                                        Origin origin) {
  const uint64_t tag = params.launch + static_cast<uint64_t>(origin);
  sums.for_each([&](const float4& of, int i, int j) {
    Part* to = part_of<C>(params, blockIdx.x, strip, i * C::kWide + j, lane);
    ptx::store(to, {of.x, of.y, tag});
    ptx::store(to + 32, {of.z, of.w, tag});
  });
}

// What one CTA has of a lane's sums of 16 outputs x 8 tokens.
struct Parts {
  Part of[2];

  __device__ __forceinline__ void read(const Part* from) {
    of[0] = ptx::load(from);
    of[1] = ptx::load(from + 32);
  }
  __device__ __forceinline__ void wait(Part* from, uint64_t launch) {
    while (((of[0].tag ^ launch) | (of[1].tag ^ launch)) > 1) read(from);
    ptx::store(from, {});
    ptx::store(from + 32, {});
  }
  __device__ __forceinline__ void add_to(float4& sums) const {
    sums.x += of[0].x, sums.y += of[0].y, sums.z += of[1].x, sums.w += of[1].y;
  }
  __device__ __forceinline__ bool has_more_before(uint64_t launch) const {
    return of[0].tag != launch;
  }
};

// Adds what CTAs before have of the row that this one begins with, from the nearest on.
template <class C>
__device__ void add_from_before(const Params& params, Parts parts, float4& sums, int strip,
                                int piece, int lane) {
  constexpr int kAhead = 4;  // rows of many CTAs: reads on their way
  int cta = static_cast<int>(blockIdx.x) - 1;
  parts.wait(part_of<C>(params, cta, strip, piece, lane), params.launch);
  parts.add_to(sums);
  bool more = parts.has_more_before(params.launch);
  while (more) {
    Parts ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      ahead[i].read(part_of<C>(params, max(cta - 1 - i, 0), strip, piece, lane));
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (!more) break;
      --cta;
      ahead[i].wait(part_of<C>(params, cta, strip, piece, lane), params.launch);
      ahead[i].add_to(sums);
      more = ahead[i].has_more_before(params.launch);
    }
  }
}

// Ends the row that CTAs before began, when all warps have multiplied: from `sums` of this CTA to
// the output. The warps of a strip, `warp` of `warps`, take pieces in turn.
template <class C>
__device__ void end_row_from_before(const Params& params, const float4* sums, int row, int strip,
                                    int warp, int warps, int lane) {
  constexpr int kPieces = C::kSums / 32;
  constexpr int kBatch = kPieces < 4 ? kPieces : 4;  // reads of a lane on their way
  const int output = row * params.block_outputs + strip * C::kOutputs;
  for (int first = warp; first < kPieces; first += kBatch * warps) {
    Parts parts[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int piece = first + i * warps;
      if (piece < kPieces) {
        parts[i].read(part_of<C>(params, blockIdx.x - 1, strip, piece, lane));
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int piece = first + i * warps;
      if (piece >= kPieces) break;
      float4 all = sums[piece * 32 + lane];
      add_from_before<C>(params, parts[i], all, strip, piece, lane);
      store<C>(params, piece % C::kWide * 8, output + piece / C::kWide * 16, all, lane);
    }
  }
}

}  // namespace block_sparse::cuda::skinny
