// From the sums of a warpgroup to y: 64 rows of M by some tokens, held as wgmma leaves them (rows
// of M down, tokens along), become [tokens, M] in shared memory, some tokens at a time, and the
// copy engine writes them out while the next are made. What lies outside y is dropped.
#pragma once

#include <algorithm>
#include <cute/arch/copy_sm90_tma.hpp>
#include <type_traits>

#include "block_sparse/dtype.h"
#include "cuda/fragment.cuh"
#include "cuda/sm90/factors.cuh"
#include "cuda/sm90/ptx.cuh"

namespace block_sparse::cuda::sm90 {

// Two, each of 64 outputs of kTokens tokens in 16 bits, or of half of the tokens in float.
template <int kTokens>
struct StoreBuffers {
  alignas(1024) unsigned char bytes[2][kTokens * 128];
};

// The 64 rows may be two times 32 rows of different places; what lies side by side is stored in
// boxes, as wide as a swizzle can be. T: of y.
template <class T, int kLineRows, int kBufferTokens>
class Store {
  static constexpr int kLines = 64 / kLineRows;

 public:
  static constexpr int kTokens = kBufferTokens * 2 / sizeof(T);  // that are stored at a time
  static constexpr int kBoxRows = std::min<int>(kLineRows, 128 / sizeof(T));
  static constexpr int kPitch = kBoxRows * sizeof(T);  // of a token in a box; its swizzle

  // `barrier`: a named barrier that this warpgroup alone uses.
  __device__ Store(const CUtensorMap* output, StoreBuffers<kBufferTokens>& buffers, int barrier)
      : output_(output), buffers_(buffers), barrier_(barrier) {}

  // The whole warpgroup: rows of M from first[i] on for line i (-1: dropped), tokens [token, token
  // + count), count at most 2 kSums; a part that begins before the count is stored whole.
  template <int kSums>
  __device__ __forceinline__ void rows(const float (&sums)[kSums], const int (&first)[kLines],
                                       int token, int count, const T* bias, int features_m,
                                       Factors<T> factors) {
    const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const int box = warp * 16 / kBoxRows, in_box = warp * 16 % kBoxRows;
    const auto first_of = [&](int box) {
      const int line = box * kBoxRows / kLineRows;
      const int rows = line == 0 ? first[0] : first[kLines - 1];
      return rows < 0 ? -1 : rows + box * kBoxRows % kLineRows;
    };
    const int mine = first_of(box);
    float add[2] = {0, 0};
    if (bias != nullptr && mine >= 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = mine + in_box + lane / 4 + 8 * i;
        if (row < features_m) add[i] = block_sparse::load<float>(bias[row]);
      }
    }
    // Of eight tokens: sum i * 2 + t is of row i * 8 + lane / 4 of this warp and of token lane % 4
    // * 2 + t.
    const auto result = [&](int eight, int i, int t) {
      return factors.times(sums[(eight * 2 + i) * 2 + t]) + add[i];
    };
#pragma unroll
    for (int part = 0; part < 2 * kSums / kTokens; ++part) {
      if (part * kTokens >= count) break;
      if (thread == 0) cute::tma_store_wait<1>();  // the buffer before last was read
      sync();
      const uint32_t to = ptx::address_of(buffers_.bytes[turn_]) + box * kBoxBytes;
      put(to, in_box, lane,
          [&](int eight, int i, int t) { return result(part * kTokens / 8 + eight, i, t); });
      cute::tma_store_fence();
      sync();
      if (thread == 0) {
#pragma unroll
        for (int i = 0; i < kBoxes; ++i) {
          if (first_of(i) < 0) continue;
          cute::SM90_TMA_STORE_2D::copy(output_, buffers_.bytes[turn_] + i * kBoxBytes, first_of(i),
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
  static constexpr int kBoxes = 64 / kBoxRows;
  static constexpr int kBoxBytes = kTokens * kPitch;

  // This warp's 16 rows of a box, all tokens.
  template <class Result>
  __device__ __forceinline__ static void put(uint32_t box, int in_box, int lane,
                                             const Result& result) {
    const auto address = [&](int token, int row) {
      constexpr int kChunk = 16 / sizeof(T);
      const int swizzle = kPitch == 128 ? token % 8 : token / 2 % 4;
      return box + token * kPitch + (row / kChunk ^ swizzle) * 16 + row % kChunk * sizeof(T);
    };
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {  // the 32 lanes meet all banks
          const uint32_t to = address(lane % 4 * 2 + t, in_box + i * 8 + lane / 4);
#pragma unroll
          for (int j = 0; j < kTokens / 8; ++j) {
            ptx::store_shared(to + j * 8 * kPitch, result(j, i, t));
          }
        }
      }
    } else {
      // Matrix 0 and 1 of a stmatrix: rows 0-7 and 8-15 of this warp at eight tokens; 2 and 3: at
      // the next eight. Its lanes 8m .. 8m + 7 name the rows of matrix m.
      const int matrix = lane / 8;
      const uint32_t to = address(matrix / 2 * 8 + lane % 8, in_box + matrix % 2 * 8);
#pragma unroll
      for (int j = 0; j < kTokens / 8; j += 2) {
        uint32_t words[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          words[m] = pack<T>(result(j + m / 2, m % 2, 0), result(j + m / 2, m % 2, 1));
        }
        ptx::store_matrices_transposed(to + j * 8 * kPitch, words[0], words[1], words[2], words[3]);
      }
    }
  }

  __device__ void sync() const { asm volatile("bar.sync %0, 128;" ::"r"(barrier_) : "memory"); }

  const CUtensorMap* output_;
  StoreBuffers<kBufferTokens>& buffers_;
  const int barrier_;
  int turn_ = 0;
};

}  // namespace block_sparse::cuda::sm90
