// Gather and pool: out[s] = sum over j in sample s of gains[j] * table[ids[j]]; and rows one by one.
//
// Sample s owns the positions j with offsets[s] <= j < offsets[s + 1]. Six ids, three samples, a table of
// four rows r0..r3 and no gains (every gain is 1):
//
//   ids      2  0 | 0  7 -1 |           one number a position; capacity 6, the sixth position is padding
//   offsets  0      2          5   5    samples + 1 numbers
//
//   out[0] = r2 + r0
//   out[1] = r0          ids 7 and -1 name no row of the table: they are absent and add nothing
//   out[2] = 0           an empty sample
//
// The law, for any input whatever:
//   1. An id outside [0, rows) is absent. Its gain is not read into the sum, so a NaN there does no harm.
//   2. Every offset is clamped into [0, capacity]; a sample whose end lies before its begin is empty. Nothing
//      outside the arrays is read or written.
//   3. A sample is summed in the order of its positions by whoever handles it, so the bits of `out` do not
//      depend on how samples are divided among threads.

#ifndef EMBAX_CSRC_GATHER_POOL_H_
#define EMBAX_CSRC_GATHER_POOL_H_

#include "rows.h"

namespace embax::EMBAX_ISA {

EMBAX_INLINE int64_t clamped_offset(const Ids& ids, int64_t sample) {
  const int64_t offset = ids.offsets[sample];
  return offset < 0 ? 0 : offset > ids.capacity ? ids.capacity : offset;
}

// The row of that number, or nullptr if there is none.
template <typename T>
EMBAX_INLINE const T* row_of(const Rows& table, int64_t id) {
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(table.rows)) return nullptr;
  return static_cast<const T*>(table.data) + id * table.dim;
}

EMBAX_INLINE Ahead ahead_of(const Rows& table) {
  return Ahead(table.data, table.dim * kDtypeSize[static_cast<int>(table.dtype)]);
}

EMBAX_INLINE void ask_for(const Ahead& ahead, const Rows& table, const int32_t* ids, int64_t j, int64_t count) {
  if (j >= count) return;
  const int64_t id = ids[j];
  if (static_cast<uint64_t>(id) < static_cast<uint64_t>(table.rows)) ahead.ask(id);
}

// Rounds to levels: {low, high, width}; half goes to the even level.
template <int width>
EMBAX_INLINE void round_to_levels(const float* levels, Strip<width>& strip) {
  const float low = levels[0], high = levels[1], step = levels[2];
  float values[width];
  memcpy(values, &strip, sizeof values);
  for (int d = 0; d < width; ++d) {
    const float clipped = values[d] < low ? low : values[d] > high ? high : values[d];
    values[d] = low + __builtin_rintf((clipped - low) / step) * step;
  }
  memcpy(&strip, values, sizeof values);
}

// Writes a finished strip. A stream goes around the caches: what is too large for them would only push out rows, and
// the old content of `out` need not be read first.
template <int width>
EMBAX_INLINE void write_strip(Dtype dtype, bool streams, const Strip<width>& from, void* to, int64_t column) {
#if defined(__AVX2__)
  if constexpr (width % 16 == 0) {
    if (streams && dtype == Dtype::kFloat32) {
      float* at = static_cast<float*>(to) + column;
      EMBAX_UNROLL
      for (int i = 0; i < from.count; ++i) {
#if defined(__AVX512F__)
        _mm512_stream_ps(at + i * from.lanes, from.part[i]);
#else
        _mm256_stream_ps(at + i * from.lanes, from.part[i]);
#endif
      }
      return;
    }
  }
#endif
  (void)streams;
  store_as<width>(dtype, from, to, column);
}

// Sums `width` columns of the positions [begin, end), starting at `column`. The width is known to the compiler, so the
// running sum stays in registers.
template <int width, bool gained, bool levelled, typename T>
EMBAX_INLINE void pool_columns(const GatherPool& work, const Ahead& ahead, int64_t begin, int64_t end, int64_t column,
                               void* out) {
  Strip<width> total{};
  const Rows table = work.table;
  const int32_t* ids = work.ids.ids;
  for (int64_t j = begin; j < end; ++j) {
    if (column == 0) ask_for(ahead, table, ids, j + ahead.places, work.ids.capacity);
    const T* row = row_of<T>(table, ids[j]);
    if (row == nullptr) continue;
    Strip<width> values = load_strip<width>(row + column);
    if constexpr (levelled) round_to_levels<width>(work.levels, values);
    EMBAX_UNROLL
    for (int i = 0; i < total.count; ++i) {
      total.part[i] += gained ? work.ids.gains[j] * values.part[i] : values.part[i];
    }
  }
  write_strip<width>(work.out_dtype, work.streams, total, out, column);
}

template <bool gained, bool levelled, typename T>
EMBAX_INLINE void pool_samples(const GatherPool& work, int64_t first, int64_t last) {
  const int64_t out_bytes = work.table.dim * kDtypeSize[static_cast<int>(work.out_dtype)];
  const Ahead ahead = ahead_of(work.table);
  for (int64_t sample = first; sample < last; ++sample) {
    const int64_t begin = clamped_offset(work.ids, sample), end = clamped_offset(work.ids, sample + 1);
    void* out = static_cast<char*>(work.out) + sample * out_bytes;
    for_strips<64>(work.table.dim, [&](auto width, int64_t column) {
      pool_columns<decltype(width)::value, gained, levelled, T>(work, ahead, begin, end, column, out);
    });
  }
#if defined(__AVX2__)
  if (work.streams) _mm_sfence();  // streamed lines are seen by whoever is told that this is done
#endif
}

template <typename T>
void gather_pool_as(const GatherPool& work, int64_t first, int64_t last) {
  if (work.levels != nullptr) {
    work.ids.gains != nullptr ? pool_samples<true, true, T>(work, first, last)
                              : pool_samples<false, true, T>(work, first, last);
  } else if (work.ids.gains != nullptr) {
    pool_samples<true, false, T>(work, first, last);
  } else {
    pool_samples<false, false, T>(work, first, last);
  }
}

// Pools the samples [first, last).
inline void gather_pool(const GatherPool& work, int64_t first, int64_t last) {
  if (work.table.dtype == Dtype::kFloat32) {
    gather_pool_as<float>(work, first, last);
  } else if (work.table.dtype == Dtype::kBFloat16) {
    gather_pool_as<BFloat16>(work, first, last);
  } else {
    gather_pool_as<Float16>(work, first, last);
  }
}

template <typename T>
void gather_rows_as(const GatherRows& work, int64_t first, int64_t last, T nan) {
  const int64_t dim = work.table.dim;
  const Ahead ahead = ahead_of(work.table);
  for (int64_t j = first; j < last; ++j) {
    ask_for(ahead, work.table, work.ids, j + ahead.places, work.count);
    const T* row = row_of<T>(work.table, work.ids[j]);
    T* out = static_cast<T*>(work.out) + j * dim;
    if (row == nullptr) {
      for (int64_t d = 0; d < dim; ++d) out[d] = nan;
      continue;
    }
    if constexpr (sizeof(T) == 4) {
      if (work.streams) {
        for_strips<64>(dim, [&](auto width, int64_t column) {
          constexpr int n = decltype(width)::value;
          write_strip<n>(Dtype::kFloat32, true, load_strip<n>(row + column), out, column);
        });
        continue;
      }
    }
    memcpy(out, row, static_cast<size_t>(dim) * sizeof(T));
  }
#if defined(__AVX2__)
  if (work.streams) _mm_sfence();
#endif
}

// Copies the rows of the positions [first, last); NaN where there is none.
inline void gather_rows(const GatherRows& work, int64_t first, int64_t last) {
  if (work.table.dtype == Dtype::kFloat32) {
    gather_rows_as<float>(work, first, last, __builtin_nanf(""));
  } else if (work.table.dtype == Dtype::kBFloat16) {
    gather_rows_as<BFloat16>(work, first, last, {0x7fc0});
  } else {
    gather_rows_as<Float16>(work, first, last, {0x7e00});
  }
}

// A sum over a row that is made in 16 lanes, whatever the vector width: lane d % 16 takes column d.
constexpr int kLanes = 16;

template <typename Term>
EMBAX_INLINE float sum_in_lanes(int64_t dim, const Term& term) {
  Strip<kLanes> whole{};
  int64_t column = 0;
  for (; dim - column >= kLanes; column += kLanes) {
    const Strip<kLanes> values = term(Width<kLanes>{}, column);
    EMBAX_UNROLL
    for (int i = 0; i < whole.count; ++i) whole.part[i] += values.part[i];
  }
  float lanes[kLanes];
  memcpy(lanes, &whole, sizeof lanes);
  for_strips<kLanes / 2>(dim - column, [&](auto width, int64_t at) {
    constexpr int n = decltype(width)::value;
    const Strip<n> values = term(width, column + at);
    float terms[n];
    memcpy(terms, &values, sizeof terms);
    for (int d = 0; d < n; ++d) lanes[at + d] += terms[d];
  });
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int d = 0; d < half; ++d) lanes[d] += lanes[d + half];
  }
  return lanes[0];
}

template <typename T>
void row_products_as(const RowProducts& work, int64_t first, int64_t last) {
  const int64_t dim = work.table.dim;
  const int64_t bytes = dim * kDtypeSize[static_cast<int>(work.gradient_dtype)];
  const Ahead ahead = ahead_of(work.table);
  for (int64_t j = first; j < last; ++j) {
    ask_for(ahead, work.table, work.ids.ids, j + ahead.places, work.ids.capacity);
    const T* row = row_of<T>(work.table, work.ids.ids[j]);
    const int64_t sample = work.sample_of[j];
    if (row == nullptr || sample < 0) {
      work.out[j] = 0;
      continue;
    }
    const char* gradient = static_cast<const char*>(work.gradients) + sample * bytes;
    work.out[j] = sum_in_lanes(dim, [&](auto width, int64_t column) {
      constexpr int n = decltype(width)::value;
      Strip<n> values = load_strip<n>(row + column);
      if (work.levels != nullptr) round_to_levels<n>(work.levels, values);
      const Strip<n> factors = load_as<n>(work.gradient_dtype, gradient, column);
      EMBAX_UNROLL
      for (int i = 0; i < values.count; ++i) values.part[i] *= factors.part[i];
      return values;
    });
  }
}

inline void row_products(const RowProducts& work, int64_t first, int64_t last) {
  if (work.table.dtype == Dtype::kFloat32) {
    row_products_as<float>(work, first, last);
  } else if (work.table.dtype == Dtype::kBFloat16) {
    row_products_as<BFloat16>(work, first, last);
  } else {
    row_products_as<Float16>(work, first, last);
  }
}

}  // namespace embax::EMBAX_ISA

#endif  // EMBAX_CSRC_GATHER_POOL_H_
