// Narrow elements to vectors that are multiplied: sixteen-bit floats to float and back, rounding to
// nearest even as dtype.h does; int8 to any.
#pragma once

#include "block_sparse/dtype.h"
#include "cpu/simd.h"

namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL {

// As many int8 or floats as a vector of T has lanes.
template <class T>
struct NarrowOf {
  typedef int8_t Bytes __attribute__((vector_size(kLanes<T>)));
  typedef float Floats __attribute__((vector_size(kLanes<T> * 4)));
};

template <class T>
BLOCK_SPARSE_INLINE Vec<T> widen(typename NarrowOf<T>::Bytes bytes) {
  return __builtin_convertvector(bytes, Vec<T>);
}
// One instruction, or two, which the compiler does not find.
template <>
BLOCK_SPARSE_INLINE Vec<float> widen<float>(NarrowOf<float>::Bytes bytes) {
#if defined(__AVX512F__)
  const __m512i words = _mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(bytes));
#elif defined(__AVX2__)
  const __m256i words = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(reinterpret_cast<int64_t>(bytes)));
#elif defined(__aarch64__)
  const int8x8_t twice = vreinterpret_s8_s32(vdup_n_s32(reinterpret_cast<int32_t>(bytes)));
  const int32x4_t words = vmovl_s16(vget_low_s16(vmovl_s8(twice)));
#else
  const Vec<int32_t> words = __builtin_convertvector(bytes, Vec<int32_t>);
#endif
  return __builtin_convertvector(reinterpret_cast<Vec<int32_t>>(words), Vec<float>);
}

// The first `count` lanes; the others are zero.
template <class T>
BLOCK_SPARSE_INLINE Vec<T> widen(const int8_t* from, int64_t count) {
  typename NarrowOf<T>::Bytes bytes{};
  if (count == kLanes<T>) {
    std::memcpy(&bytes, from, sizeof(bytes));
  } else {
    std::memcpy(&bytes, from, static_cast<size_t>(count));
  }
  return widen<T>(bytes);
}
template <class T>
BLOCK_SPARSE_INLINE Vec<T> widen(const float* from, int64_t count) {
  typename NarrowOf<T>::Floats floats{};
  std::memcpy(&floats, from, static_cast<size_t>(count) * sizeof(float));
  return __builtin_convertvector(floats, Vec<T>);
}

// As many sixteen-bit elements as a vector has floats.
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));

BLOCK_SPARSE_INLINE Halves load_halves(const void* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return halves;
}
BLOCK_SPARSE_INLINE Halves load_halves(const void* from, int64_t count) {
  if (count == kLanes<float>) return load_halves(from);
  Halves halves{};
  std::memcpy(&halves, from, static_cast<size_t>(count) * sizeof(uint16_t));
  return halves;
}

template <class T>
struct Convert;

template <>
struct Convert<BFloat16> {
  BLOCK_SPARSE_INLINE static Vec<float> widen(Halves halves) {
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(halves, Vec<uint32_t>) << 16);
  }
  BLOCK_SPARSE_INLINE static Halves narrow(Vec<float> vector) {
    const Vec<uint32_t> bits = reinterpret_cast<Vec<uint32_t>>(vector);
    const Vec<uint32_t> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    // NaN stays NaN: rounding could carry into infinity.
    const Vec<uint32_t> quiet = (bits >> 16) | 0x40u;
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded, Halves);
  }
};

template <>
struct Convert<Float16> {
#if defined(__AVX512F__)
  BLOCK_SPARSE_INLINE static Vec<float> widen(Halves halves) {
    return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(halves)));
  }
  BLOCK_SPARSE_INLINE static Halves narrow(Vec<float> vector) {
    return reinterpret_cast<Halves>(
        _mm512_cvtps_ph(reinterpret_cast<__m512>(vector), _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__F16C__)
  BLOCK_SPARSE_INLINE static Vec<float> widen(Halves halves) {
    return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(halves)));
  }
  BLOCK_SPARSE_INLINE static Halves narrow(Vec<float> vector) {
    return reinterpret_cast<Halves>(
        _mm256_cvtps_ph(reinterpret_cast<__m256>(vector), _MM_FROUND_TO_NEAREST_INT));
  }
#elif defined(__aarch64__)
  BLOCK_SPARSE_INLINE static Vec<float> widen(Halves halves) {
    return reinterpret_cast<Vec<float>>(vcvt_f32_f16(reinterpret_cast<float16x4_t>(halves)));
  }
  BLOCK_SPARSE_INLINE static Halves narrow(Vec<float> vector) {
    return reinterpret_cast<Halves>(vcvt_f16_f32(reinterpret_cast<float32x4_t>(vector)));
  }
#else
  // No instruction for it: the portable conversion, lane by lane.
  BLOCK_SPARSE_INLINE static Vec<float> widen(Halves halves) {
    Vec<float> vector;
    for (int i = 0; i < kLanes<float>; ++i) {
      vector[i] = block_sparse::load<float>(Float16{halves[i]});
    }
    return vector;
  }
  BLOCK_SPARSE_INLINE static Halves narrow(Vec<float> vector) {
    Halves halves;
    for (int i = 0; i < kLanes<float>; ++i) {
      halves[i] = block_sparse::store<Float16>(static_cast<double>(vector[i])).bits;
    }
    return halves;
  }
#endif
};

}  // namespace block_sparse::cpu::BLOCK_SPARSE_LEVEL
