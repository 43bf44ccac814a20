// Gather and pool from quantized rows: out[s] = sum over j in sample s of gains[j] * (scale * code + bias) of row ids[j].
//
// A row is its scale and its bias (float32, in the byte order of the machine), then its codes. Codes of 8 bits: byte d is
// column d. Codes of 4 bits: byte i holds column i in its lower half and column half + i in its upper half, where half
// is (dim + 1) / 2: neighbouring bytes are neighbouring columns twice over, and nothing needs to be interleaved. A row
// of five columns, a to e:
//
//   8 bits   scale bias | a b c d e          8 + 5 bytes
//   4 bits   scale bias | ad be c-           8 + 3 bytes; the last upper half is not read
//
// So a lookup waits for one place of memory. Rows follow each other without padding: rounded up to 48, 64 or 128 bytes
// they were no faster, but larger (dim 64, a million rows, uniform ids).
//
// The laws of gather_pool.h hold, absent ids and any offsets whatever included. The scales go into the sum of codes one by
// one, the biases are added up apart and come last:
//
//   out[s][d] = (sum over j of (gains[j] * scale) * code[d]) + (sum over j of gains[j] * bias)

#ifndef EMBAX_CSRC_QUANTIZED_H_
#define EMBAX_CSRC_QUANTIZED_H_

#include "gather_pool.h"

namespace embax::EMBAX_ISA {

constexpr int64_t kQuantizedHeader = 2 * sizeof(float);

EMBAX_INLINE const uint8_t* quantized_row(const QuantizedPool& work, int64_t id) {
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(work.rows)) return nullptr;
  return work.data + id * work.width;
}

// The codes of `width` bytes as float32: of whole bytes (bits 8), of their lower halves, or of their upper halves.
enum class Half { kWhole, kLower, kUpper };

template <Half half>
EMBAX_INLINE float code_of(uint8_t byte) {
  const int32_t code = half == Half::kWhole ? byte : half == Half::kLower ? byte & 15 : byte >> 4;
  return static_cast<float>(code);
}

#if defined(__AVX2__)
// Eight bytes, each in a number of its own: compilers take a detour over 16 bits, which costs half of the speed.
template <Half half>
EMBAX_INLINE __m256 eight_codes(const uint8_t* from) {
  __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  if constexpr (half == Half::kLower) bytes = _mm256_and_si256(bytes, _mm256_set1_epi32(15));
  if constexpr (half == Half::kUpper) bytes = _mm256_srli_epi32(bytes, 4);
  return _mm256_cvtepi32_ps(bytes);
}
#endif

#if defined(__AVX512F__)
template <Half half>
EMBAX_INLINE __m512 sixteen_codes(const uint8_t* from) {
  __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  if constexpr (half == Half::kLower) bytes = _mm512_and_si512(bytes, _mm512_set1_epi32(15));
  if constexpr (half == Half::kUpper) bytes = _mm512_srli_epi32(bytes, 4);
  return _mm512_cvtepi32_ps(bytes);
}
#endif

// total[d] += factor * code[d] for `width` bytes of codes.
template <Half half, int width>
EMBAX_INLINE void add_codes(const uint8_t* codes, float factor, float* total) {
#if defined(__AVX512F__)
  if constexpr (width % 16 == 0) {
    for (int d = 0; d < width; d += 16) {
      const __m512 term = _mm512_mul_ps(_mm512_set1_ps(factor), sixteen_codes<half>(codes + d));
      _mm512_storeu_ps(total + d, _mm512_add_ps(_mm512_loadu_ps(total + d), term));
    }
    return;
  }
#endif
#if defined(__AVX2__)
  if constexpr (width % 8 == 0) {
    for (int d = 0; d < width; d += 8) {
      const __m256 term = _mm256_mul_ps(_mm256_set1_ps(factor), eight_codes<half>(codes + d));
      _mm256_storeu_ps(total + d, _mm256_add_ps(_mm256_loadu_ps(total + d), term));
    }
    return;
  }
#endif
  EMBAX_VECTORIZE
  for (int d = 0; d < width; ++d) total[d] += factor * code_of<half>(codes[d]);
}

// Sums the columns of `width` bytes of codes, from byte `place` on, over the positions [begin, end).
template <int bits, int width, bool gained>
EMBAX_INLINE void pool_codes(const QuantizedPool& work, IdsAhead& ahead, int64_t begin, int64_t end, int64_t place,
                             void* out) {
  float low[width] = {}, high[width] = {}, bias_total = 0;
  for (int64_t j = begin; j < end; ++j) {
    if (place == 0) ahead.ask_block(j);
    const uint8_t* row = quantized_row(work, work.ids.ids[j]);
    if (row == nullptr) {
      if (work.ids.offsets == nullptr) bias_total = __builtin_nanf("");
      continue;
    }
    float scale, bias;
    memcpy(&scale, row, sizeof scale);
    memcpy(&bias, row + sizeof scale, sizeof bias);
    if constexpr (gained) {
      scale *= work.ids.gains[j];
      bias *= work.ids.gains[j];
    }
    bias_total += bias;
    const uint8_t* codes = row + kQuantizedHeader + place;
    add_codes<bits == 8 ? Half::kWhole : Half::kLower, width>(codes, scale, low);
    if constexpr (bits == 4) add_codes<Half::kUpper, width>(codes, scale, high);
  }
  for (int d = 0; d < width; ++d) low[d] += bias_total;
  write_strip<width>(work.out_dtype, work.streams, load_strip<width>(low), out, place);
  if constexpr (bits == 4) {
    const int64_t half = (work.dim + 1) / 2;
    if (half + place >= work.dim) return;  // the last byte of an odd number of columns
    for (int d = 0; d < width; ++d) high[d] += bias_total;
    write_strip<width>(work.out_dtype, work.streams, load_strip<width>(high), out, half + place);
  }
}

template <int bits, bool gained>
EMBAX_INLINE void pool_quantized_sample(const QuantizedPool& work, IdsAhead& ahead, int64_t begin, int64_t end,
                                        void* out) {
  // As many totals as f32 rows have: they stay in registers.
  constexpr int largest = bits == 8 ? 64 : 32;
  const int64_t whole = bits == 8 ? work.dim : work.dim / 2;
  for_strips<largest>(whole, [&](auto width, int64_t place) {
    pool_codes<bits, decltype(width)::value, gained>(work, ahead, begin, end, place, out);
  });
  if (bits == 4 && work.dim % 2) pool_codes<bits, 1, gained>(work, ahead, begin, end, whole, out);
}

template <int bits, bool gained>
void quantized_pool_as(const QuantizedPool& work, int64_t first, int64_t last) {
  const int64_t out_bytes = work.dim * kDtypeSize[static_cast<int>(work.out_dtype)];
  const bool lone = work.ids.offsets == nullptr;
  const int64_t front = lone ? first : clamped(work.ids.offsets[first], work.ids.capacity);
  IdsAhead ahead(Ahead(work.data, work.width), work.ids, work.rows, front);
  for (int64_t sample = first; sample < last; ++sample) {
    const int64_t begin = lone ? sample : clamped(work.ids.offsets[sample], work.ids.capacity);
    const int64_t end = lone ? sample + 1 : clamped(work.ids.offsets[sample + 1], work.ids.capacity);
    pool_quantized_sample<bits, gained>(work, ahead, begin, end, static_cast<char*>(work.out) + sample * out_bytes);
  }
#if defined(__AVX2__)
  if (work.streams) _mm_sfence();  // streamed lines are seen by whoever is told that this is done
#endif
}

// Pools the samples [first, last).
inline void quantized_pool(const QuantizedPool& work, int64_t first, int64_t last) {
  const bool gained = work.ids.gains != nullptr;
  if (work.bits == 8) {
    gained ? quantized_pool_as<8, true>(work, first, last) : quantized_pool_as<8, false>(work, first, last);
  } else {
    gained ? quantized_pool_as<4, true>(work, first, last) : quantized_pool_as<4, false>(work, first, last);
  }
}

}  // namespace embax::EMBAX_ISA

#endif  // EMBAX_CSRC_QUANTIZED_H_
