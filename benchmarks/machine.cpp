// What the machine allows, to hold kernels against: multiply-adds in registers, and reads in order.
// x86-64 with AVX2; compiled and loaded by limits.py.
#include <cstdint>

typedef float Vector __attribute__((vector_size(32)));
typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));

// Multiply-adds that do not wait for each other; returns how many floating-point operations.
extern "C" int64_t multiply_add(int64_t steps) {
  constexpr int kChains = 10;
  const Vector half = Vector{} + 0.5f;
  // Named, or the compiler keeps them in memory.
  Vector a = half, b = half, c = half, d = half, e = half, f = half, g = half, h = half, i = half,
         j = half;
  for (int64_t step = 0; step < steps; ++step) {
    a = a * half + half, b = b * half + half, c = c * half + half, d = d * half + half;
    e = e * half + half, f = f * half + half, g = g * half + half, h = h * half + half;
    i = i * half + half, j = j * half + half;
    asm volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d), "+x"(e));  // not folded
    asm volatile("" : "+x"(f), "+x"(g), "+x"(h), "+x"(i), "+x"(j));
  }
  return steps * kChains * 8 * 2;
}

extern "C" float read_all(const float* from, int64_t count) {
  constexpr int kChains = 8, kLanes = 8;
  Vector sum[kChains] = {};
  for (int64_t i = 0; i + kChains * kLanes <= count; i += kChains * kLanes) {
    __builtin_prefetch(from + i + 1024);
    __builtin_prefetch(from + i + 1024 + 16);
    __builtin_prefetch(from + i + 1024 + 32);
    __builtin_prefetch(from + i + 1024 + 48);
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) {
      sum[c] += *reinterpret_cast<const Unaligned*>(from + i + c * kLanes);
    }
  }
  float all = 0;
  for (const Vector& s : sum) all += s[0] + s[7];
  return all;
}
