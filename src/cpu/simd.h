// Vectors of one instruction set level: load, store, transpose. Compiled once per level, inside a
// namespace of its own (level.cpp says why). Written with the compiler's vector extensions, so that
// one source serves every width. Knows nothing of blocks or products.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define BLOCK_SPARSE_INLINE __attribute__((always_inline)) inline
#define BLOCK_SPARSE_INLINE_LAMBDA __attribute__((always_inline))

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 32;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Unaligned, all lanes.
template <class T>
BLOCK_SPARSE_INLINE Vec<T> load(const T* from) {
  Vec<T> vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}
template <class T>
BLOCK_SPARSE_INLINE void store(T* to, Vec<T> vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

// Past the caches, for what is written once and is too large to stay: it saves reading the line
// first. Aligned. Where a vector is no whole cache line, an ordinary store.
template <class T>
BLOCK_SPARSE_INLINE void stream(T* to, Vec<T> vector) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(vector));
#else
  store(to, vector);
#endif
}

// After streaming and before another thread may look.
BLOCK_SPARSE_INLINE void end_of_stream() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// The first `count` lanes only; the others load as zero and are not stored.
template <class T>
BLOCK_SPARSE_INLINE Vec<T> load(const T* from, int64_t count) {
  if (count == kLanes<T>) return load(from);
  Vec<T> vector{};
  std::memcpy(&vector, from, static_cast<size_t>(count) * sizeof(T));
  return vector;
}
template <class T>
BLOCK_SPARSE_INLINE void store(T* to, Vec<T> vector, int64_t count) {
  if (count == kLanes<T>) return store(to, vector);
  std::memcpy(to, &vector, static_cast<size_t>(count) * sizeof(T));
}

// Lane i of the result is lane choose(i) of `first` followed by `second`.
template <class T, class Choose>
BLOCK_SPARSE_INLINE Vec<T> shuffle(Vec<T> first, Vec<T> second, Choose choose) {
  return [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(first, second, choose(i)...);
  }(std::make_integer_sequence<int, kLanes<T>>());
}

template <class T, int kHalf = kLanes<T> / 2>
BLOCK_SPARSE_INLINE T add_lanes(Vec<T> vector) {
  if constexpr (kHalf == 0) {
    return vector[0];
  } else {
    const auto upper = [](int lane) constexpr { return (lane + kHalf) % kLanes<T>; };
    return add_lanes<T, kHalf / 2>(vector + shuffle<T>(vector, vector, upper));
  }
}

// Two rows of a transpose: `choose_first` makes the one that stays at i, `choose_second` the other.
template <class T, int kStep, class First, class Second>
BLOCK_SPARSE_INLINE void transpose_step(Vec<T> (&rows)[kLanes<T>], First choose_first,
                                        Second choose_second) {
#pragma GCC unroll 64
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((i & kStep) != 0) continue;
    const Vec<T> first = rows[i], second = rows[i + kStep];
    rows[i] = shuffle<T>(first, second, choose_first);
    rows[i + kStep] = shuffle<T>(first, second, choose_second);
  }
}

// Rows to columns, in registers. Inside 16-byte groups elements are interleaved, then whole groups
// are dealt out: both are single, cheap instructions on every level.
template <class T, int kStep = 8 / sizeof(T)>
BLOCK_SPARSE_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int L = kLanes<T>, kGroup = 16 / sizeof(T);
  if constexpr (kStep < kGroup) {
    const auto lower = [](int lane) constexpr {
      return lane % 2 * L + lane / kGroup * kGroup + lane % kGroup / 2;
    };
    transpose_step<T, kStep>(rows, lower, [=](int lane) { return lower(lane) + kGroup / 2; });
    transpose<T, kStep == 1 ? kGroup : kStep / 2>(rows);
  } else if constexpr (kStep < L) {
    const auto even = [](int lane) constexpr { return lane / kGroup * 2 * kGroup + lane % kGroup; };
    transpose_step<T, kStep>(rows, even, [=](int lane) { return even(lane) + kGroup; });
    transpose<T, kStep * 2>(rows);
  }
}

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
