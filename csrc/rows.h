// Strips of rows: `width` neighbouring numbers of a stored row as float32, and back.
//
// Tables hold float32, bfloat16 or float16; every sum and every formula is float32.

#ifndef EMBAX_CSRC_ROWS_H_
#define EMBAX_CSRC_ROWS_H_

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "numbers.h"
#include "vectors.h"

namespace embax::EMBAX_ISA {

// The next lanes of a row, as float32.
template <typename V>
EMBAX_INLINE V load_vector(const float* from) {
  return read<V>(from);
}

template <typename V>
EMBAX_INLINE V load_vector(const BFloat16* from) {
  constexpr int n = sizeof(V) / 4;
#if defined(__AVX512F__)
  if constexpr (n == 16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(from)), 16));
  }
#endif
#if defined(__AVX2__)
  // Compilers widen 16 bits in two halves, which costs a third of a gather's speed.
  if constexpr (n == 8) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(from)), 16));
  }
#endif
  if constexpr (n == 1) {
    return widened(*from);
  } else {
    const auto narrow = read<typename VectorOf<uint16_t, n>::type>(from);
    return bits_as<V>(__builtin_convertvector(narrow, typename VectorOf<uint32_t, n>::type) << 16);
  }
}

template <typename V>
EMBAX_INLINE V load_vector(const Float16* from) {
  constexpr int n = sizeof(V) / 4;
#if defined(__AVX512F__)
  if constexpr (n == 16) return _mm512_cvtph_ps(read<__m256i>(from));
#endif
#if defined(__F16C__)
  if constexpr (n == 8) return _mm256_cvtph_ps(read<__m128i>(from));
#endif
  float values[n];
  for (int d = 0; d < n; ++d) values[d] = widened(from[d]);
  return read<V>(values);
}

template <typename V>
EMBAX_INLINE void store_vector(const V& from, float* to) {
  memcpy(to, &from, sizeof from);
}

template <typename V>
EMBAX_INLINE void store_vector(const V& from, BFloat16* to) {
  constexpr int n = sizeof(V) / 4;
  if constexpr (n == 1) {
    *to = narrowed(from, BFloat16{});
  } else {
    using U = typename VectorOf<uint32_t, n>::type;
    const U bits = bits_as<U>(from);
    const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const U nan = (bits >> 16) | 0x40;
    const U result = (bits & 0x7fffffff) > 0x7f800000 ? nan : rounded;
    const auto narrow = __builtin_convertvector(result, typename VectorOf<uint16_t, n>::type);
    memcpy(static_cast<void*>(to), &narrow, sizeof narrow);
  }
}

template <typename V>
EMBAX_INLINE void store_vector(const V& from, Float16* to) {
  constexpr int n = sizeof(V) / 4;
#if defined(__F16C__)
  if constexpr (n == 8) {
    const __m128i narrow = _mm256_cvtps_ph(from, 0);
    memcpy(static_cast<void*>(to), &narrow, sizeof narrow);
    return;
  }
#endif
#if defined(__AVX512F__)
  if constexpr (n == 16) {
    const __m256i narrow = _mm512_cvtps_ph(from, 0);
    memcpy(static_cast<void*>(to), &narrow, sizeof narrow);
    return;
  }
#endif
  float values[n];
  memcpy(values, &from, sizeof from);
  for (int d = 0; d < n; ++d) to[d] = narrowed(values[d], Float16{});
}

template <int width, typename T>
EMBAX_INLINE Strip<width> load_strip(const T* from) {
  Strip<width> strip;
  EMBAX_UNROLL
  for (int i = 0; i < strip.count; ++i) {
    strip.part[i] = load_vector<typename Strip<width>::V>(from + i * strip.lanes);
  }
  return strip;
}

template <int width, typename T>
EMBAX_INLINE void store_strip(const Strip<width>& strip, T* to) {
  EMBAX_UNROLL
  for (int i = 0; i < strip.count; ++i) store_vector(strip.part[i], to + i * strip.lanes);
}

template <int width, typename T>
EMBAX_INLINE void store_at_random(const Strip<width>& strip, T* to, uint32_t row_seed, int64_t column) {
  float values[width];
  memcpy(values, &strip, sizeof values);
  for (int d = 0; d < width; ++d) to[d] = rounded_at_random(values[d], random_bits(row_seed, column + d), T{});
}

// Stores a strip at `column` of an array of any of the dtypes.
template <int width>
EMBAX_INLINE void store_as(Dtype dtype, const Strip<width>& from, void* to, int64_t column) {
  if (dtype == Dtype::kFloat32) {
    store_strip(from, static_cast<float*>(to) + column);
  } else if (dtype == Dtype::kBFloat16) {
    store_strip(from, static_cast<BFloat16*>(to) + column);
  } else {
    store_strip(from, static_cast<Float16*>(to) + column);
  }
}

// Loads a strip at `column` of an array of any of the dtypes.
template <int width>
EMBAX_INLINE Strip<width> load_as(Dtype dtype, const void* from, int64_t column) {
  if (dtype == Dtype::kFloat32) return load_strip<width>(static_cast<const float*>(from) + column);
  if (dtype == Dtype::kBFloat16) return load_strip<width>(static_cast<const BFloat16*>(from) + column);
  return load_strip<width>(static_cast<const Float16*>(from) + column);
}

// A width known to the compiler, as a value.
template <int n>
struct Width {
  static constexpr int value = n;
};

// Cuts [0, dim) into strips, as many of `largest` as fit, then 32, 16, ... 1, and calls body(Width<w>{}, column).
template <int largest, typename Body>
EMBAX_INLINE void for_strips(int64_t dim, const Body& body) {
  int64_t column = 0;
  for (; dim - column >= largest; column += largest) body(Width<largest>{}, column);
  const int64_t rest = dim - column;
  if constexpr (largest > 32) {
    if (rest & 32) body(Width<32>{}, column), column += 32;
  }
  if constexpr (largest > 16) {
    if (rest & 16) body(Width<16>{}, column), column += 16;
  }
  if (rest & 8) body(Width<8>{}, column), column += 8;
  if (rest & 4) body(Width<4>{}, column), column += 4;
  if (rest & 2) body(Width<2>{}, column), column += 2;
  if (rest & 1) body(Width<1>{}, column);
}

constexpr int64_t kCacheLine = 64;
// The most of a row to ask memory for: the hardware follows a longer row by itself.
constexpr int64_t kPrefetchBytes = 1024;

// Asks for rows of an array ahead of their use.
struct Ahead {
  const char* data;
  int64_t bytes;
  int64_t asked;    // of them, whole lines
  int64_t places;   // between asking for a row of a gather and reading it; for short rows fewer will do
  bool straddles;   // a row may begin inside a line, and end in one more than its size says

  EMBAX_INLINE Ahead(const void* array, int64_t row_bytes)
      : data(static_cast<const char*>(array)),
        bytes(row_bytes),
        asked(row_bytes < kPrefetchBytes ? row_bytes : kPrefetchBytes),
        places(row_bytes <= kCacheLine ? 32 : 48),
        straddles(row_bytes % kCacheLine != 0 &&
                  (row_bytes == 0 || kCacheLine % row_bytes != 0 || reinterpret_cast<uintptr_t>(array) % kCacheLine)) {}

  EMBAX_INLINE bool one_line() const { return bytes <= kCacheLine && !straddles; }
  EMBAX_INLINE void ask(int64_t row) const { ask_at(data + row * bytes); }
  // Few instructions: a request waits for the address of its page, and what is behind it in the processor waits too, so
  // the closer together the requests for different rows, the more of those waits overlap.
  EMBAX_INLINE void ask_at(const char* row) const {
    const char* const end = row + asked;
    const char* at = row;
    for (; end - at >= 4 * kCacheLine; at += 4 * kCacheLine) {
      EMBAX_PREFETCH(at);
      EMBAX_PREFETCH(at + kCacheLine);
      EMBAX_PREFETCH(at + 2 * kCacheLine);
      EMBAX_PREFETCH(at + 3 * kCacheLine);
    }
    for (; at < end; at += kCacheLine) EMBAX_PREFETCH(at);
    if (straddles) EMBAX_PREFETCH(end - 1);
  }
};

}  // namespace embax::EMBAX_ISA

#endif  // EMBAX_CSRC_ROWS_H_
