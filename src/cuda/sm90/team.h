// Team: the threads of one CTA that work on shared memory together, in phases. On the host it is
// one thread, so that what a team does can be tested without a GPU.
#pragma once

#include <bit>
#include <cstdint>

#include "block_sparse/host_device.h"

namespace block_sparse::cuda::sm90 {

BLOCK_SPARSE_HOST_DEVICE inline int popcount(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return std::popcount(bits);
#endif
}

// Within a phase, by any number of threads.
BLOCK_SPARSE_HOST_DEVICE inline void add_bits(uint32_t& target, uint32_t bits) {
#ifdef __CUDA_ARCH__
  atomicOr(&target, bits);
#else
  target |= bits;
#endif
}

BLOCK_SPARSE_HOST_DEVICE inline void add_to(uint32_t& target, uint32_t value) {
#ifdef __CUDA_ARCH__
  atomicAdd(&target, value);
#else
  target += value;
#endif
}

class Team {
 public:
  static constexpr int kThreads = 256;

  // Shared memory of a team, for its maxima.
  struct State {
    uint32_t best[3];
  };

  BLOCK_SPARSE_HOST_DEVICE explicit Team(State& state) : state_(state) {
#ifdef __CUDA_ARCH__
    if (threadIdx.x == 0) state_.best[0] = 0;
    __syncthreads();
#endif
  }

  // f(i) for all i in [0, count), and then everybody sees what all have done.
  template <class F>
  BLOCK_SPARSE_HOST_DEVICE void each(int count, const F& f) {
#ifdef __CUDA_ARCH__
    for (int i = threadIdx.x; i < count; i += kThreads) f(i);
    __syncthreads();
#else
    for (int i = 0; i < count; ++i) f(i);
#endif
  }

  // The largest f(i) for i in [0, count), or 0; the same for everybody.
  template <class F>
  BLOCK_SPARSE_HOST_DEVICE uint32_t max(int count, const F& f) {
    uint32_t best = 0;
#ifdef __CUDA_ARCH__
    for (int i = threadIdx.x; i < count; i += kThreads) best = ::max(best, f(i));
    for (int offset = 16; offset > 0; offset /= 2) {
      best = ::max(best, __shfl_xor_sync(0xffffffffu, best, offset));
    }
    // Three in turn: one that is read, one that collects and one that is cleared for the next.
    if (threadIdx.x % 32 == 0 && best != 0) atomicMax(&state_.best[turn_], best);
    const int next = turn_ == 2 ? 0 : turn_ + 1;
    if (threadIdx.x == 0) state_.best[next] = 0;
    __syncthreads();
    best = state_.best[turn_];
    turn_ = next;
#else
    for (int i = 0; i < count; ++i) {
      const uint32_t value = f(i);
      best = value > best ? value : best;
    }
#endif
    return best;
  }

 private:
  State& state_;
  [[maybe_unused]] int turn_ = 0;
};

}  // namespace block_sparse::cuda::sm90
