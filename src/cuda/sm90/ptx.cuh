// The few instructions of Hopper that CuTe and CUTLASS do not wrap as these kernels need them: with
// 32-bit shared addresses, so that one addition makes the next one, and with a memory clobber, so
// that plain reads of shared memory stay behind the wait for them. No layouts and no policy.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx.cuh"

namespace block_sparse::cuda::sm90::ptx {

using namespace cuda::ptx;

// Barriers in shared memory. A wait names the parity of the phase that it waits for.

__device__ inline void init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Whether the phase is over: without waiting, or after a short wait.
#define BLOCK_SPARSE_IS_OVER(name, instruction)                    \
  __device__ inline bool name(uint32_t barrier, uint32_t parity) { \
    uint32_t over;                                                 \
    asm volatile(                                                  \
        "{\n"                                                      \
        ".reg .pred done;\n" instruction                           \
        ".parity.shared::cta.b64 done, [%1], %2;\n"                \
        "selp.u32 %0, 1, 0, done;\n"                               \
        "}"                                                        \
        : "=r"(over)                                               \
        : "r"(barrier), "r"(parity)                                \
        : "memory");                                               \
    return over != 0;                                              \
  }
BLOCK_SPARSE_IS_OVER(is_over, "mbarrier.test_wait")
BLOCK_SPARSE_IS_OVER(is_over_soon, "mbarrier.try_wait")
#undef BLOCK_SPARSE_IS_OVER

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// The same address in another CTA of the cluster, and what may be done there.

__device__ inline uint32_t at_rank(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

__device__ inline void arrive_remote(uint32_t remote_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote_barrier) : "memory");
}

// Arrives where `on` is not 0, without a branch.
__device__ inline void arrive_remote_if(int on, uint32_t remote_barrier) {
  asm volatile(
      "{\n"
      ".reg .pred on;\n"
      "setp.ne.s32 on, %1, 0;\n"
      "@on mbarrier.arrive.shared::cluster.b64 _, [%0];\n"
      "}" ::"r"(remote_barrier),
      "r"(on)
      : "memory");
}

// Writes 16 bytes there, which the barrier counts.
__device__ inline void send(uint32_t remote, int4 words, uint32_t remote_barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(remote),
      "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w), "r"(remote_barrier)
      : "memory");
}

// The copy engine: the box of `map` at (row, col), to shared memory.

__device__ inline void load_box(const CUtensorMap* map, uint32_t to, uint32_t barrier, int row,
                                int col) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(col), "r"(row)
      : "memory");
}

// Of five dimensions, the three in the middle whole.
__device__ inline void load_box_5d(const CUtensorMap* map, uint32_t to, uint32_t barrier,
                                   int slowest, int fastest) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%4, %5, %5, %5, %3}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(slowest), "r"(fastest), "r"(0)
      : "memory");
}

// To the same place in every CTA of the cluster that `mask` names.
__device__ inline void load_box_multicast(const CUtensorMap* map, uint32_t to, uint32_t barrier,
                                          int row, int col, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(col), "r"(row), "h"(mask)
      : "memory");
}

// Four 8x8 matrices of 16-bit elements, two to a lane, transposed; lane i gives the address of row
// i % 8 of matrix i / 8, as it is stored.
__device__ inline void store_matrices_transposed(uint32_t row, uint32_t a, uint32_t b, uint32_t c,
                                                 uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ inline void store_shared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ inline void store_shared(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                    uint32_t d) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

// Waits until so many threads are here.
template <int kThreads>
__device__ inline void meet(int barrier) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Keeps a value in its register: ptxas would rather compute it again at each use.
template <class T>
__device__ inline void keep_in_register(T& value) {
  asm volatile("" : "+r"(value));
}

}  // namespace block_sparse::cuda::sm90::ptx
