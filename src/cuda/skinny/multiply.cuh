// One unit of W times its part of x, for a warp: tensor cores for 16-bit elements, FMA for float.
//
// The inputs of a unit may be taken in any order as long as W and x agree. Lane t of a quad takes
// kDepth / 4 neighbouring ones, so that it reads x 16 (or 8) bytes at a time where x lies. What is
// outside the matrix counts as zero in both, whatever is stored there.
#pragma once

#include "cuda/skinny/int8.cuh"
#include "cuda/skinny/params.h"
#include "cuda/skinny/tile.cuh"

namespace block_sparse::cuda::skinny {

// Sums of kOutputs outputs x kTokens tokens. Of 16 outputs x 8 tokens a lane has those of outputs
// lane / 4 (x, y) and lane / 4 + 8 (z, w), tokens lane % 4 * 2 (x, z) and the next (y, w): as the
// tensor cores leave them.
template <class C>
struct Sums {
  float4 of[C::kHigh][C::kWide];

  template <class F>
  __device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
    for (int i = 0; i < C::kHigh; ++i) {
#pragma unroll
      for (int j = 0; j < C::kWide; ++j) f(of[i][j], i, j);
    }
  }

  __device__ __forceinline__ void clear() {
    for_each([](float4& sums, int, int) { sums = {0, 0, 0, 0}; });
  }
  // From [kHigh][kWide][lane] in shared memory or workspace.
  __device__ __forceinline__ void add(const float4* from, int lane) {
    for_each([&](float4& sums, int i, int j) {
      const float4 more = from[(i * C::kWide + j) * 32 + lane];
      sums.x += more.x, sums.y += more.y, sums.z += more.z, sums.w += more.w;
    });
  }
};

// 16-bit elements.
template <class C>
class Multiply {
  using T = typename C::T;
  static constexpr int kProducts = C::kDepth / 16;  // one after the other along the depth

 public:
  // Reads x; `depth`: the first input of the unit.
  __device__ __forceinline__ void load(const Params& params, int depth, int lane) {
    const int k = depth + lane % 4 * (C::kDepth / 4);
    inside_ = k < params.depth;
    const T* from = static_cast<const T*>(params.x) + lane / 4 * params.x_stride + k;
#pragma unroll
    for (int j = 0; j < C::kWide; ++j) {
      Word word{};
      if (inside_ && 8 * j + lane / 4 < params.tokens) {
        word = *reinterpret_cast<const Word*>(from + 8 * j * params.x_stride);
      }
      x_[j] = word;
    }
  }

  __device__ __forceinline__ void add_to(Sums<C>& sums, const Tile<C>& tile, int lane) const {
#pragma unroll
    for (int i = 0; i < C::kHigh; ++i) {
      uint32_t a[kProducts][4];
      C::kTransposed ? load_columns(a, tile, i, lane) : load_rows(a, tile, i, lane);
#pragma unroll
      for (int h = 0; h < kProducts; ++h) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a[h][e] = inside_ ? a[h][e] : 0;
#pragma unroll
        for (int j = 0; j < C::kWide; ++j) {
          ptx::multiply<T>(sums.of[i][j], a[h], x_[j].pairs[2 * h], x_[j].pairs[2 * h + 1]);
        }
      }
    }
  }

 private:
  // Inputs of a lane, in pairs: two for each product.
  struct alignas(C::kDepth / 2) Word {
    uint32_t pairs[2 * kProducts];
  };

  // Outputs lane / 4 and lane / 4 + 8 of the i-th 16.
  __device__ static __forceinline__ void load_rows(uint32_t (&a)[kProducts][4], const Tile<C>& tile,
                                                   int i, int lane) {
    constexpr int kBytes =
        C::kDepth / 4 * static_cast<int>(sizeof(typename C::Value));  // of a lane
    const int row = 16 * i + lane / 4, byte = lane % 4 * kBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int offset = Tile<C>::offset(row + 8 * half, byte / 16) + byte % 16;
      const Word word = load_word(tile.bytes + offset);
#pragma unroll
      for (int h = 0; h < kProducts; ++h) {
        a[h][half] = word.pairs[2 * h];
        a[h][2 + half] = word.pairs[2 * h + 1];
      }
    }
  }

  __device__ static __forceinline__ Word load_word(const unsigned char* from) {
    if constexpr (!C::kScaled) {
      return *reinterpret_cast<const Word*>(from);
    } else {
      struct alignas(4 * kProducts) Int8Word {
        uint32_t values[kProducts];
      };
      const Int8Word stored = *reinterpret_cast<const Int8Word*>(from);
      Word word;
#pragma unroll
      for (int h = 0; h < kProducts; ++h) {
        const uint2 pairs = widen_to_pairs<T>(stored.values[h]);
        word.pairs[2 * h] = pairs.x;
        word.pairs[2 * h + 1] = pairs.y;
      }
      return word;
    }
  }

  // The same from a block whose rows are the depth: of an 8x8 matrix, row r is the input that lane
  // r / 2 of a quad has as the (r % 2)-th of a pair.
  __device__ static __forceinline__ void load_columns(uint32_t (&a)[kProducts][4],
                                                      const Tile<C>& tile, int i, int lane) {
    const int r = lane % 8, half = lane / 8 % 2, pair = lane / 16;
    const uint32_t bytes = ptx::address_of(tile.bytes);
#pragma unroll
    for (int h = 0; h < kProducts; ++h) {
      const int row = r / 2 * (C::kDepth / 4) + 4 * h + 2 * pair + r % 2;
      ptx::load_matrices<true>(a[h], bytes + Tile<C>::offset(row, 2 * i + half));
    }
  }

  Word x_[C::kWide];
  bool inside_;
};

// Float: a lane multiplies for its own sums alone, four inputs at a time.
template <class C>
  requires(sizeof(typename C::T) == 4)
class Multiply<C> {
 public:
  __device__ __forceinline__ void load(const Params& params, int depth, int lane) {
    x_ = static_cast<const float*>(params.x) + lane % 4 * 2 * params.x_stride + depth;
    stride_ = params.x_stride;
    tokens_ = params.tokens - lane % 4 * 2;
    inside_ = params.depth - depth;
  }

  __device__ __forceinline__ void add_to(Sums<C>& sums, const Tile<C>& tile, int lane) const {
#pragma unroll
    for (int k = 0; k < C::kDepth; k += 4) {
      if (k >= inside_) break;
      float4 w[2 * C::kHigh];
#pragma unroll
      for (int i = 0; i < 2 * C::kHigh; ++i) w[i] = load_w(tile, 8 * i + lane / 4, k);
#pragma unroll
      for (int j = 0; j < C::kWide; ++j) {
        const float4 x0 = load_x(8 * j, k), x1 = load_x(8 * j + 1, k);
#pragma unroll
        for (int i = 0; i < C::kHigh; ++i) {
          float4& of = sums.of[i][j];
          of.x = dot(w[2 * i], x0, of.x);
          of.y = dot(w[2 * i], x1, of.y);
          of.z = dot(w[2 * i + 1], x0, of.z);
          of.w = dot(w[2 * i + 1], x1, of.w);
        }
      }
    }
  }

 private:
  __device__ static __forceinline__ float dot(float4 a, float4 b, float sum) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
  }

  __device__ __forceinline__ float4 load_x(int token, int k) const {
    if (token >= tokens_) return {0, 0, 0, 0};
    return *reinterpret_cast<const float4*>(x_ + token * stride_ + k);
  }

  __device__ static __forceinline__ float4 load_w(const Tile<C>& tile, int output, int k) {
    if constexpr (C::kTransposed) {
      const auto one = [&](int row) {
        const int offset = Tile<C>::offset(row, output / 4) + output % 4 * 4;
        return *reinterpret_cast<const float*>(tile.bytes + offset);
      };
      return {one(k), one(k + 1), one(k + 2), one(k + 3)};
    } else if constexpr (C::kScaled) {
      const int offset = Tile<C>::offset(output, k / 16) + k % 16;
      return widen_to_floats(*reinterpret_cast<const uint32_t*>(tile.bytes + offset));
    } else {
      return *reinterpret_cast<const float4*>(tile.bytes + Tile<C>::offset(output, k / 4));
    }
  }

  const float* x_;
  int64_t stride_;
  int tokens_;  // from the lane's first on
  int inside_;  // inputs of the unit that are inside the matrix
};

}  // namespace block_sparse::cuda::skinny
