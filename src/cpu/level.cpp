// Compiled once per instruction set level, with the flags of that level and BLOCK_SPARSE_LEVEL as
// its name. Everything instantiated here lives in a namespace of that name: the linker keeps one
// copy of a function that several files define, and a copy with AVX-512 in it must never be the one
// that the rest of the library calls.
#include "cpu/level.h"

#include "cpu/few.h"
#include "cpu/panel.h"
#include "cpu/scatter.h"
#include "cpu/sddmm.h"
#include "cpu/spmm.h"
#include "cpu/supported.h"
#include "cpu/thin.h"

#define BLOCK_SPARSE_STRING_(name) #name
#define BLOCK_SPARSE_STRING(name) BLOCK_SPARSE_STRING_(name)

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {
namespace {

// Calls f with the Math that a product is computed in.
template <class F>
auto with_math(const ProductDesc& desc, const F& f) {
  switch (desc.dtype) {
    case Dtype::f64:
      return f(Plain<double>());
    case Dtype::f32:
      return f(Plain<float>());
    case Dtype::f16:
      return f(Widened<Float16>());
    case Dtype::bf16:
      break;
  }
#ifdef __AVX512BF16__
  // Pairs run along the depth and must not straddle its end. (Tokens are padded when packed, but
  // taken one by one for thin blocks.)
  const bool in = desc.block.in % 2 == 0 && desc.in_features % 2 == 0;
  const bool out = desc.block.out % 2 == 0 && desc.out_features % 2 == 0;
  const bool paired = desc.product == Product::grad_weight ? !is_thin(desc.block)
                      : desc.product == Product::forward   ? in
                                                           : out;
  if (paired && !desc.int8) return f(Pairs());
#endif
  return f(Widened<BFloat16>());
}

// Calls f with an element of the type that the values of forward are stored in.
template <class Math, class F>
auto with_value(const ProductDesc& desc, const F& f) {
  if constexpr (Math::kDepth == 1) {
    if (desc.int8) return f(int8_t());
  }
  return f(typename Math::Storage());
}

// Calls f with the class that computes forward or grad_input.
template <class Math, Product kProduct, class Value, class F>
auto with_spmm(const ProductDesc& desc, const F& f) {
  if constexpr (std::is_same_v<Value, typename Math::Sum>) {
    if (has_single_outputs<kProduct>(desc.block)) {
      return f(std::type_identity<Scatter<Math, kProduct>>());
    }
  }
  return f(std::type_identity<Spmm<Math, kProduct, Value>>());
}

// Calls f with an object of the class that computes a product in one dtype.
template <class F>
auto with_routine(const ProductDesc& desc, const F& f) {
  return with_math(desc, [&](auto math) {
    using Math = decltype(math);
    switch (desc.product) {
      case Product::forward:
        return with_value<Math>(desc, [&](auto value) {
          return with_spmm<Math, Product::forward, decltype(value)>(desc, f);
        });
      case Product::grad_input:
        return with_spmm<Math, Product::grad_input, typename Math::Storage>(desc, f);
      case Product::grad_weight:
        break;
    }
    if constexpr (Math::kDepth == 1) {
      if (is_thin(desc.block)) return f(std::type_identity<Thin<Math>>());
    }
    return f(std::type_identity<Sddmm<Math>>());
  });
}

template <class F>
auto with_panel(const ProductDesc& desc, const F& f) {
  return with_math(desc, [&](auto math) {
    using Math = decltype(math);
    if (desc.packed) return f(std::type_identity<Panel<Math, Product::forward, true>>());
    if (desc.product == Product::forward) {
      return with_value<Math>(desc, [&](auto value) {
        return f(std::type_identity<Panel<Math, Product::forward, false, decltype(value)>>());
      });
    }
    return f(std::type_identity<Panel<Math, Product::grad_input>>());
  });
}

template <class F>
auto with_few(const ProductDesc& desc, const F& f) {
  if (desc.product == Product::forward) {
    return with_math(desc, [&](auto math) {
      using Math = decltype(math);
      return with_value<Math>(desc, [&](auto value) {
        return f(std::type_identity<Few<Math, Product::forward, decltype(value)>>());
      });
    });
  }
  if (desc.dtype == Dtype::f64)
    return f(std::type_identity<Few<Plain<double>, Product::grad_input>>());
  return f(std::type_identity<Few<Plain<float>, Product::grad_input>>());
}

constexpr Routine any{
    [](const ProductDesc& desc, const Execution& execution) {
      return with_routine(
          desc, [&](auto routine) { return decltype(routine)::type::workspace(desc, execution); });
    },
    [](const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
      with_routine(desc,
                   [&](auto routine) { decltype(routine)::type::run(desc, args, execution); });
    }};

constexpr Routine panel{
    [](const ProductDesc& desc, const Execution& execution) {
      return with_panel(
          desc, [&](auto routine) { return decltype(routine)::type::workspace(desc, execution); });
    },
    [](const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
      with_panel(desc, [&](auto routine) { decltype(routine)::type::run(desc, args, execution); });
    }};

constexpr Routine few_tokens{
    [](const ProductDesc&, const Execution&) { return int64_t{0}; },
    [](const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
      with_few(desc, [&](auto routine) { decltype(routine)::type::run(desc, args, execution); });
    }};

}  // namespace

extern const Level level;
const Level level{
    BLOCK_SPARSE_STRING(BLOCK_SPARSE_LEVEL), kVectorBytes, supported, any, panel, few_tokens};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
