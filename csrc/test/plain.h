// What the kernels must return, by plain loops over single numbers, bit for bit.
//
// Conversions are computed here anew, in double precision. The formulas of the optimizers are those of optimizers.h:
// that they are the right formulas is tested from Python; here, that every number of a row gets its own.

#ifndef EMBAX_CSRC_TEST_PLAIN_H_
#define EMBAX_CSRC_TEST_PLAIN_H_

#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "kernels.h"
#include "optimizers.h"

namespace embax::plain {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const double sign = half & 0x8000 ? -1 : 1;
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 31) return static_cast<float>(fraction ? NAN : sign * INFINITY);
  return static_cast<float>(exponent ? sign * std::ldexp(1024 + fraction, exponent - 25)
                                     : sign * std::ldexp(fraction, -24));
}

// Rounds to the nearest number of `digits` binary digits that is a multiple of 2^lowest and below 2^highest.
inline double rounded(float value, int digits, int lowest, int highest) {
  if (std::isnan(value) || std::isinf(value) || value == 0) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int unit = exponent - digits < lowest ? lowest : exponent - digits;
  const double result = std::ldexp(std::nearbyint(std::ldexp(static_cast<double>(value), -unit)), unit);
  return std::fabs(result) < std::ldexp(1.0, highest) ? result : std::copysign(INFINITY, value);
}

inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(rounded(value, 11, -24, 16));
  if (std::isnan(magnitude)) return sign | 0x7e00;
  if (std::isinf(magnitude)) return sign | 0x7c00;
  if (magnitude < std::ldexp(1.0, -14))
    return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(magnitude, 24)));
  int exponent;
  const int fraction = static_cast<int>(std::ldexp(std::frexp(magnitude, &exponent), 11)) - 1024;
  return static_cast<uint16_t>(sign | (exponent + 14) << 10 | fraction);
}

inline uint16_t float_to_bfloat(float value) {
  if (std::isnan(value)) return static_cast<uint16_t>(to_bits(value) >> 16 | 0x40);
  return static_cast<uint16_t>(to_bits(static_cast<float>(rounded(value, 8, -133, 128))) >> 16);
}

// Number `at` of an array of any of the dtypes.
inline float get(const void* data, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  return dtype == Dtype::kBFloat16 ? from_bits(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

inline void put(void* data, Dtype dtype, int64_t at, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(data)[at] = value;
  } else {
    static_cast<uint16_t*>(data)[at] = dtype == Dtype::kBFloat16 ? float_to_bfloat(value) : float_to_half(value);
  }
}

inline float leveled(const float* levels, float value) {
  if (levels == nullptr) return value;
  const float clipped = value < levels[0] ? levels[0] : value > levels[1] ? levels[1] : value;
  return levels[0] + std::nearbyintf((clipped - levels[0]) / levels[2]) * levels[2];
}

inline bool present(const Rows& table, int32_t id) { return id >= 0 && id < table.rows; }

// out[d] of one sample.
inline float pooled(const GatherPool& work, int64_t sample, int64_t d) {
  const auto clamped = [&](int64_t offset) {
    return offset < 0 ? 0 : offset > work.ids.capacity ? work.ids.capacity : offset;
  };
  float total = 0;
  for (int64_t j = clamped(work.ids.offsets[sample]); j < clamped(work.ids.offsets[sample + 1]); ++j) {
    const int32_t id = work.ids.ids[j];
    if (!present(work.table, id)) continue;
    const float value = leveled(work.levels, get(work.table.data, work.table.dtype, id * work.table.dim + d));
    total += work.ids.gains == nullptr ? value : work.ids.gains[j] * value;
  }
  return total;
}

// Sums as the kernels make them in parallel: 16 running sums, each of every sixteenth number, folded in halves.
template <typename Term>
float sum_in_lanes(int64_t dim, const Term& term) {
  float lanes[16] = {};
  for (int64_t d = 0; d < dim; ++d) lanes[d % 16] += term(d);
  for (int half = 8; half > 0; half /= 2) {
    for (int d = 0; d < half; ++d) lanes[d] += lanes[d + half];
  }
  return lanes[0];
}

// The places of each row that occurs, for offsets that rise from 0.
struct Place {
  int64_t position, sample;
};
using Places = std::map<int64_t, std::vector<Place>>;

inline Places places_of(const Ids& ids, const Rows& table) {
  Places places;
  const auto note = [&](int64_t j, int64_t sample) {
    if (present(table, ids.ids[j]) && sample >= 0 && sample < ids.samples) places[ids.ids[j]].push_back({j, sample});
  };
  if (ids.offsets == nullptr) {
    for (int64_t j = 0; j < ids.capacity; ++j) note(j, ids.sample_of == nullptr ? j : ids.sample_of[j]);
    return places;
  }
  for (int64_t sample = 0; sample < ids.samples; ++sample) {
    for (int64_t j = ids.offsets[sample]; j < ids.offsets[sample + 1] && j < ids.capacity; ++j) note(j, sample);
  }
  return places;
}

inline float gradient_at(const Gradients& all, int64_t sample, int64_t dim, int64_t d) {
  int64_t block = 0;
  while (sample >= all.first[block + 1]) ++block;
  return get(all.blocks[block], all.dtype, (sample - all.first[block]) * dim + d);
}

// The sum of a row's gradients, in the order of places, or by blocks if there are many.
inline std::vector<float> summed(const Step& work, const float* gains, const std::vector<Place>& places) {
  std::vector<float> sum(static_cast<size_t>(work.dim));
  const size_t block = places.size() > kHot ? kBlock : places.size();
  for (int64_t d = 0; d < work.dim; ++d) {
    float& total = sum[static_cast<size_t>(d)];
    for (size_t first = 0; first < places.size(); first += block) {
      float part = 0;
      for (size_t i = first; i < places.size() && i < first + block; ++i) {
        const float value = gradient_at(work.gradients, places[i].sample, work.dim, d);
        part += gains == nullptr ? value : gains[places[i].position] * value;
      }
      // A single gradient is read where it stands, so that its -0 stays -0.
      const bool alone = places.size() == 1 && gains == nullptr && work.gradients.dtype == Dtype::kFloat32;
      if (alone) part = gradient_at(work.gradients, places[0].sample, work.dim, d);
      total = first == 0 ? part : total + part;
    }
  }
  return sum;
}

// One row's step; the table and the slots are those of `work`.
template <typename Optimizer>
void step_row(const Step& work, int64_t row, std::vector<float> g) {
  const typename Optimizer::Hyper hyper(work.hyper);
  const int64_t dim = work.dim, first = row * dim;
  float scale = 1;
  if (work.clip_norm < INFINITY) {
    const float norm = std::sqrt(sum_in_lanes(dim, [&](int64_t d) { return g[d] * g[d]; }));
    if (norm > work.clip_norm) scale = work.clip_norm / norm;
    for (float& value : g) value *= scale;
  }
  std::vector<float> before(static_cast<size_t>(dim));
  for (int64_t d = 0; d < dim; ++d) {
    before[d] = get(work.table, work.dtype, first + d);
    if (work.l2 != 0) g[d] += work.l2 * before[d];
  }
  float row_slot = 0;
  if constexpr (Optimizer::kRowSlot) {
    float* slot = work.slots[Optimizer::kElementSlots] + row;
    row_slot = *slot;
    const float squares = sum_in_lanes(dim, [&](int64_t d) { return g[d] * g[d]; });
    Optimizer::begin_row(hyper, squares / static_cast<float>(dim), row_slot);
    *slot = row_slot;
    row_slot = Optimizer::factor(hyper, row_slot);
  }
  for (int64_t d = 0; d < dim; ++d) {
    float unused = 0, value = before[d];
    float& slot0 = Optimizer::kElementSlots > 0 ? work.slots[0][first + d] : unused;
    float& slot1 = Optimizer::kElementSlots > 1 ? work.slots[1][first + d] : unused;
    Optimizer::step(hyper, row_slot, g[d], value, slot0, slot1);
    if (work.decay != 0) value -= work.decay * before[d];
    put(work.table, work.dtype, first + d, value);
  }
}

using RowStep = void (*)(const Step&, int64_t row, std::vector<float> gradient);

struct Known {
  const char* name;
  int element_slots;
  bool row_slot;
  RowStep step;
};

#define EMBAX_PLAIN(name, ...) {name, __VA_ARGS__::kElementSlots, __VA_ARGS__::kRowSlot, step_row<__VA_ARGS__>},
constexpr Known kKnown[] = {EMBAX_OPTIMIZERS(EMBAX_PLAIN)};
static_assert(sizeof(kKnown) / sizeof(kKnown[0]) == kOptimizers, "kOptimizers must count EMBAX_OPTIMIZERS");

}  // namespace embax::plain

#endif  // EMBAX_CSRC_TEST_PLAIN_H_
