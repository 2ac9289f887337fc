// What both kernels of cuda_tiled share: copies to shared memory, reads from there, and how long a
// sum may get. Device code.
#pragma once

#include <cstdint>

#include "block_sparse/dtype.h"
#include "cuda/ptx.cuh"

namespace block_sparse::cuda::tiles {

constexpr int kWarp = 32;
constexpr int kThreads = 128;

// Elements that are copied at once: 16 bytes where addresses and sizes allow it.
template <class T, bool kWide>
constexpr int kUnit = kWide ? 16 / static_cast<int>(sizeof(T)) : 1;

// Elements that a thread reads from shared memory at once: 16 bytes, but no more than four.
template <class T>
constexpr int kRead = sizeof(T) == 8 ? 2 : 4;

// So much of a sum is added up on its own first: one long sum would round more than torch's, which
// adds up less at a time, least of all in double.
template <class Sum>
constexpr int kPart = sizeof(Sum) == 8 ? 8 : 32;

// Indices on a GPU are not checked: what is read through them stays inside.
__device__ inline int64_t clamp(int64_t value, int64_t bound) {
  return min(max(value, int64_t{0}), bound);
}

// kBytes to shared memory, or zeros: then nothing is read. From Ampere on they arrive some time
// later, if they are words.
template <int kBytes>
__device__ __forceinline__ void copy(char* to, const void* from, bool inside) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(ptx::address_of(to)),
                 "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
    return;
  } else if constexpr (kBytes >= 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(ptx::address_of(to)),
                 "l"(from), "n"(kBytes), "r"(inside ? kBytes : 0)
                 : "memory");
    return;
  }
#endif
  struct alignas(kBytes) Bytes {
    char bytes[kBytes];
  };
  *reinterpret_cast<Bytes*>(to) = inside ? *static_cast<const Bytes*>(from) : Bytes{};
}

// All that this thread has begun to copy is there.
__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// kCount neighbouring elements, widened.
template <class T, int kCount, class Sum>
__device__ __forceinline__ void read(Sum (&to)[kCount], const char* from) {
  constexpr int kAtOnce = kCount < kRead<T> ? kCount : kRead<T>;
  struct alignas(kAtOnce * sizeof(T)) Some {
    T elements[kAtOnce];
  };
#pragma unroll
  for (int i = 0; i < kCount; i += kAtOnce) {
    const Some some = *reinterpret_cast<const Some*>(from + i * sizeof(T));
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) to[i + j] = load<Sum>(some.elements[j]);
  }
}

// to[i][j] += a[i] b[j]
template <class Sum, int kRows, int kColumns>
__device__ __forceinline__ void add_product(Sum (&to)[kRows][kColumns], const Sum (&a)[kRows],
                                            const Sum (&b)[kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) to[i][j] += a[i] * b[j];
  }
}

template <class Sum, int kRows, int kColumns>
__device__ __forceinline__ void add(Sum (&to)[kRows][kColumns],
                                    const Sum (&sums)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) to[i][j] += sums[i][j];
  }
}

}  // namespace block_sparse::cuda::tiles
