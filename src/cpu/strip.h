// Strip: some tokens of a dense operand with the tokens as lanes, [depth][tokens], which is what
// lets one kernel serve every block shape: the vectors never run along a block. Packing a strip is
// a transpose, and so is writing one back. Not for few tokens: lanes beyond the last are wasted.
#pragma once

#include "block_sparse/matrix.h"
#include "cpu/epilogue.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

// Loads `rows` (at most lanes) rows of `count` elements, the rest zero, and transposes them.
template <class Math, class Value>
BLOCK_SPARSE_INLINE void load_transposed(
    const Value* from, int64_t stride, int64_t rows, int64_t count,
    Vec<typename Math::Packed> (&square)[kLanes<typename Math::Packed>]) {
  using Packed = typename Math::Packed;
  constexpr int L = kLanes<Packed>;
  if (rows == L && count == L * Math::kDepth) {
#pragma GCC unroll 64
    for (int i = 0; i < L; ++i) {
      // So many rows side by side are more streams than the hardware follows.
      __builtin_prefetch(from + i * stride + 4 * L * Math::kDepth);
      square[i] = load_values<Math>(from + i * stride, L * Math::kDepth);
    }
  } else {
    for (int i = 0; i < L; ++i) {
      square[i] = i < rows ? load_values<Math>(from + i * stride, count) : Vec<Packed>{};
    }
  }
  transpose<Packed>(square);
}

// [tokens][features] -> [features / kDepth][kWidth]; tokens beyond the last become zero.
template <class Math, class Value>
void pack_strip(const Value* from, int64_t stride, int64_t tokens, int64_t features,
                typename Math::Packed* to, int64_t width) {
  using Packed = typename Math::Packed;
  constexpr int L = kLanes<Packed>, kStep = L * Math::kDepth;
  for (int64_t feature = 0; feature < features; feature += kStep) {
    const int64_t count = std::min<int64_t>(kStep, features - feature);
    for (int64_t token = 0; token < width; token += L) {
      Vec<Packed> square[L];
      load_transposed<Math>(from + token * stride + feature, stride,
                            std::clamp<int64_t>(tokens - token, 0, L), count, square);
      Packed* column = to + feature / Math::kDepth * width + token;
      if (count == kStep) {
#pragma GCC unroll 64
        for (int i = 0; i < L; ++i) store(column + i * width, square[i]);
      } else {
        const int64_t depth = (count + Math::kDepth - 1) / Math::kDepth;
        for (int64_t i = 0; i < depth; ++i) store(column + i * width, square[i]);
      }
    }
  }
}

// Whether an output is written past the caches: it is too large to stay there.
template <class Math>
bool streams(MutableDenseView y, int64_t tokens) {
  constexpr int64_t kStreamBytes = 256 << 10;
  constexpr int64_t kElement = sizeof(typename Math::Storage);
  const int64_t row_bytes = y.row_stride * kElement;
  return kLanes<typename Math::Sum> * kElement == 64 && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(y.data) % 64 == 0 && tokens * row_bytes >= kStreamBytes;
}

// Sums [outputs][width] -> [tokens][outputs], after the epilogue of those from `first` on.
template <class Math, bool kStream, class Value>
void unpack_strip(const typename Math::Sum* from, int64_t width, int64_t tokens, int64_t first,
                  int64_t outputs, const OutputEpilogue<Math, Value>& epilogue,
                  typename Math::Storage* to, int64_t stride) {
  using Sum = typename Math::Sum;
  constexpr int L = kLanes<Sum>;
  for (int64_t output = 0; output < outputs; output += L) {
    const int64_t count = std::min<int64_t>(L, outputs - output);
    const auto finish = epilogue.lanes(first + output, count);
    for (int64_t token = 0; token < tokens; token += L) {
      Vec<Sum> square[L];
#pragma GCC unroll 64
      for (int i = 0; i < L; ++i) square[i] = load(from + (output + i) * width + token);
      transpose<Sum>(square);
      typename Math::Storage* row = to + token * stride + output;
      if (tokens - token >= L && count == L) {
#pragma GCC unroll 64
        for (int i = 0; i < L; ++i) {
          if constexpr (kStream) {
            Math::stream(row + i * stride, finish(square[i]));
          } else {
            Math::store(row + i * stride, finish(square[i]));
          }
        }
      } else {
        const int64_t rows = std::min<int64_t>(L, tokens - token);
        for (int64_t i = 0; i < rows; ++i) Math::store(row + i * stride, finish(square[i]), count);
      }
    }
  }
}

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
