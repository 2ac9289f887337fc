// The few-token kernel: W is read once and in order, x as often as its blocks meet it (from the
// caches), sums stay in registers.
//
// The units of all blocks, in the order of the outputs, are split evenly: among CTAs, and a CTA's
// among the warps of each strip. So a row of blocks may end in the middle of a warp's share, and
// may go on in the next. What a warp has of a row that an earlier warp began, it leaves in shared
// memory; who began it adds those parts in order. What a CTA has of a row that it did not begin or
// does not end goes to workspace, for finish.cuh. No atomics: the same bits every run.
#pragma once

#include "cuda/skinny/multiply.cuh"
#include "cuda/skinny/store.cuh"
#include "cuda/skinny/stream.cuh"

namespace block_sparse::cuda::skinny {

// What a warp's share has of the row that the warp before it was in.
enum class Link : int {
  none,    // it begins another
  ends,    // the end of it
  passes,  // it is all of it, and the row may go on
  empty,   // there is no share
};

// What is behind it are the rings.
template <class C>
struct alignas(128) Shared {
  float4 parts[C::kWarps][C::kSums];
  Link links[C::kWarps];
};

template <class C>
class Worker {
 public:
  __device__ Worker(const Params& params, Shared<C>& shared)
      : params_(params),
        shared_(shared),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        member_(params.teams.quotient(warp_)),
        team_(warp_ - member_ * params.teams.divisor()),
        cta_(units_of_cta(params, blockIdx.x)),
        mine_(member_ < params.members ? share_of(cta_, team_, params.teams) : Range{0, 0}) {}

  __device__ void prefetch() const { skinny::prefetch<C>(params_, mine_, member_, lane_); }

  __device__ void run() {
    sums_.clear();
    Link link = Link::empty;
    if (mine_.begin < mine_.end) link = multiply();
    if (lane_ == 0) shared_.links[warp_] = link;
    __syncthreads();
    if (mine_.begin < mine_.end && link != Link::passes) finish_last_row();
  }

 private:
  __device__ Link multiply() {
    const int units = mine_.end - mine_.begin;
    Places<C> places(params_, mine_, lane_);
    const unsigned char* ring =
        reinterpret_cast<const unsigned char*>(&shared_ + 1) + team_ * params_.ring_bytes;
    Stream<C> stream(params_, places, ptx::address_of(ring), units, member_, team_, lane_);
    const Multiply<C> product(ring + member_ / C::kParts * C::kUnitBytes,
                              ring + params_.strips * C::kUnitBytes +
                                  member_ % C::kParts * C::kWarpTokens * InputTile<C>::kRowBytes,
                              lane_);
    const int row_before = mine_.begin > 0 ? row_of<C>(params_, mine_.begin - 1) : -1;
    if (cta_.end < params_.units) row_of_next_cta_ = row_of<C>(params_, cta_.end);
    bool first = true;  // still in the row that the share began with
    row_ = places.row(0);
    const bool goes_on = row_before == row_;
    const bool from_cta = goes_on && mine_.begin == cta_.begin;
    const bool from_warp = goes_on && !from_cta;
    if (from_cta) target_ = workspace(params_.continued);
    if (from_warp) target_ = shared_.parts[warp_];
    const int trigger =
        params_.trigger == 0 ? -1 : params_.trigger * units / 64 / C::kUnits * C::kUnits;
    for (int unit = 0; unit < units; unit += C::kUnits) {
      places.advance(unit);
      if (unit == trigger) ptx::let_next_kernel_start();
      if (params_.ahead > 0) places.prefetch(unit + params_.ahead, C::kUnits, member_);
      const int stage = stream.next();
#pragma unroll
      for (int i = 0; i < C::kUnits; ++i) {
        if (unit + i >= units) break;
        const int row = places.row(unit + i);
        if (row != row_) {
          put_sums();
          sums_.clear();
          row_ = row;
          target_ = nullptr;
          first = false;
        }
        const int inside = params_.ragged ? params_.depth - places.depth(unit + i) : C::kDepth;
        product.add_to(sums_, stage + i * params_.unit_bytes, inside);
      }
    }
    if (!from_warp) return Link::none;
    if (!first) return Link::ends;
    put_sums();
    return Link::passes;
  }

  // The row that the share ends in, with what the warps after it have of it.
  __device__ void finish_last_row() {
    const int end = (member_ + 1) * params_.teams.divisor();
    int warp = warp_ + 1;
    for (; warp < end; ++warp) {
      const Link link = shared_.links[warp];
      if (link == Link::none) break;
      if (link != Link::empty) sums_.add(shared_.parts[warp], lane_);
      if (link == Link::ends) break;
    }
    const bool to_next_cta = warp == end && row_of_next_cta_ == row_;
    if (target_ == nullptr && to_next_cta) target_ = workspace(params_.begun);
    put_sums();
  }

  __device__ float4* workspace(float4* parts) const {
    return parts + (int64_t{blockIdx.x} * params_.members + member_) * C::kSums;
  }

  // In place, though the code is long: a function would take the sums through local memory.
  __device__ __forceinline__ void put_sums() {
    if (target_ != nullptr) {
      sums_.for_each(
          [&](float4& sums, int i, int j) { target_[(i * C::kWide + j) * 32 + lane_] = sums; });
      return;
    }
    const int output = row_ * params_.block_outputs + member_ / C::kParts * C::kOutputs;
    const int token = member_ % C::kParts * C::kWarpTokens;
    sums_.for_each([&](float4& sums, int i, int j) {
      store<C>(params_, token + 8 * j, output + 16 * i, sums, lane_);
    });
  }

  const Params& params_;
  Shared<C>& shared_;
  const int warp_;
  const int lane_;
  const int member_;  // of the team
  const int team_;
  const Range cta_;
  const Range mine_;
  Sums<C> sums_;
  int row_ = 0;
  int row_of_next_cta_ = -1;  // the one that it begins with
  float4* target_ = nullptr;  // of the sums of row_; null: the output
};

template <class C>
__global__ void __launch_bounds__(config_for(C::kTokens).bound_threads(), config_for(C::kTokens).ctas)
    skinny_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  Worker<C> worker(params, *reinterpret_cast<Shared<C>*>(shared));
  worker.prefetch();
  ptx::wait_for_previous_kernel();
  if (params.trigger == 0) ptx::let_next_kernel_start();
  worker.run();
}

}  // namespace block_sparse::cuda::skinny
