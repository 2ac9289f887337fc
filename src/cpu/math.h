// Math: how a dtype is multiplied. Storage is what tensors hold; Packed is what one lane of one
// step of the inner loop multiplies (kDepth stored elements); Sum is what products are added in.
// Packed and Sum have the same size, so that a lane is a lane everywhere.
#pragma once

#include "block_sparse/dtype.h"
#include "cpu/simd.h"

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
  BLOCK_SPARSE_INLINE static Vec<Sum> load_sum(const Storage* from, int64_t count) {
    return BLOCK_SPARSE_LEVEL::load(from, count);
  }
  BLOCK_SPARSE_INLINE static void store(Storage* to, Vec<Sum> sum) {
    BLOCK_SPARSE_LEVEL::store(to, sum);
  }
  BLOCK_SPARSE_INLINE static void store(Storage* to, Vec<Sum> sum, int64_t count) {
    BLOCK_SPARSE_LEVEL::store(to, sum, count);
  }
  BLOCK_SPARSE_INLINE static Vec<Sum> multiply_add(Packed a, Vec<Packed> b, Vec<Sum> sum) {
    return sum + a * b;
  }
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
