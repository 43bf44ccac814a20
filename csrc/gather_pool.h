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

EMBAX_INLINE int64_t clamped(int64_t offset, int64_t capacity) {
  return offset < 0 ? 0 : offset > capacity ? capacity : offset;
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

// Asks for the rows of ids ahead of their use, `Ahead::places` of them.
struct IdsAhead {
  Ahead ahead;
  const int32_t* ids;
  int64_t capacity;
  uint64_t rows;
  int64_t asked;  // of the positions, those before this one

  EMBAX_INLINE IdsAhead(const Ahead& ahead, const Ids& ids, int64_t rows, int64_t begin)
      : ahead(ahead), ids(ids.ids), capacity(ids.capacity), rows(static_cast<uint64_t>(rows)), asked(begin) {}

  EMBAX_INLINE bool has(int64_t id) const { return static_cast<uint64_t>(id) < rows; }
  EMBAX_INLINE void ask_one(int64_t j) const {
    if (j < capacity && has(ids[j])) ahead.ask(ids[j]);
  }

  // Where rows are summed and little is written, a block of rows at a time, the first line of each to begin with: they
  // wait for the addresses of their pages, and do so together. It halves the time of a gather.
  EMBAX_INLINE void ask_block(int64_t j) {
    if (j + ahead.places < asked) return;
    const int64_t together = ahead.bytes > kShort ? 16 : 32;
    const int64_t end = asked + together < capacity ? asked + together : capacity;
    for (int64_t i = asked; i < end; ++i) {
      if (has(ids[i])) EMBAX_PREFETCH(ahead.data + ids[i] * ahead.bytes);
    }
    for (int64_t i = asked; i < end && !ahead.one_line(); ++i) ask_one(i);
    asked += together;
  }

 private:
  static constexpr int64_t kShort = 2 * kCacheLine;
};

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

// A lookup as its inner loop wants it: copied, for the compiler cannot tell that writing a row does not change it.
template <bool gained_, bool levelled_, typename T>
struct Pooling {
  static constexpr bool gained = gained_, levelled = levelled_;
  const T* data;
  uint64_t rows;
  int64_t dim;
  const int32_t* ids;
  const float *gains, *levels;

  EMBAX_INLINE explicit Pooling(const GatherPool& work)
      : data(static_cast<const T*>(work.table.data)),
        rows(static_cast<uint64_t>(work.table.rows)),
        dim(work.table.dim),
        ids(work.ids.ids),
        gains(work.ids.gains),
        levels(work.levels) {}

  EMBAX_INLINE bool has(int64_t id) const { return static_cast<uint64_t>(id) < rows; }
};

// Sums `width` columns of the positions [begin, end), starting at `column`. The width is known to the compiler, so the
// running sum stays in registers.
template <int width, typename P>
EMBAX_INLINE Strip<width> pool_columns(const P& pooling, IdsAhead& ahead, int64_t begin, int64_t end, int64_t column) {
  Strip<width> total{};
  for (int64_t j = begin; j < end; ++j) {
    if (column == 0) ahead.ask_block(j);
    const int64_t id = pooling.ids[j];
    if (!pooling.has(id)) continue;
    Strip<width> values = load_strip<width>(pooling.data + id * pooling.dim + column);
    if constexpr (P::levelled) round_to_levels<width>(pooling.levels, values);
    EMBAX_UNROLL
    for (int i = 0; i < total.count; ++i) {
      total.part[i] += P::gained ? pooling.gains[j] * values.part[i] : values.part[i];
    }
  }
  return total;
}

template <bool gained, bool levelled, typename T>
EMBAX_INLINE void pool_samples(const GatherPool& work, int64_t first, int64_t last) {
  const Pooling<gained, levelled, T> pooling(work);
  const int32_t* const offsets = work.ids.offsets;
  const Dtype dtype = work.out_dtype;
  const bool streams = work.streams;
  const int64_t out_bytes = pooling.dim * kDtypeSize[static_cast<int>(dtype)];
  char* out = static_cast<char*>(work.out) + first * out_bytes;
  const int64_t capacity = work.ids.capacity;
  int64_t begin = clamped(offsets[first], capacity);
  IdsAhead ahead(ahead_of(work.table), work.ids, work.table.rows, begin);
  for (int64_t sample = first; sample < last; ++sample, out += out_bytes) {
    const int64_t end = clamped(offsets[sample + 1], capacity);
    for_strips<64>(pooling.dim, [&](auto width, int64_t column) {
      constexpr int n = decltype(width)::value;
      write_strip<n>(dtype, streams, pool_columns<n>(pooling, ahead, begin, end, column), out, column);
    });
    begin = end;
  }
#if defined(__AVX2__)
  if (streams) _mm_sfence();  // streamed lines are seen by whoever is told that this is done
#endif
}

// Whether each of the samples [first, last) owns exactly one position.
EMBAX_INLINE bool one_each(const Ids& ids, int64_t first, int64_t last) {
  const int32_t* const offsets = ids.offsets + first;
  const int64_t most = ids.capacity < 0x7fffffff ? ids.capacity : 0x7fffffff;
  if (offsets[0] < 0 || offsets[0] + (last - first) > most) return false;
  const int32_t begin = offsets[0];
  int32_t differs = 0;
  EMBAX_VECTORIZE
  for (int32_t i = 0; i <= static_cast<int32_t>(last - first); ++i) differs |= offsets[i] ^ (begin + i);
  return differs == 0;
}

// The same for samples of one id each, without gains: as many rows are written as are read, and a shorter loop has more
// of both under way.
template <bool plain, typename T>
EMBAX_INLINE void pool_single(const GatherPool& work, int64_t first, int64_t last) {
  const Pooling<false, false, T> pooling(work);
  const Dtype dtype = plain ? Dtype::kFloat32 : work.out_dtype;
  const bool streams = !plain && work.streams;
  const int64_t out_bytes = pooling.dim * kDtypeSize[static_cast<int>(dtype)];
  char* out = static_cast<char*>(work.out) + first * out_bytes;
  const int64_t begin = work.ids.offsets[first], end = begin + (last - first);
  const IdsAhead ahead(ahead_of(work.table), work.ids, work.table.rows, begin);
  for (int64_t j = begin; j < end; ++j, out += out_bytes) {
    ahead.ask_one(j + ahead.ahead.places);
    const int64_t id = pooling.ids[j];
    const bool present = pooling.has(id);
    const T* row = pooling.data + (present ? id : 0) * pooling.dim;
    for_strips<64>(pooling.dim, [&](auto width, int64_t column) {
      constexpr int n = decltype(width)::value;
      Strip<n> total{};
      if (present) {
        const Strip<n> values = load_strip<n>(row + column);
        EMBAX_UNROLL
        for (int i = 0; i < total.count; ++i) total.part[i] += values.part[i];
      }
      write_strip<n>(dtype, streams, total, out, column);
    });
  }
#if defined(__AVX2__)
  if (streams) _mm_sfence();
#endif
}

template <typename T>
void gather_pool_as(const GatherPool& work, int64_t first, int64_t last) {
  if (work.levels != nullptr) {
    work.ids.gains != nullptr ? pool_samples<true, true, T>(work, first, last)
                              : pool_samples<false, true, T>(work, first, last);
  } else if (work.ids.gains != nullptr) {
    pool_samples<true, false, T>(work, first, last);
  } else if (!one_each(work.ids, first, last)) {
    pool_samples<false, false, T>(work, first, last);
  } else if (work.out_dtype == Dtype::kFloat32 && !work.streams) {
    pool_single<true, T>(work, first, last);
  } else {
    pool_single<false, T>(work, first, last);
  }
}

template <typename T>
void gather_rows_as(const GatherRows& work, int64_t first, int64_t last, T nan) {
  const int64_t dim = work.table.dim;
  const Ids ids{work.ids, nullptr, nullptr, work.count, work.count, nullptr};
  const IdsAhead ahead(ahead_of(work.table), ids, work.table.rows, first);
  for (int64_t j = first; j < last; ++j) {
    ahead.ask_one(j + ahead.ahead.places);
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
  if (column == dim) return folded(whole);
  float lanes[kLanes];
  memcpy(lanes, &whole, sizeof lanes);
  for_strips<kLanes / 2>(dim - column, [&](auto width, int64_t at) {
    constexpr int n = decltype(width)::value;
    const Strip<n> values = term(width, column + at);
    float terms[n];
    memcpy(terms, &values, sizeof terms);
    for (int d = 0; d < n; ++d) lanes[at + d] += terms[d];
  });
  memcpy(&whole, lanes, sizeof whole);
  return folded(whole);
}

template <typename T>
void row_products_as(const RowProducts& work, int64_t first, int64_t last) {
  const int64_t dim = work.table.dim;
  const int64_t bytes = dim * kDtypeSize[static_cast<int>(work.gradient_dtype)];
  IdsAhead ahead(ahead_of(work.table), work.ids, work.table.rows, first);
  for (int64_t j = first; j < last; ++j) {
    ahead.ask_block(j);
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
