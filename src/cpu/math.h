// Math: how a dtype is multiplied. Storage is what tensors hold; Packed is what one lane of one
// step of the inner loop multiplies (kDepth stored elements, adjacent in depth); Sum is what
// products are added in. Packed and Sum have the same size, so that a lane is a lane everywhere.
//
// A Math offers: load (one vector of Packed from adjacent Storage), join (from kDepth rows of
// Storage, `stride` apart: element i of each becomes lane i; rows beyond `rows` are zero),
// load_sum, store, stream and multiply_add.
#pragma once

#include "cpu/convert.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

// Multiplied in the type that it is stored in.
template <class T>
struct Plain {
  using Storage = T;
  using Packed = T;
  using Sum = T;
  static constexpr int kDepth = 1;

  BLOCK_SPARSE_INLINE static Vec<Packed> load(const Storage* from) {
    return BLOCK_SPARSE_LEVEL::load(from);
  }
  BLOCK_SPARSE_INLINE static Vec<Packed> load(const Storage* from, int64_t count) {
    return BLOCK_SPARSE_LEVEL::load(from, count);
  }
  BLOCK_SPARSE_INLINE static Vec<Packed> join(const Storage* row, int64_t, int64_t, int64_t count) {
    return count == kLanes<T> ? load(row) : load(row, count);
  }
  BLOCK_SPARSE_INLINE static Vec<Sum> load_sum(const Storage* from, int64_t count) {
    return load(from, count);
  }
  BLOCK_SPARSE_INLINE static void store(Storage* to, Vec<Sum> sum) {
    BLOCK_SPARSE_LEVEL::store(to, sum);
  }
  BLOCK_SPARSE_INLINE static void store(Storage* to, Vec<Sum> sum, int64_t count) {
    BLOCK_SPARSE_LEVEL::store(to, sum, count);
  }
  BLOCK_SPARSE_INLINE static void stream(Storage* to, Vec<Sum> sum) {
    BLOCK_SPARSE_LEVEL::stream(to, sum);
  }
  template <class A>  // a scalar for all lanes, or a vector
  BLOCK_SPARSE_INLINE static Vec<Sum> multiply_add(A a, Vec<Packed> b, Vec<Sum> sum) {
    return sum + a * b;
  }
};

// Stored in sixteen bits, multiplied as float.
template <class T>
struct Widened {
  using Storage = T;
  using Packed = float;
  using Sum = float;
  static constexpr int kDepth = 1;

  BLOCK_SPARSE_INLINE static Vec<Packed> load(const Storage* from) {
    return Convert<T>::widen(load_halves(from));
  }
  BLOCK_SPARSE_INLINE static Vec<Packed> load(const Storage* from, int64_t count) {
    return Convert<T>::widen(load_halves(from, count));
  }
  BLOCK_SPARSE_INLINE static Vec<Packed> join(const Storage* row, int64_t, int64_t, int64_t count) {
    return load(row, count);
  }
  BLOCK_SPARSE_INLINE static Vec<Sum> load_sum(const Storage* from, int64_t count) {
    return load(from, count);
  }
  BLOCK_SPARSE_INLINE static void store(Storage* to, Vec<Sum> sum) { store(to, sum, kLanes<Sum>); }
  BLOCK_SPARSE_INLINE static void stream(Storage* to, Vec<Sum> sum) { store(to, sum); }
  BLOCK_SPARSE_INLINE static void store(Storage* to, Vec<Sum> sum, int64_t count) {
    const Halves halves = Convert<T>::narrow(sum);
    std::memcpy(to, &halves, static_cast<size_t>(count) * sizeof(Storage));
  }
  template <class A>  // a scalar for all lanes, or a vector
  BLOCK_SPARSE_INLINE static Vec<Sum> multiply_add(A a, Vec<Packed> b, Vec<Sum> sum) {
    return sum + a * b;
  }
};

template <class Math>
inline constexpr bool kWidened =
    std::is_same_v<typename Math::Packed, float> && sizeof(typename Math::Storage) == 2;

#ifdef __AVX512BF16__
// bfloat16, two at a time: an instruction multiplies pairs and adds both products to a float.
struct Pairs : Widened<BFloat16> {
  using Packed = uint32_t;
  static constexpr int kDepth = 2;

  BLOCK_SPARSE_INLINE static Vec<Packed> load(const Storage* from) {
    return BLOCK_SPARSE_LEVEL::load(reinterpret_cast<const Packed*>(from));
  }
  BLOCK_SPARSE_INLINE static Vec<Packed> load(const Storage* from, int64_t count) {
    Vec<Packed> vector{};
    std::memcpy(&vector, from, static_cast<size_t>(count) * sizeof(Storage));
    return vector;
  }
  BLOCK_SPARSE_INLINE static Vec<Packed> join(const Storage* row, int64_t stride, int64_t rows,
                                              int64_t count) {
    const Vec<Packed> low = __builtin_convertvector(load_halves(row, count), Vec<Packed>);
    if (rows < 2) return low;
    return low | __builtin_convertvector(load_halves(row + stride, count), Vec<Packed>) << 16;
  }
  template <class A>
  BLOCK_SPARSE_INLINE static Vec<Sum> multiply_add(A a, Vec<Packed> b, Vec<Sum> sum) {
    const Vec<Packed> all = Vec<Packed>{} + a;
    return reinterpret_cast<Vec<Sum>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                       reinterpret_cast<__m512bh>(all),
                                                       reinterpret_cast<__m512bh>(b)));
  }
};
#endif

// One vector of Packed from `count` adjacent values, which are Storage or int8.
template <class Math, class Value>
BLOCK_SPARSE_INLINE Vec<typename Math::Packed> load_values(const Value* from, int64_t count) {
  using Packed = typename Math::Packed;
  if constexpr (std::is_same_v<Value, typename Math::Storage>) {
    return count == kLanes<Packed> * Math::kDepth ? Math::load(from) : Math::load(from, count);
  } else {
    return widen<Packed>(from, count);
  }
}

// The same from Math::kDepth rows of them.
template <class Math, class Value>
BLOCK_SPARSE_INLINE Vec<typename Math::Packed> join_values(const Value* row, int64_t stride,
                                                           int64_t rows, int64_t count) {
  if constexpr (std::is_same_v<Value, typename Math::Storage>) {
    return Math::join(row, stride, rows, count);
  } else {
    static_assert(Math::kDepth == 1);
    return load_values<Math>(row, count);
  }
}

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
