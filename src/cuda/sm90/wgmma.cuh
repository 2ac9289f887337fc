// The matrix instructions of a warpgroup (wgmma m64nNk16, fp32 sums) with both operands in shared
// memory, chosen by element type and N, and the descriptors of operands. CuTe has the instructions;
// this file only picks one. Those with A in registers: strip_multiply.cuh.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <type_traits>
#include <utility>

#include "block_sparse/dtype.h"

namespace block_sparse::cuda::sm90 {

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;

template <class T, int N, Major kMajorA, Major kMajorB>
struct Mma;

#define BLOCK_SPARSE_MMA(storage, name, n) \
  template <Major kMajorA, Major kMajorB>  \
  struct Mma<storage, n, kMajorA, kMajorB> \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32##name##name##_SS<kMajorA, kMajorB> {};
#define BLOCK_SPARSE_MMAS(n)          \
  BLOCK_SPARSE_MMA(BFloat16, BF16, n) \
  BLOCK_SPARSE_MMA(Float16, F16, n)
BLOCK_SPARSE_MMAS(16)
BLOCK_SPARSE_MMAS(32)
BLOCK_SPARSE_MMAS(64)
BLOCK_SPARSE_MMAS(128)
BLOCK_SPARSE_MMAS(192)
BLOCK_SPARSE_MMAS(256)
#undef BLOCK_SPARSE_MMAS
#undef BLOCK_SPARSE_MMA

// sums[64, N] += A[64, 16] B[16, N]; overwrites where `add` is false.
template <class T, Major kMajorA, Major kMajorB, int kSums>
__device__ __forceinline__ void multiply(float (&sums)[kSums], uint64_t a, uint64_t b, bool add) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    Mma<T, 2 * kSums, kMajorA, kMajorB>::fma(a, b, sums[I]...,
                                             add ? ScaleOut::One : ScaleOut::Zero);
  }(std::make_index_sequence<kSums>{});
}

// Descriptors count in 16 bytes. A swizzled operand: rows of `kRowBytes` (its swizzle), eight rows
// a group, groups one after the other. `apart`: bytes from one part to the next of an operand whose
// rows are narrower than it is (only where its rows lie across K).
template <int kRowBytes>
constexpr uint64_t swizzled_operand(uint64_t apart = 16) {
  static_assert(kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32);
  constexpr uint64_t swizzle = kRowBytes == 128 ? 1 : kRowBytes == 64 ? 2 : 3;
  return swizzle << 62 | uint64_t{kRowBytes * 8 / 16} << 32 | apart / 16 << 16;
}

// In a cluster a shared address carries the CTA's rank in its high bits: they do not belong here.
__device__ __forceinline__ uint64_t descriptor_address(uint32_t shared) {
  return (shared & 0x3ffffu) >> 4;
}

}  // namespace block_sparse::cuda::sm90
