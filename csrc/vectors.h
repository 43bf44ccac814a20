// Vectors of float32 lanes as compilers offer them: arithmetic, comparison and choice by the operators of C++.
//
// Vector<n> has n lanes, a power of two; Vector<1> is a float. Formulas are templates over it, and read the same for one
// number and for sixteen.

#ifndef EMBAX_CSRC_VECTORS_H_
#define EMBAX_CSRC_VECTORS_H_

#include <cstdint>
#include <cstring>

#include "portable.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace embax::EMBAX_ISA {

// Lanes that one instruction handles.
#if defined(__AVX512F__)
constexpr int kVector = 16;
#elif defined(__AVX2__)
constexpr int kVector = 8;
#else
constexpr int kVector = 4;
#endif

template <typename T, int n>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * n)));
};
template <typename T>
struct VectorOf<T, 1> {
  using type = T;
};
template <int n>
using Vector = typename VectorOf<float, n>::type;

// The vectors that hold a strip of `width` numbers.
template <int width>
struct Strip {
  static constexpr int lanes = width < kVector ? width : kVector;
  static constexpr int count = width / lanes;
  using V = Vector<lanes>;
  V part[count];
};

template <typename To, typename From>
EMBAX_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <typename V>
EMBAX_INLINE V read(const void* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

// The same number in every lane.
template <typename V>
EMBAX_INLINE V all(float value) {
  return V{} + value;
}

// The sum of a strip's numbers: number d and number d + half, for halves of width / 2 to 1, whatever the vector width.
template <int width>
EMBAX_INLINE float folded(Strip<width> strip) {
  if constexpr (width == 1) {
    return strip.part[0];
  } else {
    Strip<width / 2> halves[2];
    memcpy(halves, &strip, sizeof halves);
    EMBAX_UNROLL
    for (int i = 0; i < halves[0].count; ++i) halves[0].part[i] += halves[1].part[i];
    return folded(halves[0]);
  }
}

EMBAX_INLINE float root(float x) { return __builtin_sqrtf(x); }
template <typename V>
EMBAX_INLINE V root(V x) {
  for (unsigned lane = 0; lane < sizeof(V) / 4; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
}
#if defined(__SSE2__)
template <>
EMBAX_INLINE Vector<4> root(Vector<4> x) {
  return _mm_sqrt_ps(x);
}
#elif defined(__aarch64__)
template <>
EMBAX_INLINE Vector<4> root(Vector<4> x) {
  return bits_as<Vector<4>>(vsqrtq_f32(bits_as<float32x4_t>(x)));
}
#endif
#if defined(__AVX2__)
template <>
EMBAX_INLINE Vector<8> root(Vector<8> x) {
  return _mm256_sqrt_ps(x);
}
#endif
#if defined(__AVX512F__)
template <>
EMBAX_INLINE Vector<16> root(Vector<16> x) {
  return _mm512_sqrt_ps(x);
}
#endif

EMBAX_INLINE float power(float x, float exponent) { return __builtin_powf(x, exponent); }
template <typename V>
EMBAX_INLINE V power(V x, float exponent) {
  for (unsigned lane = 0; lane < sizeof(V) / 4; ++lane) x[lane] = __builtin_powf(x[lane], exponent);
  return x;
}

}  // namespace embax::EMBAX_ISA

#endif  // EMBAX_CSRC_VECTORS_H_
