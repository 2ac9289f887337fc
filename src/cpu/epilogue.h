// Epilogue: what happens to sums before they are stored, with outputs as lanes. It stores nothing.
#pragma once

#include "block_sparse/product.h"
#include "cpu/math.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

// y = sum + bias, and where values are int8: y = scale * sum + bias.
template <class Math, class Value = typename Math::Storage>
struct OutputEpilogue {
  using Storage = typename Math::Storage;
  using Sum = typename Math::Sum;
  static constexpr bool kScaled = std::is_same_v<Value, int8_t>;

  const float* scales;  // [outputs], where kScaled
  const Storage* bias;  // [outputs], or null

  static OutputEpilogue of(const ProductDesc& desc, const ProductArgs& args) {
    return {args.weight.scales,
            desc.epilogue == Epilogue::bias ? static_cast<const Storage*>(args.bias) : nullptr};
  }

  // Of the `count` outputs from `output` on.
  struct Lanes {
    Vec<Sum> scale{}, bias{};

    BLOCK_SPARSE_INLINE Vec<Sum> operator()(Vec<Sum> sum) const {
      if constexpr (kScaled) return sum * scale + bias;
      return sum + bias;
    }
  };
  BLOCK_SPARSE_INLINE Lanes lanes(int64_t output, int64_t count) const {
    Lanes lanes;
    if constexpr (kScaled) lanes.scale = widen<Sum>(scales + output, count);
    if (bias != nullptr) lanes.bias = Math::load_sum(bias + output, count);
    return lanes;
  }
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
