// The few-token kernel: W is read once and in order, x as often as its blocks meet it (from the
// caches), sums stay in registers.
//
// The units of all blocks, in the order of the outputs, are split evenly: among teams of CTAs, each
// of which has other strips of the team's blocks, and a CTA's among the warps of each strip. So a
// row of blocks may end in the middle of a warp's share, and may go on in the next. What a warp has
// of a row that an earlier warp began, it leaves in shared memory; who began it adds those parts in
// order. What a CTA has of a row that it does not end goes through workspace to the CTA that does:
// exchange.cuh. No atomics: the same bits every run.
#pragma once

#include "cuda/skinny/exchange.cuh"
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

template <class C>
struct Shared {
  Ring<C> rings[C::kWarps];
  float4 parts[C::kWarps][C::kSums];
  Link links[C::kWarps];
  // Of the row that the CTA begins with, where an earlier one began it: whether it ends here; then
  // which it is, and parts[first warp of a strip] has the sums of this CTA. Or it may go on.
  bool ends;
  bool passes;
  int row;
};

template <class C>
class Worker {
 public:
  __device__ Worker(const Params& params, Shared<C>& shared)
      : params_(params),
        shared_(shared),
        warp_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        work_(params, blockIdx.x),
        strip_(params.warps_per_strip.quotient(warp_)),
        mine_(strip_ < params.strips
                  ? share_of(work_.units, warp_ - strip_ * params.warps_per_strip.divisor(),
                             params.warps_per_strip)
                  : Range{0, 0}),
        places_(params, mine_, lane_) {}

  __device__ void prefetch() const {
    skinny::prefetch<C>(params_, mine_, work_.strip + strip_, lane_);
  }

  __device__ void run() {
    sums_.clear();
    Link link = Link::empty;
    if (mine_.begin < mine_.end) {
      link = multiply();
    } else {
      store_empty_rows<C>(params_, warp_, lane_);
    }
    if (lane_ == 0) shared_.links[warp_] = link;
    __syncthreads();
    if (mine_.begin < mine_.end && link != Link::passes) finish_last_row();
    if (!shared_.ends) return;
    __syncthreads();
    if (strip_ >= params_.strips) return;
    const int warps = params_.warps_per_strip.divisor();
    RowFromBefore<C>(params_, shared_.parts[strip_ * warps], strip_, warp_ - strip_ * warps, lane_)
        .end(first_output(shared_.row));
  }

 private:
  __device__ Link multiply() {
    const int units = mine_.end - mine_.begin;
    Stream<C> stream(params_, places_, shared_.rings[warp_], units, work_.strip + strip_, lane_);
    Multiply<C> products[C::kUnits];
    const auto load_x = [&](int unit) {
#pragma unroll
      for (int i = 0; i < C::kUnits; ++i) {
        if (unit + i < units) products[i].load(params_, places_.depth(unit + i), lane_);
      }
    };
    load_x(0);
    if constexpr (C::kEarly) {
      const Places<C> now(params_, mine_, lane_);
      if (!places_.equal(now)) [[unlikely]] {
        places_.replace(now);
        stream.begin_again();
        load_x(0);
      }
    }
    store_empty_rows<C>(params_, warp_, lane_);
    const int row_before = mine_.begin > 0 ? row_of<C>(params_, mine_.begin - 1) : -1;
    if (work_.units.end < params_.units) row_after_ = row_of<C>(params_, work_.units.end);
    bool first = true;  // still in the row that the share began with
    row_ = places_.row(0);
    const bool goes_on = row_before == row_;
    const bool from_cta = goes_on && mine_.begin == work_.units.begin;
    const bool from_warp = goes_on && !from_cta;
    if (goes_on) target_ = shared_.parts[warp_];
    if (warp_ == 0 && lane_ == 0) {
      shared_.row = row_;
      shared_.passes = from_cta && row_after_ == row_;
      shared_.ends = from_cta && row_after_ != row_;
    }
    for (int unit = 0;;) {
      const typename Stream<C>::Stage& tiles = stream.next();
#pragma unroll
      for (int i = 0; i < C::kUnits; ++i) {
        if (unit + i >= units) break;
        const int row = places_.row(unit + i);
        if (row != row_) {
          put_sums();
          sums_.clear();
          row_ = row;
          target_ = nullptr;
          first = false;
        }
        products[i].add_to(sums_, tiles[i], lane_);
      }
      unit += C::kUnits;
      if (unit >= units) break;
      places_.advance(unit);
      load_x(unit);  // is on its way while the stage is waited for
    }
    if (!from_warp) return Link::none;
    if (!first) return Link::ends;
    put_sums();
    return Link::passes;
  }

  // The row that the share ends in, with what the warps after it have of it.
  __device__ void finish_last_row() {
    const int end = (strip_ + 1) * params_.warps_per_strip.divisor();
    int warp = warp_ + 1;
    for (; warp < end; ++warp) {
      const Link link = shared_.links[warp];
      if (link == Link::none) break;
      if (link != Link::empty) sums_.add(shared_.parts[warp], lane_);
      if (link == Link::ends) break;
    }
    if (warp == end && row_after_ == row_) {
      publish<C>(params_, sums_, strip_, lane_,
                 shared_.passes ? Origin::from_before : Origin::begun_here);
    } else {
      put_sums();
    }
  }

  // In place, though the code is long: a function would take the sums through local memory.
  __device__ __forceinline__ void put_sums() {
    if (target_ != nullptr) {
      sums_.for_each(
          [&](float4& sums, int i, int j) { target_[(i * C::kWide + j) * 32 + lane_] = sums; });
      return;
    }
#pragma unroll
    for (int i = 0; i < C::kHigh; ++i) {
      const Outputs<C> outputs(params_, first_output(row_) + 16 * i, lane_);
#pragma unroll
      for (int j = 0; j < C::kWide; ++j) outputs.store(j, sums_.of[i][j]);
    }
  }

  __device__ int first_output(int row) const {
    return row * params_.block_outputs + (work_.strip + strip_) * C::kOutputs;
  }

  const Params& params_;
  Shared<C>& shared_;
  const int warp_;
  const int lane_;
  const Work work_;
  const int strip_;  // of those of the CTA
  const Range mine_;
  Places<C> places_;  // the kernel before may have written the index since they were looked up
  Sums<C> sums_;
  int row_ = 0;
  int row_after_ = -1;        // where the next team begins
  float4* target_ = nullptr;  // in shared memory, of the sums of row_; null: the output
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    skinny_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(128) unsigned char shared[];
  Worker<C> worker(params, *reinterpret_cast<Shared<C>*>(shared));
  if constexpr (C::kEarly) {
    worker.prefetch();
    ptx::wait_for_previous_kernel();
    ptx::let_next_kernel_start();  // not before: it writes where the previous one may have read
  }
  worker.run();
}

}  // namespace block_sparse::cuda::skinny
