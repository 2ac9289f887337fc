// From the sums of a warpgroup to y: 64 rows of M by some tokens, held as wgmma leaves them (rows
// of M down, tokens along), become [tokens, M] in shared memory, some tokens at a time, and the
// copy engine writes them out while the next are made. What lies outside y is dropped.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "block_sparse/dtype.h"
#include "cuda/fragment.cuh"
#include "cuda/sm90/ptx.cuh"

namespace block_sparse::cuda::sm90 {

// Two, of kTokens x 64 outputs.
template <int kTokens>
struct StoreBuffers {
  alignas(1024) unsigned char bytes[2][kTokens * 128];
};

// The 64 rows may be two times 32 rows of different places: then each half has its own box.
template <class T, int kBoxRows, int kTokens>
class Store {
  static constexpr int kBoxes = 64 / kBoxRows;
  static constexpr int kBoxBytes = kTokens * kBoxRows * 2;
  static constexpr int kPitch = kBoxRows * 2;  // of a token in a box, and the width of its swizzle

 public:
  // `barrier`: a named barrier that this warpgroup alone uses.
  __device__ Store(const CUtensorMap* output, StoreBuffers<kTokens>& buffers, int barrier)
      : output_(output), buffers_(buffers), barrier_(barrier) {}

  // The whole warpgroup: rows of M from first[i] on for box i (-1: dropped), tokens [token, token +
  // count), count at most 2 kSums; a part that begins before the count is stored whole.
  template <int kSums>
  __device__ __forceinline__ void rows(const float (&sums)[kSums], const int (&first)[kBoxes],
                                       int token, int count, const T* bias, int features_m) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int box = warp * 16 / kBoxRows, in_box = warp * 16 % kBoxRows;
    const int mine = box == 0 ? first[0] : first[kBoxes - 1];
    float add[2] = {0, 0};
    if (bias != nullptr && mine >= 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = mine + in_box + lane / 4 + 8 * i;
        if (row < features_m) add[i] = block_sparse::load<float>(bias[row]);
      }
    }
    // Matrix 0 and 1 of a stmatrix: rows 0-7 and 8-15 of this warp at eight tokens; 2 and 3: at the
    // next eight. Its lanes 8m .. 8m + 7 name the rows of matrix m.
    const int matrix = lane / 8;
    const int chunk = in_box / 8 + matrix % 2;  // of 16 bytes, along M
    const int token_row = matrix / 2 * 8 + lane % 8;
    const int swizzle = kBoxRows == 64 ? token_row % 8 : token_row / 2 % 4;
#pragma unroll
    for (int part = 0; part < 2 * kSums / kTokens; ++part) {
      if (part * kTokens >= count) break;
      if (thread == 0) cute::tma_store_wait<1>();  // the buffer before last was read
      sync();
      const uint32_t to = ptx::address_of(buffers_.bytes[turn_]) + box * kBoxBytes +
                          token_row * kPitch + (chunk ^ swizzle) * 16;
#pragma unroll
      for (int j = 0; j < kTokens / 8; j += 2) {
        uint32_t words[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          const float* pair = &sums[((part * kTokens / 8 + j + m / 2) * 2 + m % 2) * 2];
          words[m] = pack<T>(pair[0] + add[m % 2], pair[1] + add[m % 2]);
        }
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                         to + j * 8 * kPitch),
                     "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
      }
      cute::tma_store_fence();
      sync();
      if (thread == 0) {
#pragma unroll
        for (int i = 0; i < kBoxes; ++i) {
          if (first[i] < 0) continue;
          cute::SM90_TMA_STORE_2D::copy(output_, buffers_.bytes[turn_] + i * kBoxBytes, first[i],
                                        token + part * kTokens);
        }
        cute::tma_store_arrive();
      }
      turn_ ^= 1;
    }
  }

  // Before the CTA ends: its shared memory has been read.
  __device__ void finish() {
    if (threadIdx.x % 128 == 0) cute::tma_store_wait<0>();
  }

 private:
  __device__ void sync() const { asm volatile("bar.sync %0, 128;" ::"r"(barrier_) : "memory"); }

  const CUtensorMap* output_;
  StoreBuffers<kTokens>& buffers_;
  const int barrier_;
  int turn_ = 0;
};

}  // namespace block_sparse::cuda::sm90
