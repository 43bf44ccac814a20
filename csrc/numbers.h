// Numbers of 16 bits as float32 and back, and rounding at random: the same bits on every processor.
//
// Read by a host compiler for the CPU kernels and by NVRTC for CUDA: no host headers, no memory.

#ifndef EMBAX_CSRC_NUMBERS_H_
#define EMBAX_CSRC_NUMBERS_H_

#include "portable.h"

#if !defined(__CUDACC_RTC__)
#include <cstdint>
#include <cstring>
#endif

namespace embax::EMBAX_ISA {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

#if defined(__CUDACC__)
EMBAX_FORMULA uint32_t bits_of(float value) { return __float_as_uint(value); }
EMBAX_FORMULA float float_of(uint32_t bits) { return __uint_as_float(bits); }
#else
EMBAX_FORMULA uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
EMBAX_FORMULA float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
#endif

EMBAX_FORMULA float widened(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

// To nearest, ties to even; a NaN stays one.
EMBAX_FORMULA BFloat16 narrowed(float value, BFloat16) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded)};
}

// Without branches, so that loops of it are vectorized. Subnormals are made from their integer: XLA runs with float32
// subnormals flushed to zero, which must not flush these.
EMBAX_FORMULA float widened(Float16 value) {
  const uint32_t bits = value.bits, magnitude = bits & 0x7fff;
  const uint32_t normal = (magnitude << 13) + 0x38000000;
  const uint32_t special = (magnitude << 13) | 0x7f800000;
  const uint32_t subnormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 5.9604644775390625e-8f);
  const uint32_t result = magnitude >= 0x7c00 ? special : magnitude < 0x400 ? subnormal : normal;
  return float_of(((bits & 0x8000) << 16) | result);
}

// To nearest, ties to even.
EMBAX_FORMULA Float16 narrowed(float value, Float16) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Normal results: drop 13 bits of the significand, rounding, and move the exponent.
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal ones, below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the addition.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t nan = 0x7e00 | ((magnitude >> 13) & 0x1ff);
  uint32_t result = magnitude < 0x38800000 ? subnormal : normal;
  result = magnitude >= 0x47800000 ? 0x7c00 : result;  // 65536 and more; 65520 and more rounds up to infinity above
  result = magnitude > 0x7f800000 ? nan : result;
  return {static_cast<uint16_t>(sign | result)};
}

// Spreads the bits of its argument (the finalizer of MurmurHash3).
EMBAX_FORMULA uint32_t mixed(uint32_t bits) {
  bits = (bits ^ (bits >> 16)) * 0x85ebca6bu;
  bits = (bits ^ (bits >> 13)) * 0xc2b2ae35u;
  return bits ^ (bits >> 16);
}

// Random bits that depend on the step, the row and the column alone; embax/rounding.py computes the same.
EMBAX_FORMULA uint32_t row_seed(uint32_t seed, int64_t row) {
  return mixed(seed + static_cast<uint32_t>(row) * 0x9e3779b9u);
}
EMBAX_FORMULA uint32_t random_bits(uint32_t row_seed, int64_t column) {
  return mixed(row_seed + static_cast<uint32_t>(column) * 0x9e3779b9u);
}

// Rounds up with the probability of what is cut off: in the mean, nothing is lost.
EMBAX_FORMULA BFloat16 rounded_at_random(float value, uint32_t random, BFloat16 kind) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7f800000) == 0x7f800000) return narrowed(value, kind);
  return {static_cast<uint16_t>((bits + (random & 0xffff)) >> 16)};
}

EMBAX_FORMULA Float16 rounded_at_random(float value, uint32_t random, Float16 kind) {
  const uint32_t bits = bits_of(value), sign = bits & 0x80000000, magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) return narrowed(value, kind);
  if (magnitude >= 0x38800000) {
    return narrowed(float_of(sign | ((magnitude + (random & 0x1fff)) & ~0x1fffu)), kind);
  }
  // Below 2^-14 float16 holds the multiples of 2^-24.
  const float units = float_of(magnitude) * 16777216.0f + static_cast<float>(random >> 8) * 5.9604644775390625e-8f;
  const float whole = static_cast<float>(static_cast<int32_t>(units)) * 5.9604644775390625e-8f;
  return narrowed(float_of(sign | bits_of(whole)), kind);
}

EMBAX_FORMULA float rounded_at_random(float value, uint32_t, float) { return value; }

}  // namespace embax::EMBAX_ISA

#endif  // EMBAX_CSRC_NUMBERS_H_
