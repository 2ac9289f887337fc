// Whether this machine runs the instructions that the including file is compiled for: asked by a
// level when it is chosen, and by cmake/cpu_levels.cmake before it builds one for this machine
// only.
#pragma once

namespace block_sparse::cpu {
namespace {

// Everything that cmake/cpu_levels.cmake lets the compiler use.
bool supported() {
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return false;
  }
#endif
#if defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
#else
  return true;
#endif
}

}  // namespace
}  // namespace block_sparse::cpu
