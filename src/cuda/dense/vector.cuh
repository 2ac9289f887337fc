// Vector: as many elements as are moved at once, and how a stored value becomes one of them.
#pragma once

#include <cstdint>
#include <type_traits>

#include "block_sparse/dtype.h"

namespace block_sparse::cuda::dense_weight {

template <class T>
constexpr int kUnitOf = 16 / static_cast<int>(sizeof(T));

template <class T, int kElements>
struct alignas(sizeof(T) * kElements) Vector {
  T of[kElements];
};

// int8 values are multiplied by the scale of their output and rounded to T, as a layer that is
// dequantized has them.
template <class T, class Value>
__device__ T widened(Value value, float scale) {
  if constexpr (std::is_same_v<T, Value>) {
    return value;
  } else {
    using Sum = typename Traits<T>::Accumulate;
    return store<T>(load<Sum>(value) * static_cast<Sum>(scale));
  }
}

__device__ inline int64_t clamp(int64_t value, int64_t most) {
  return value < 0 ? 0 : value < most ? value : most;
}

}  // namespace block_sparse::cuda::dense_weight
