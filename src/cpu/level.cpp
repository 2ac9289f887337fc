// Compiled once per instruction set level, with the flags of that level and BLOCK_SPARSE_LEVEL as
// its name. Everything instantiated here lives in a namespace of that name: the linker keeps one
// copy of a function that several files define, and a copy with AVX-512 in it must never be the one
// that the rest of the library calls.
#include "cpu/level.h"

#include "cpu/sddmm.h"
#include "cpu/spmm.h"

#define BLOCK_SPARSE_STRING_(name) #name
#define BLOCK_SPARSE_STRING(name) BLOCK_SPARSE_STRING_(name)

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {
namespace {

bool supported() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

// Calls f with the Math that a dtype is multiplied with.
template <class F>
auto with_math(Dtype dtype, const F& f) {
  return dtype == Dtype::f64 ? f(Plain<double>()) : f(Plain<float>());
}

// Calls f with an object of the class that computes a product in one dtype.
template <class F>
auto with_routine(const ProductDesc& desc, const F& f) {
  return with_math(desc.dtype, [&](auto math) {
    using Math = decltype(math);
    switch (desc.product) {
      case Product::forward:
        return f(std::type_identity<Spmm<Math, Product::forward>>());
      case Product::grad_input:
        return f(std::type_identity<Spmm<Math, Product::grad_input>>());
      case Product::grad_weight:
        break;
    }
    return f(std::type_identity<Sddmm<Math>>());
  });
}

int64_t workspace(const ProductDesc& desc, const Execution& execution) {
  return with_routine(
      desc, [&](auto routine) { return decltype(routine)::type::workspace(desc, execution); });
}

void run(const ProductDesc& desc, const ProductArgs& args, const Execution& execution) {
  with_routine(desc, [&](auto routine) { decltype(routine)::type::run(desc, args, execution); });
}

}  // namespace

extern const Level level;
const Level level{BLOCK_SPARSE_STRING(BLOCK_SPARSE_LEVEL), supported, workspace, run};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
