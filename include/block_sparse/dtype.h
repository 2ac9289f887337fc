// Element types: one row per dtype. Not a tensor library: a kernel is a template on the storage
// type, and `visit` turns the run-time Dtype into that type.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "block_sparse/host_device.h"

namespace block_sparse {

// Sixteen-bit types are storage only: arithmetic happens in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// clang-format off
//   X(name, storage, accumulate)  -- accumulate: the type a kernel sums in
#define BLOCK_SPARSE_DTYPES(X) \
  X(f64,  double,   double)    \
  X(f32,  float,    float)     \
  X(bf16, BFloat16, float)     \
  X(f16,  Float16,  float)
// clang-format on

enum class Dtype : uint8_t {
#define BLOCK_SPARSE_ENUM(name, storage, accumulate) name,
  BLOCK_SPARSE_DTYPES(BLOCK_SPARSE_ENUM)
#undef BLOCK_SPARSE_ENUM
};

template <class T>
struct Traits;

#define BLOCK_SPARSE_TRAITS(name, storage, accumulate) \
  template <>                                          \
  struct Traits<storage> {                             \
    static constexpr Dtype dtype = Dtype::name;        \
    using Accumulate = accumulate;                     \
  };
BLOCK_SPARSE_DTYPES(BLOCK_SPARSE_TRAITS)
#undef BLOCK_SPARSE_TRAITS

constexpr std::string_view to_string(Dtype dtype) {
  switch (dtype) {
#define BLOCK_SPARSE_NAME(name, storage, accumulate) \
  case Dtype::name:                                  \
    return #name;
    BLOCK_SPARSE_DTYPES(BLOCK_SPARSE_NAME)
#undef BLOCK_SPARSE_NAME
  }
  return "?";
}

// Calls f(std::type_identity<storage>{}) for the storage type of `dtype`.
template <class F>
constexpr auto visit(Dtype dtype, F&& f) {
  switch (dtype) {
#define BLOCK_SPARSE_CASE(name, storage, accumulate) \
  case Dtype::name:                                  \
    return f(std::type_identity<storage>{});
    BLOCK_SPARSE_DTYPES(BLOCK_SPARSE_CASE)
#undef BLOCK_SPARSE_CASE
  }
  __builtin_unreachable();
}

constexpr int64_t size_of(Dtype dtype) {
  return visit(dtype, [](auto type) -> int64_t { return sizeof(typename decltype(type)::type); });
}

// Conversions, round to nearest even. `load` widens one stored element, `store` narrows one sum.
template <class A>
BLOCK_SPARSE_HOST_DEVICE inline A load(double value) {
  return static_cast<A>(value);
}
template <class A>
BLOCK_SPARSE_HOST_DEVICE inline A load(float value) {
  return static_cast<A>(value);
}
template <class A>
BLOCK_SPARSE_HOST_DEVICE inline A load(int8_t value) {  // no Dtype: weights only, as `int8` says
  return static_cast<A>(value);
}
template <class A>
BLOCK_SPARSE_HOST_DEVICE inline A load(BFloat16 value) {
  return static_cast<A>(std::bit_cast<float>(uint32_t{value.bits} << 16));
}
template <class A>
BLOCK_SPARSE_HOST_DEVICE inline A load(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in float
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return static_cast<A>(sign != 0 ? -magnitude : magnitude);
  }
  const uint32_t wide = exponent == 31 ? 0xffu : exponent + (127 - 15);
  return static_cast<A>(std::bit_cast<float>(sign | (wide << 23) | (mantissa << 13)));
}

// The bits of a float on the way to 16 bits. Rounding to nearest twice can be wrong, so what is
// inexact is rounded to odd (towards zero, last bit set): the second rounding sees through that.
BLOCK_SPARSE_HOST_DEVICE inline uint32_t float_bits_to_odd(double value) {
  const auto nearest = static_cast<float>(value);
  const auto bits = std::bit_cast<uint32_t>(nearest);
  if (static_cast<double>(nearest) == value || value != value) return bits;
  const bool away_from_zero = (static_cast<double>(nearest) > value) == (value > 0);
  return (away_from_zero ? bits - 1 : bits) | 1u;
}

template <class T>
BLOCK_SPARSE_HOST_DEVICE inline T store(double value) {
  if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(value);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t bits = float_bits_to_odd(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN stays NaN: rounding could carry into infinity
      return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
    }
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  } else {
    const uint32_t bits = float_bits_to_odd(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      return {static_cast<uint16_t>(sign | 0x7e00u)};
    }
    if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
      return {static_cast<uint16_t>(sign | 0x7c00u)};
    }
    if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at the last subnormal bit
      const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
      return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(aligned) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
  }
}

}  // namespace block_sparse
