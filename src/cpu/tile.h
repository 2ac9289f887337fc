// Tile: the inner loop of every product. kRows x (kVectors vectors) of sums stay in registers while
// steps of the depth go by: each step multiplies kRows scalars of the one operand with kVectors
// vectors of the other. Knows nothing of patterns: a caller runs it block after block.
#pragma once

#include <algorithm>

#include "cpu/epilogue.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

// The largest tile: its sums, one step's vectors and a broadcast scalar fill the registers, and a
// step needs fewer loads (rows + vectors) than half its multiplications.
inline constexpr int kTileRows = kRegisters == 32 ? 8 : 4;
inline constexpr int kTileVectors = 3;

// A sum of many terms is made of sums of about so many steps: a long chain of additions rounds
// worse.
inline constexpr int64_t kChainSteps = 128;

// Where the scalars of the one operand are: element (row, step) of a block.
// kAdjacentRows: at step * stride + row; else at row * stride + step.
template <class Packed, bool kAdjacentRows>
struct Scalars {
  const Packed* data;
  int64_t stride;

  BLOCK_SPARSE_INLINE Packed operator()(int row, int64_t step) const {
    return kAdjacentRows ? data[step * stride + row] : data[row * stride + step];
  }
};

// The same, each row somewhere else.
template <class Packed, int kRows>
struct GatheredScalars {
  const Packed* data[kRows];

  BLOCK_SPARSE_INLINE Packed operator()(int row, int64_t step) const { return data[row][step]; }
};

// The same, adjacent rows, each step somewhere else.
template <class Packed>
struct NumberedScalars {
  const Packed* data;
  const int32_t* number;  // of each step
  int64_t stride;

  BLOCK_SPARSE_INLINE Packed operator()(int row, int64_t step) const {
    return data[number[step] * stride + row];
  }
};

// The same, rows a constant apart: they need no register each.
template <class Packed, int kStride, int kRows>
struct Column {
  const Packed* data;
  const Packed* ahead;  // what will be read after a while: kRows rows, one fetched per step

  BLOCK_SPARSE_INLINE Packed operator()(int row, int64_t step) const {
    if (row == 0 && step < kRows) __builtin_prefetch(ahead + step * kStride);
    return data[row * kStride + step];
  }
};

// Where the vectors of the other are: side by side, or (Gathered) each somewhere else.
template <class Packed, int kFetched = 1>
struct Vectors {
  const Packed* data;
  int64_t stride;       // from step to step
  const Packed* ahead;  // what will be read after a while: kFetched vectors of it per step
  int64_t ahead_stride = kLanes<Packed>;

  BLOCK_SPARSE_INLINE Vectors from(int64_t step) const {
    return {data + step * stride, stride, ahead + step * ahead_stride, ahead_stride};
  }
  BLOCK_SPARSE_INLINE Vec<Packed> operator()(int v, int64_t step) const {
    // A line is fetched once.
    if (v < kFetched && v * kVectorBytes % 64 == 0) {
      __builtin_prefetch(ahead + step * ahead_stride + v * kLanes<Packed>);
    }
    return load(data + step * stride + v * kLanes<Packed>);
  }
};
// The same, side by side, each step somewhere else.
template <class Packed>
struct NumberedVectors {
  const Packed* data;
  const int32_t* number;  // of each step
  int64_t stride;

  BLOCK_SPARSE_INLINE Vec<Packed> operator()(int v, int64_t step) const {
    return load(data + number[step] * stride + v * kLanes<Packed>);
  }
};
// Packed values (packed.h): strips of outputs. Those of sixteen bits are widened on the way into
// the registers; of a pair, the halves of a lane are then bfloat16 of two steps.
template <class Math, int kFetched>
struct StripVectors {
  using Storage = typename Math::Storage;
  using Packed = typename Math::Packed;
  static constexpr int kLane = kLanes<Packed>;
  static constexpr int kStrip = 64 / sizeof(Packed);

  const Storage* data;
  const Storage* ahead;
  int64_t depth, pair;  // depth: inputs of a block
  int64_t first = 0;    // step

  BLOCK_SPARSE_INLINE StripVectors from(int64_t step) const {
    if constexpr (kWidened<Math>) return {data, ahead, depth, pair, first + step};
    const int64_t elements = step * kStrip * Math::kDepth;
    return {data + elements, ahead + elements, depth, pair};
  }
  BLOCK_SPARSE_INLINE Vec<Packed> operator()(int v, int64_t step) const {
    // Strips as wide as a vector lie apart; of a wider one, the vectors are side by side.
    const int64_t strip = v * kLane / kStrip * depth, lane = v * kLane % kStrip;
    if constexpr (!kWidened<Math>) {
      const int64_t at = strip * kStrip + (step * kStrip + lane) * Math::kDepth;
      if (v < kFetched && lane == 0) __builtin_prefetch(ahead + at);
      return load(reinterpret_cast<const Packed*>(data + at));
    } else {
      const int64_t of_pair = (first + step) & -pair;  // pair is 1 or 2
      const int64_t at = (strip + of_pair) * kStrip + lane * pair;
      if (v < kFetched && lane == 0) __builtin_prefetch(ahead + at);
      if (pair == 1) return Math::load(data + at);
      const Vec<uint32_t> pairs = load(reinterpret_cast<const uint32_t*>(data + at));
      const uint32_t upper = (first + step) & 1;
      return reinterpret_cast<Vec<float>>(pairs << (16 - 16 * upper) & 0xffff0000u);
    }
  }
};
template <class Packed, int kVectors>
struct GatheredVectors {
  const Packed* data[kVectors];
  int64_t stride;
  const Packed* ahead;

  BLOCK_SPARSE_INLINE Vec<Packed> operator()(int v, int64_t step) const {
    if (v == 0) __builtin_prefetch(ahead + step * stride);
    return load(data[v] + step * stride);
  }
};

template <class Math, int kRows, int kVectors>
struct Tile {
  using Sum = typename Math::Sum;
  using Packed = typename Math::Packed;
  static constexpr int kWidth = kVectors * kLanes<Sum>;
  // Few sums cannot hide the latency of an addition: they are kept in several sets.
  static constexpr int kSets = kRows * kVectors >= 8 ? 1 : kRows * kVectors >= 4 ? 2 : 4;

  Vec<Sum> sums[kSets][kRows][kVectors] = {};

  template <class Scalars, class Vectors>
  BLOCK_SPARSE_INLINE void multiply(const Scalars& scalars, const Vectors& vectors, int64_t steps) {
    int64_t step = 0;
    for (; step + kSets <= steps; step += kSets) {
#pragma GCC unroll 4
      for (int set = 0; set < kSets; ++set) multiply_step(sums[set], scalars, vectors, step + set);
    }
    for (; step < steps; ++step) multiply_step(sums[0], scalars, vectors, step);
  }

  BLOCK_SPARSE_INLINE void add(const Sum* from, int64_t stride) {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[0][row][v] += BLOCK_SPARSE_LEVEL::load(from + row * stride + v * kLanes<Sum>);
      }
    }
  }

  // Adds the sums to those that are there, row after row, `stride` elements apart; `first`: none
  // are there yet.
  BLOCK_SPARSE_INLINE void add_to(Sum* to, int64_t stride, bool first) const {
    for_each([&](int row, int v, Vec<Sum> sum) BLOCK_SPARSE_INLINE_LAMBDA {
      Sum* at = to + row * stride + v * kLanes<Sum>;
      BLOCK_SPARSE_LEVEL::store(at, first ? sum : sum + BLOCK_SPARSE_LEVEL::load(at));
    });
  }

  // f(row, vector, sum)
  template <class F>
  BLOCK_SPARSE_INLINE void for_each(const F& f) const {
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Vec<Sum> sum = sums[0][row][v];
#pragma GCC unroll 4
        for (int set = 1; set < kSets; ++set) sum += sums[set][row][v];
        f(row, v, sum);
      }
    }
  }

 private:
  template <class Scalars, class Vectors>
  BLOCK_SPARSE_INLINE static void multiply_step(Vec<Sum> (&sum)[kRows][kVectors],
                                                const Scalars& scalars, const Vectors& vectors,
                                                int64_t step) {
    Vec<Packed> b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = vectors(v, step);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      const Packed a = scalars(row, step);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[row][v] = Math::multiply_add(a, b[v], sum[row][v]);
    }
  }
};

// The sums of a tile as rows of the `count` outputs from `output` on; `past_caches` needs whole,
// aligned lines where `count` is whole.
template <class Math, int kRows, int kVectors, class Value>
BLOCK_SPARSE_INLINE void store_rows(const Tile<Math, kRows, kVectors>& tile,
                                    typename Math::Storage* to, int64_t stride, int64_t output,
                                    int64_t count, const OutputEpilogue<Math, Value>& epilogue,
                                    bool past_caches) {
  using Sum = typename Math::Sum;
  constexpr int64_t L = kLanes<Sum>;
  const auto left = [&](int v) { return std::clamp<int64_t>(count - v * L, 0, L); };
  const auto at = [&](int row, int v) { return to + row * stride + v * L; };
  typename OutputEpilogue<Math, Value>::Lanes finish[kVectors];
  for (int v = 0; v < kVectors; ++v) finish[v] = epilogue.lanes(output + v * L, left(v));
  if (count < kVectors * L) {
    tile.for_each([&](int row, int v, Vec<Sum> sum) BLOCK_SPARSE_INLINE_LAMBDA {
      Math::store(at(row, v), finish[v](sum), left(v));
    });
  } else if (past_caches) {
    tile.for_each([&](int row, int v, Vec<Sum> sum)
                      BLOCK_SPARSE_INLINE_LAMBDA { Math::stream(at(row, v), finish[v](sum)); });
  } else {
    tile.for_each([&](int row, int v, Vec<Sum> sum)
                      BLOCK_SPARSE_INLINE_LAMBDA { Math::store(at(row, v), finish[v](sum)); });
  }
}

// Calls f(std::integral_constant<int, n>) with the run-time n in [1, kMax].
template <int kMax, class F>
BLOCK_SPARSE_INLINE void with_constant(int64_t n, const F& f) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_constant<kMax - 1>(n, f);
  }
  f(std::integral_constant<int, kMax>());
}

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
