// One unit of W times its part of x, for a warp: tensor cores for 16-bit elements, FMA for float.
// What is outside the matrix counts as zero in both, whatever is stored there.
#pragma once

#include "cuda/skinny/int8.cuh"
#include "cuda/skinny/params.h"
#include "cuda/skinny/ptx.cuh"
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

// 16-bit elements, on the tensor cores. Inputs may be taken in any order as long as W and x agree.
// int8: lane t of a quad takes kDepth / 4 neighbouring ones, so that it reads as many bytes at once.
template <class C>
class Multiply {
  using T = typename C::T;
  static constexpr int kProducts = C::kDepth / 16;     // one after the other
  static constexpr int kGroup = 2 / kProducts;         // eights of tokens: four 8 x 8 matrices of x
  static constexpr int kMatrices = 2 * kProducts;      // of x, for 8 tokens
  using Values = Tile<C>;
  using Inputs = InputTile<C>;

 public:
  // `values`, `inputs`: of the first unit of the ring's first stage.
  __device__ Multiply(const unsigned char* values, const unsigned char* inputs, int lane)
      : values_(values), inputs_(inputs), lane_(lane) {
    // Of W: 16 outputs, for 8 inputs and for the next 8.
    const int output = lane / 8 % 2, input = lane / 16;
    values_from_ = ptx::kept(ptx::address_of(values) +
                             (C::kTransposed ? Values::offset(8 * input + lane % 8, output)
                                             : Values::offset(8 * output + lane % 8, input)));
    const int matrix = lane / 8;
    const int token = (8 * (matrix / kMatrices) + lane % 8) % C::kWarpTokens;
    inputs_from_ = ptx::kept(ptx::address_of(inputs) + Inputs::offset(token, matrix % kMatrices));
  }

  // The unit that lies `place` further. `inside`: how much of its depth is inside the matrix, all or
  // more where it is whole.
  __device__ __forceinline__ void add_to(Sums<C>& sums, int place, int inside) const {
    uint32_t a[C::kHigh][kProducts][4];
#pragma unroll
    for (int i = 0; i < C::kHigh; ++i) {
      C::kScaled ? load_int8(a[i], place, i) : load_values(a[i], place, i);
    }
    if (!C::kScaled && inside < C::kDepth) {  // int8 values are finite, and x is zero there
#pragma unroll
      for (int i = 0; i < C::kHigh; ++i) {
#pragma unroll
        for (int h = 0; h < kProducts; ++h) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (16 * h + e / 2 * 8 >= inside) a[i][h][e] = 0;  // eights are inside or outside
          }
        }
      }
    }
    constexpr int kGroups = (C::kWide + kGroup - 1) / kGroup;
    uint32_t b[kGroups][4];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      C::kScaled ? load_neighbours(b[j], place, j * kGroup) : load_inputs(b[j], place, j * kGroup);
    }
#pragma unroll
    for (int h = 0; h < kProducts; ++h) {
#pragma unroll
      for (int j = 0; j < C::kWide; ++j) {
        const int pair = j % kGroup * kMatrices + 2 * h;
#pragma unroll
        for (int i = 0; i < C::kHigh; ++i) {
          ptx::multiply<T>(sums.of[i][j], a[i][h], b[j / kGroup][pair], b[j / kGroup][pair + 1]);
        }
      }
    }
  }

 private:
  // Two chunks further is 32 bytes further or back.
  __device__ __forceinline__ void load_values(uint32_t (&a)[kProducts][4], int place, int i) const {
#pragma unroll
    for (int h = 0; h < kProducts; ++h) {
      const int chunk = C::kTransposed ? i : h, rows = C::kTransposed ? h : i;
      ptx::load_matrices<C::kTransposed>(
          a[h], ((values_from_ + place) ^ (32 * chunk)) + 16 * rows * Values::kRowBytes);
    }
  }
  __device__ __forceinline__ void load_inputs(uint32_t (&b)[4], int place, int j) const {
    ptx::load_matrices<false>(b, inputs_from_ + place + 8 * j * Inputs::kRowBytes);
  }

  // Inputs of a lane, in pairs: two for each product.
  struct alignas(C::kDepth / 2) Word {
    uint32_t pairs[kMatrices];
  };

  __device__ __forceinline__ void load_int8(uint32_t (&a)[kProducts][4], int place, int i) const {
    struct alignas(4 * kProducts) Int8Word {
      uint32_t values[kProducts];
    };
    const int byte = lane_ % 4 * (C::kDepth / 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = 16 * i + 8 * half + lane_ / 4;
      const Int8Word stored = *reinterpret_cast<const Int8Word*>(
          values_ + place + Values::offset(row, byte / 16) + byte % 16);
#pragma unroll
      for (int h = 0; h < kProducts; ++h) {
        const uint2 pairs = widen_to_pairs<T>(stored.values[h]);
        a[h][half] = pairs.x;
        a[h][2 + half] = pairs.y;
      }
    }
  }
  __device__ __forceinline__ void load_neighbours(uint32_t (&b)[4], int place, int j) const {
    const int byte = lane_ % 4 * static_cast<int>(sizeof(Word));
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const int token = (8 * (j + g) + lane_ / 4) % C::kWarpTokens;
      const Word word = *reinterpret_cast<const Word*>(
          inputs_ + place + Inputs::offset(token, byte / 16) + byte % 16);
#pragma unroll
      for (int k = 0; k < kMatrices; ++k) b[g * kMatrices + k] = word.pairs[k];
    }
  }

  const unsigned char* values_;
  const unsigned char* inputs_;
  const int lane_;
  uint32_t values_from_;  // what this lane gives the address of
  uint32_t inputs_from_;
};

// Float: a lane multiplies for its own sums alone, four inputs at a time.
template <class C>
  requires(sizeof(typename C::T) == 4)
class Multiply<C> {
 public:
  __device__ Multiply(const unsigned char* values, const unsigned char* inputs, int lane)
      : values_(values), inputs_(inputs), lane_(lane) {}

  __device__ __forceinline__ void add_to(Sums<C>& sums, int place, int inside) const {
#pragma unroll
    for (int k = 0; k < C::kDepth; k += 4) {
      if (k >= inside) break;
      float4 w[2 * C::kHigh];
#pragma unroll
      for (int i = 0; i < 2 * C::kHigh; ++i) w[i] = load_w(place, 8 * i + lane_ / 4, k);
#pragma unroll
      for (int j = 0; j < C::kWide; ++j) {
        const int token = 8 * j + lane_ % 4 * 2;
        const float4 x0 = load_x(place, token, k), x1 = load_x(place, token + 1, k);
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

  __device__ __forceinline__ float4 load_x(int place, int token, int k) const {
    return *reinterpret_cast<const float4*>(inputs_ + place + InputTile<C>::offset(token, k / 4));
  }

  __device__ __forceinline__ float4 load_w(int place, int output, int k) const {
    const unsigned char* tile = values_ + place;
    if constexpr (C::kTransposed) {
      const auto one = [&](int row) {
        return *reinterpret_cast<const float*>(tile + Tile<C>::offset(row, output / 4) +
                                               output % 4 * 4);
      };
      return {one(k), one(k + 1), one(k + 2), one(k + 3)};
    } else if constexpr (C::kScaled) {
      return widen_to_floats(
          *reinterpret_cast<const uint32_t*>(tile + Tile<C>::offset(output, k / 16) + k % 16));
    } else {
      return *reinterpret_cast<const float4*>(tile + Tile<C>::offset(output, k / 4));
    }
  }

  const unsigned char* values_;
  const unsigned char* inputs_;
  const int lane_;
};

}  // namespace block_sparse::cuda::skinny
