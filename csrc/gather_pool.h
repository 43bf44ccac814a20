// Gather and pool: out[s] = sum over j in sample s of gains[j] * table[ids[j]].
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
//
// Plain loops, no XLA types: any C++17 compiler will do.

#ifndef EMBAX_CSRC_GATHER_POOL_H_
#define EMBAX_CSRC_GATHER_POOL_H_

#include <cstdint>

// One copy of a function per vector width, chosen when the library is loaded (needs glibc's ifunc).
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define EMBAX_EACH_VECTOR_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EMBAX_EACH_VECTOR_WIDTH
#endif

#if defined(__clang__)
#define EMBAX_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define EMBAX_VECTORIZE _Pragma("GCC ivdep")
#else
#define EMBAX_VECTORIZE
#endif

#if defined(__GNUC__)
#define EMBAX_INLINE inline __attribute__((always_inline))
#else
#define EMBAX_INLINE inline
#endif

namespace embax {

struct GatherPool {
  const float* table;      // [rows, dim]
  int64_t rows;
  int64_t dim;
  const int32_t* ids;      // [capacity]
  const float* gains;      // [capacity], or nullptr: every gain is 1
  int64_t capacity;
  const int32_t* offsets;  // [samples + 1]
  int64_t samples;
  float* out;              // [samples, dim]
};

// Positions between asking memory for a row and summing it, and the most of a row to ask for: the hardware
// prefetcher follows a longer row by itself.
constexpr int64_t kPrefetchAhead = 32;
constexpr int64_t kPrefetchBytes = 1024;
constexpr int64_t kCacheLine = 64;

EMBAX_INLINE int64_t clamped_offset(const GatherPool& work, int64_t sample) {
  const int64_t offset = work.offsets[sample];
  return offset < 0 ? 0 : offset > work.capacity ? work.capacity : offset;
}

// The row named at position j, or nullptr if it is absent.
EMBAX_INLINE const float* row_at(const GatherPool& work, int64_t j) {
  const int64_t id = work.ids[j];
  return id < 0 || id >= work.rows ? nullptr : work.table + id * work.dim;
}

EMBAX_INLINE void prefetch_row(const GatherPool& work, int64_t j) {
#if defined(__GNUC__)
  if (j >= work.capacity) return;
  const float* row = row_at(work, j);
  if (row == nullptr) return;
  const int64_t size = work.dim * static_cast<int64_t>(sizeof(float));
  const char* at = reinterpret_cast<const char*>(row);
  const char* end = at + (size < kPrefetchBytes ? size : kPrefetchBytes);
  at -= reinterpret_cast<uintptr_t>(at) % kCacheLine;  // a row may begin and end inside a line
  for (; at < end; at += kCacheLine) __builtin_prefetch(at);
#else
  (void)work, (void)j;
#endif
}

// Sums `width` columns of the positions [begin, end), starting at `column`, into sum[0 .. width). The width is known to
// the compiler, so the running sum stays in registers.
template <int width>
EMBAX_INLINE void pool_columns(const GatherPool& work, int64_t begin, int64_t end, int64_t column, float* sum) {
  float total[width] = {};
  for (int64_t j = begin; j < end; ++j) {
    if (column == 0) prefetch_row(work, j + kPrefetchAhead);
    const float* row = row_at(work, j);
    if (row == nullptr) continue;
    const float gain = work.gains == nullptr ? 1.0f : work.gains[j];
    EMBAX_VECTORIZE
    for (int d = 0; d < width; ++d) total[d] += gain * row[column + d];
  }
  for (int d = 0; d < width; ++d) sum[column + d] = total[d];
}

// Pools the samples [first, last), each in strips of columns: as many of 64 as fit, then 32, 16, ... 1.
EMBAX_EACH_VECTOR_WIDTH
inline void gather_pool(const GatherPool& work, int64_t first, int64_t last) {
  for (int64_t sample = first; sample < last; ++sample) {
    const int64_t begin = clamped_offset(work, sample);
    const int64_t end = clamped_offset(work, sample + 1);
    float* sum = work.out + sample * work.dim;
    int64_t column = 0;
    for (; work.dim - column >= 64; column += 64) pool_columns<64>(work, begin, end, column, sum);
    const int64_t rest = work.dim - column;
    if (rest & 32) pool_columns<32>(work, begin, end, column, sum), column += 32;
    if (rest & 16) pool_columns<16>(work, begin, end, column, sum), column += 16;
    if (rest & 8) pool_columns<8>(work, begin, end, column, sum), column += 8;
    if (rest & 4) pool_columns<4>(work, begin, end, column, sum), column += 4;
    if (rest & 2) pool_columns<2>(work, begin, end, column, sum), column += 2;
    if (rest & 1) pool_columns<1>(work, begin, end, column, sum);
  }
}

}  // namespace embax

#endif  // EMBAX_CSRC_GATHER_POOL_H_
