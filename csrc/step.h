// One optimizer step on every row that a batch touched: sum the gradients of its occurrences, then the formula.
//
// Occurrences come sorted by row, the places of a row in rising order. Six of them, gradients a..f by sample:
//
//   entries   0:f  3:b  3:e  5:a  6:c  6:d          row : place
//   runs      0    3         5    6                 a run is a row's occurrences
//
//   row 0 steps by f, row 3 by b + e, row 5 by a, row 6 by c + d; rows 1, 2 and 4 are not looked at.
//
// A run belongs to the range of entries that holds its first one, so ranges can be handed to threads and every row is
// read, stepped and written once, by one thread. A run is added up in the order of its places, or, beyond kHot of
// them, in blocks of kBlock whose sums are then added up in order: bits depend on the occurrences alone.

#ifndef EMBAX_CSRC_STEP_H_
#define EMBAX_CSRC_STEP_H_

#include "gather_pool.h"
#include "optimizers.h"

namespace embax::EMBAX_ISA {

EMBAX_INLINE int64_t row_at(const Step& work, int64_t entry) {
  return static_cast<int64_t>(work.entries[entry] >> 32);
}
EMBAX_INLINE int64_t place_at(const Step& work, int64_t entry) {
  return static_cast<int64_t>(work.entries[entry] & 0xffffffffu);
}

// The gradient of the activation that an occurrence went into.
EMBAX_INLINE const char* gradient_of(const Step& work, int64_t place, int64_t bytes) {
  const int64_t sample = work.sample_of == nullptr ? place : work.sample_of[place];
  const Gradients& all = work.gradients;
  if (all.count == 1) return static_cast<const char*>(all.blocks[0]) + sample * bytes;
  int64_t block = all.guess[sample >> all.shift];
  while (sample >= all.first[block + 1]) ++block;
  return static_cast<const char*>(all.blocks[block]) + (sample - all.first[block]) * bytes;
}

// Adds up `width` columns of the occurrences [begin, end).
template <int width, typename G>
EMBAX_INLINE void sum_columns(const Step& work, int64_t begin, int64_t end, int64_t column, int64_t bytes, float* sum) {
  Strip<width> total{};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t place = place_at(work, i);
    const auto values = load_strip<width>(reinterpret_cast<const G*>(gradient_of(work, place, bytes)) + column);
    const bool gained = work.gains != nullptr;
    const float gain = gained ? work.gains[place] : 1.0f;
    EMBAX_UNROLL
    for (int d = 0; d < total.count; ++d) total.part[d] += gained ? gain * values.part[d] : values.part[d];
  }
  store_strip(total, sum + column);
}

template <typename G>
EMBAX_INLINE void sum_range(const Step& work, int64_t begin, int64_t end, float* sum) {
  const int64_t bytes = work.dim * static_cast<int64_t>(sizeof(G));
  for_strips<64>(work.dim, [&](auto width, int64_t column) {
    sum_columns<decltype(width)::value, G>(work, begin, end, column, bytes, sum);
  });
}

inline void sum_narrow(const Step& work, int64_t begin, int64_t end, float* sum) {
  if (work.gradients.dtype == Dtype::kBFloat16) {
    sum_range<BFloat16>(work, begin, end, sum);
  } else {
    sum_range<Float16>(work, begin, end, sum);
  }
}

EMBAX_INLINE void sum_entries(const Step& work, int64_t begin, int64_t end, float* sum) {
  if (work.gradients.dtype == Dtype::kFloat32) {
    sum_range<float>(work, begin, end, sum);
  } else {
    sum_narrow(work, begin, end, sum);
  }
}

// The sum of one block of a hot run, into its place in hot_sums.
inline void sum_hot_block(const Step& work, int64_t run, int64_t block) {
  const HotRun& hot = work.hot[run];
  const int64_t begin = hot.begin + block * kBlock;
  const int64_t end = begin + kBlock < hot.end ? begin + kBlock : hot.end;
  sum_entries(work, begin, end, work.hot_sums + (hot.first_block + block) * work.dim);
}

inline void sum_hot(const Step& work, int64_t begin, int64_t end, float* sum) {
  int64_t run = 0;
  while (work.hot[run].begin != begin) ++run;
  const int64_t blocks = (end - begin + kBlock - 1) / kBlock;
  const float* sums = work.hot_sums + work.hot[run].first_block * work.dim;
  for (int64_t d = 0; d < work.dim; ++d) sum[d] = sums[d];
  for (int64_t b = 1; b < blocks; ++b) {
    for (int64_t d = 0; d < work.dim; ++d) sum[d] += sums[b * work.dim + d];
  }
}

// The gradient of a row: where it stands if there is only one of gain 1, else its sum, made in `sum`.
EMBAX_INLINE const float* row_gradient(const Step& work, int64_t begin, int64_t end, float* sum) {
  if (end - begin == 1 && work.gains == nullptr && work.gradients.dtype == Dtype::kFloat32) {
    return reinterpret_cast<const float*>(gradient_of(work, place_at(work, begin), work.dim * 4));
  }
  if (end - begin > kHot) {
    sum_hot(work, begin, end, sum);
  } else {
    sum_entries(work, begin, end, sum);
  }
  return sum;
}

// The end of the run that begins at `begin`.
EMBAX_INLINE int64_t run_end(const Step& work, int64_t begin) {
  const int64_t row = row_at(work, begin);
  int64_t end = begin + 1;
  while (end < work.count && row_at(work, end) == row) ++end;
  return end;
}

EMBAX_INLINE float sum_of_squares(const float* values, int64_t dim, float scale) {
  return sum_in_lanes(dim, [&](auto width, int64_t column) {
    auto strip = load_strip<decltype(width)::value>(values + column);
    EMBAX_UNROLL
    for (int i = 0; i < strip.count; ++i) {
      const auto value = strip.part[i] * scale;
      strip.part[i] = value * value;
    }
    return strip;
  });
}

// What is the same for all rows of a step.
template <typename Optimizer>
struct Constants {
  typename Optimizer::Hyper hyper;
  int64_t dim;
  float clip_norm, l2, decay;
  bool clips, modified, stochastic;
};

template <int width, typename Optimizer, typename T>
EMBAX_INLINE void step_strip(const Constants<Optimizer>& c, float factor, float scale, const float* gradient, T* row,
                             float* slot0, float* slot1, uint32_t random, int64_t column) {
  constexpr int slots = Optimizer::kElementSlots;
  const Strip<width> before = load_strip<width>(row + column);
  Strip<width> w = before, g = load_strip<width>(gradient + column), s0{}, s1{};
  if constexpr (slots > 0) s0 = load_strip<width>(slot0 + column);
  if constexpr (slots > 1) s1 = load_strip<width>(slot1 + column);
  EMBAX_UNROLL
  for (int i = 0; i < w.count; ++i) {
    if (c.modified && c.clips) g.part[i] *= scale;
    if (c.modified && c.l2 != 0) g.part[i] += c.l2 * before.part[i];
    Optimizer::step(c.hyper, factor, g.part[i], w.part[i], s0.part[i], s1.part[i]);
    if (c.modified && c.decay != 0) w.part[i] -= c.decay * before.part[i];
  }
  if constexpr (slots > 0) store_strip(s0, slot0 + column);
  if constexpr (slots > 1) store_strip(s1, slot1 + column);
  if (sizeof(T) == 2 && c.stochastic) {
    store_at_random(w, row + column, random, column);
  } else {
    store_strip(w, row + column);
  }
}

// The gradient's squares as the formula sees them: with the L2 term, for which the row is needed.
template <typename T>
EMBAX_INLINE float decayed_squares(const float* gradient, const T* row, int64_t dim, float scale, float l2) {
  return sum_in_lanes(dim, [&](auto width, int64_t column) {
    constexpr int n = decltype(width)::value;
    const Strip<n> w = load_strip<n>(row + column);
    Strip<n> g = load_strip<n>(gradient + column);
    EMBAX_UNROLL
    for (int i = 0; i < g.count; ++i) {
      const auto value = g.part[i] * scale + l2 * w.part[i];
      g.part[i] = value * value;
    }
    return g;
  });
}

template <typename Optimizer, typename T>
EMBAX_INLINE void step_row(const Step& work, const Constants<Optimizer>& c, int64_t number, const float* gradient) {
  T* row = static_cast<T*>(work.table) + number * c.dim;
  float scale = 1;
  if (c.clips) {
    const float norm = __builtin_sqrtf(sum_of_squares(gradient, c.dim, 1.0f));
    if (norm > c.clip_norm) scale = c.clip_norm / norm;
  }
  float factor = 0;
  if constexpr (Optimizer::kRowSlot) {
    float* slot = work.slots[Optimizer::kElementSlots] + number;
    float squares = 0;
    if constexpr (Optimizer::kMeanSquare) {
      squares = c.l2 == 0 ? sum_of_squares(gradient, c.dim, scale)
                          : decayed_squares(gradient, row, c.dim, scale, c.l2);
    }
    Optimizer::begin_row(c.hyper, squares / static_cast<float>(c.dim), *slot);
    factor = Optimizer::factor(c.hyper, *slot);
  }
  float* slot0 = Optimizer::kElementSlots > 0 ? work.slots[0] + number * c.dim : nullptr;
  float* slot1 = Optimizer::kElementSlots > 1 ? work.slots[1] + number * c.dim : nullptr;
  const uint32_t random = c.stochastic ? row_seed(work.seed, number) : 0;
  for_strips<kLanes>(c.dim, [&](auto width, int64_t column) {
    step_strip<decltype(width)::value>(c, factor, scale, gradient, row, slot0, slot1, random, column);
  });
}

// Entries between asking memory for a row and using it.
EMBAX_INLINE int64_t step_distance(int64_t dim) { return dim <= 16 ? 32 : dim >= 128 ? 12 : 20; }

// The arrays that a step reads by row, and the gradients.
template <typename Optimizer, typename T>
struct StepAhead {
  Ahead table, slot0, slot1, gradient;
  int64_t distance;  // entries between asking memory for a row, its slots and its gradient, and using them
  int64_t block;     // entries to ask for at once, the first line of each to begin with: see IdsAhead

  EMBAX_INLINE explicit StepAhead(const Step& work)
      : table(work.table, work.dim * static_cast<int64_t>(sizeof(T))),
        slot0(work.slots[0], work.dim * 4),
        slot1(work.slots[1], work.dim * 4),
        gradient(nullptr, work.dim * kDtypeSize[static_cast<int>(work.gradients.dtype)]),
        distance(step_distance(work.dim)),
        block(kBlockBytes / (table.bytes + Optimizer::kElementSlots * slot0.bytes)) {
    // A block of a few long rows only makes what is in use wait; rows of one line are asked for once.
    block = block < 8 || table.one_line() ? 1 : block > 16 ? 16 : block;
  }

  EMBAX_INLINE void ask_first_lines(const Step& work, int64_t row) const {
    EMBAX_PREFETCH(table.data + row * table.bytes);
    if constexpr (Optimizer::kElementSlots > 0) EMBAX_PREFETCH(slot0.data + row * slot0.bytes);
    if constexpr (Optimizer::kElementSlots > 1) EMBAX_PREFETCH(slot1.data + row * slot1.bytes);
    if constexpr (Optimizer::kRowSlot) EMBAX_PREFETCH(work.slots[Optimizer::kElementSlots] + row);
  }

  // For every entry, though neighbours may have the same row: to find out costs more than to ask twice.
  EMBAX_INLINE void ask(const Step& work, int64_t entry) const {
    const int64_t row = row_at(work, entry);
    table.ask(row);
    if constexpr (Optimizer::kElementSlots > 0) slot0.ask(row);
    if constexpr (Optimizer::kElementSlots > 1) slot1.ask(row);
    if constexpr (Optimizer::kRowSlot) EMBAX_PREFETCH(work.slots[Optimizer::kElementSlots] + row);
    if (work.touched != nullptr) EMBAX_PREFETCH(work.touched + row);
    if (work.gradients.far) gradient.ask_at(gradient_of(work, place_at(work, entry), gradient.bytes));
  }

  // Asks for the entries from `asked` to `distance` beyond `next`; returns how far it came.
  EMBAX_INLINE int64_t ask_until(const Step& work, int64_t asked, int64_t next) const {
    if (asked >= next + distance) return asked;
    const int64_t whole = next + distance + block - 1, end = whole < work.count ? whole : work.count;
    if (block > 1) {
      for (int64_t entry = asked; entry < end; ++entry) ask_first_lines(work, row_at(work, entry));
    }
    for (; asked < end; ++asked) ask(work, asked);
    return asked;
  }

 private:
  static constexpr int64_t kBlockBytes = 4096;
};

template <typename Optimizer, typename T>
void step_rows(const Step& work, int64_t first, int64_t last, float* sum, int64_t) {
  const Constants<Optimizer> c{typename Optimizer::Hyper(work.hyper),
                               work.dim,
                               work.clip_norm,
                               work.l2,
                               work.decay,
                               work.clip_norm < __builtin_inff(),
                               work.clip_norm < __builtin_inff() || work.l2 != 0 || work.decay != 0,
                               work.stochastic};
  const StepAhead<Optimizer, T> ahead(work);
  int64_t begin = first, asked = first + 1;
  while (begin < last && begin > 0 && row_at(work, begin) == row_at(work, begin - 1)) ++begin;  // another's run
  while (begin < last) {
    const int64_t end = run_end(work, begin);
    if (end - begin > kHot && asked < end) asked = end;  // its gradients are summed already
    asked = ahead.ask_until(work, asked, end);
    const int64_t row = row_at(work, begin);
    step_row<Optimizer, T>(work, c, row, row_gradient(work, begin, end, sum));
    if (work.touched != nullptr) work.touched[row] = 1;
    begin = end;
  }
}

// The same walk, storing sums instead of stepping: RowGradients.
inline void sum_rows(const Step& work, int64_t first, int64_t last, float* sum, int64_t rank) {
  int64_t begin = first;
  const Ahead gradients(nullptr, work.dim * kDtypeSize[static_cast<int>(work.gradients.dtype)]);
  const int64_t out_bytes = work.dim * kDtypeSize[static_cast<int>(work.out_dtype)];
  const int64_t ahead = step_distance(work.dim);
  int64_t asked = first + 1;
  while (begin < last && begin > 0 && row_at(work, begin) == row_at(work, begin - 1)) ++begin;
  for (; begin < last; ++rank) {
    const int64_t end = run_end(work, begin);
    for (; work.gradients.far && asked < end + ahead && asked < work.count; ++asked) {
      gradients.ask_at(gradient_of(work, place_at(work, asked), gradients.bytes));
    }
    const float* gradient = row_gradient(work, begin, end, sum);
    work.out_rows[rank] = static_cast<int32_t>(row_at(work, begin));
    void* out = static_cast<char*>(work.out_values) + rank * out_bytes;
    for_strips<64>(work.dim, [&](auto width, int64_t column) {
      constexpr int n = decltype(width)::value;
      store_as<n>(work.out_dtype, load_strip<n>(gradient + column), out, column);
    });
    begin = end;
  }
}

}  // namespace embax::EMBAX_ISA

#endif  // EMBAX_CSRC_STEP_H_
