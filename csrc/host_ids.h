// The ids of one feature, made rows of its stack on the host: checked, narrowed, shifted and counted.
//
// Six ids of a table of 10 rows that begins at row 100 of a stack of 120; padding_id -1; others out of range dropped:
//
//   ids         7  -1   3 |  12   9   0       two samples of valency 3, or splits 0 3 6
//   rectangle   107 120 103   120 109 100     what is absent keeps its place and is 120, one past the end
//               ends 3 6
//   ragged      107 103   109 100             what is absent is left out
//               ends 2 4
//   counts      4 present, 1 padding, 1 outside
//
// The law, for any numbers whatever:
//   1. An id is padding if it equals the padding id; else present inside of [0, vocabulary); else outside.
//   2. Nothing outside of the arrays is read or written. An id outside where none may be, and splits that do not rise
//      from 0 to the number of ids: the job is refused, and what was written until then means nothing.
//   3. The gain of an id is 1 / n (mean) or 1 / sqrt(n) (sqrtn) in double precision, rounded once, with n the ids
//      present in its sample, and 0 where there are none.
//
// Plain loops, no XLA types: any C++17 compiler will do.

#ifndef EMBAX_CSRC_HOST_IDS_H_
#define EMBAX_CSRC_HOST_IDS_H_

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace embax::host {

// What a plan says about the ids of a feature. Every field is an int64: Python packs it.
struct Rule {
  int64_t vocabulary;   // at most 2^31 - 2
  int64_t row_offset;   // of the table in its stack
  int64_t absent;       // the stack's rows
  int64_t padding;      // the padding id, if there is one
  int64_t has_padding;  // 0 or 1
  int64_t drop;         // 1: an id outside is absent; 0: the job is refused
  int64_t combiner;     // 0: gains of 1; 1: mean; 2: sqrtn
};

// The ids of a feature in one batch, and where their rows go. Every field is an int64 or an address.
struct Job {
  const void* ids;       // [count], of the type that the caller says
  int64_t count;
  int64_t samples;
  int64_t valency;       // ids of a sample in a rectangle
  const void* splits;    // [samples + 1]: the ids are ragged; nullptr: they are a rectangle
  int64_t splits_bytes;  // 4 or 8, of one split
  int32_t* rows;         // [count]
  int32_t* ends;         // [samples]: the offsets at which the samples end
  int64_t first;         // the offset at which the first sample begins
  float* gains;          // [count], or nullptr: there are none
  int32_t* counts;       // present, padding, outside, at 0, counts_stride and twice that
  int64_t counts_stride;
};

static_assert(sizeof(void*) != 8 || (sizeof(Rule) == 7 * 8 && sizeof(Job) == 12 * 8), "host.py packs these");

constexpr int64_t kRefused = -1;
constexpr int64_t kBlock = 4096;  // ids whose rows stay in the first cache until their gains are written

struct Tally {
  int64_t present = 0;
  int64_t padding = 0;
};

// Counts `count` ids, and writes the row of each in its place.
using Place = Tally (*)(const void* ids, int64_t count, const Rule& rule, int32_t* rows);

// Whether the padding id is a number of the type T; if not, no id equals it.
template <typename T>
bool holds(int64_t padding) {
  if (std::is_unsigned<T>::value) {
    return padding >= 0 && static_cast<uint64_t>(padding) <= static_cast<uint64_t>(std::numeric_limits<T>::max());
  }
  return padding >= static_cast<int64_t>(std::numeric_limits<T>::min()) &&
         padding <= static_cast<int64_t>(std::numeric_limits<T>::max());
}

// 64-bit ids are told apart by their halves: every processor compares 32-bit numbers in vectors.
template <typename T>
inline uint32_t high_half(T id) {
  return sizeof(T) == 8 ? static_cast<uint32_t>(static_cast<uint64_t>(id) >> 32) : 0;
}

template <typename T, bool padded>
Tally place_block(const T* ids, int32_t count, const Rule& rule, int32_t* rows) {
  const uint32_t vocabulary = static_cast<uint32_t>(rule.vocabulary), absent = static_cast<uint32_t>(rule.absent);
  const uint32_t row_offset = static_cast<uint32_t>(rule.row_offset);
  const uint32_t padding = static_cast<uint32_t>(rule.padding);
  const uint32_t padding_high = high_half(static_cast<T>(rule.padding));
  int32_t present = 0, paddings = 0;
  for (int32_t i = 0; i < count; ++i) {
    // The sign of a negative id becomes a number beyond every vocabulary.
    const uint32_t id = static_cast<uint32_t>(ids[i]), high = high_half(ids[i]);
    const bool is_padding = padded && (id == padding) & (high == padding_high);
    const bool is_present = (id < vocabulary) & (high == 0) & !is_padding;
    rows[i] = static_cast<int32_t>(is_present ? id + row_offset : absent);
    present += is_present;
    paddings += is_padding;
  }
  Tally tally;
  tally.present = present;
  tally.padding = paddings;
  return tally;
}

template <typename T>
Tally place(const void* ids, int64_t count, const Rule& rule, int32_t* rows) {
  const bool padded = rule.has_padding && holds<T>(rule.padding);
  Tally total;
  for (int64_t i = 0; i < count; i += kBlock) {
    const int32_t size = static_cast<int32_t>(count - i < kBlock ? count - i : kBlock);
    const T* block = static_cast<const T*>(ids) + i;
    const Tally tally = padded ? place_block<T, true>(block, size, rule, rows + i)
                               : place_block<T, false>(block, size, rule, rows + i);
    total.present += tally.present;
    total.padding += tally.padding;
  }
  return total;
}

// The gains of samples by the number of their ids; those of short samples are computed once.
struct Gains {
  int64_t combiner;
  float known[64] = {};

  float computed(int64_t present) const {
    const double number = static_cast<double>(present);
    return static_cast<float>(1.0 / (combiner == 2 ? std::sqrt(number) : number));
  }

  float of(int64_t present) {
    if (combiner == 0) return 1.0f;
    if (present == 0) return 0.0f;
    if (present >= 64) return computed(present);
    if (known[present] == 0.0f) known[present] = computed(present);
    return known[present];
  }
};

inline void fill_gains(float* gains, int64_t count, float gain) {
  for (int64_t i = 0; i < count; ++i) gains[i] = gain;
}

// Writes the counts; returns whether the rule allows them.
inline bool counted(const Rule& rule, const Job& job, const Tally& tally) {
  const int64_t outside = job.count - tally.present - tally.padding;
  job.counts[0] = static_cast<int32_t>(tally.present);
  job.counts[job.counts_stride] = static_cast<int32_t>(tally.padding);
  job.counts[2 * job.counts_stride] = static_cast<int32_t>(outside);
  return rule.drop != 0 || outside == 0;
}

// Gains of samples some of whose ids are absent: an absent id has its sample's gain too, and no one reads it.
inline void rectangle_gains(const Job& job, int64_t begin, int64_t end, int32_t absent, Gains& gains) {
  for (int64_t at = begin; at < end; at += job.valency) {
    int64_t present = job.valency;
    for (int64_t j = at; j < at + job.valency; ++j) present -= job.rows[j] == absent;
    fill_gains(job.gains + at, job.valency, gains.of(present));
  }
}

// Returns the rows written, one for each id, or kRefused.
inline int64_t fill_rectangle(Place place, int64_t id_bytes, const Rule& rule, const Job& job) {
  if (job.valency < 0 || job.samples < 0 || (job.valency == 0 && job.count != 0)) return kRefused;
  if (job.valency > 0 && (job.count / job.valency != job.samples || job.count % job.valency != 0)) return kRefused;
  // The only id of a sample has gain 1, absent or not: the batch has no gains for such a feature by itself.
  Gains gains{job.valency == 1 ? 0 : rule.combiner};
  const int64_t step = job.valency == 0 ? job.samples : job.valency < kBlock ? kBlock / job.valency : 1;
  Tally total;
  for (int64_t sample = 0; sample < job.samples; sample += step) {
    const int64_t samples = job.samples - sample < step ? job.samples - sample : step;
    const int64_t begin = sample * job.valency, end = begin + samples * job.valency;
    const Tally tally = place(static_cast<const char*>(job.ids) + begin * id_bytes, end - begin, rule, job.rows + begin);
    total.present += tally.present;
    total.padding += tally.padding;
    for (int64_t i = 0; i < samples; ++i) {
      job.ends[sample + i] = static_cast<int32_t>(job.first + begin + (i + 1) * job.valency);
    }
    if (job.gains == nullptr) continue;
    if (tally.present == end - begin || gains.combiner == 0) {
      fill_gains(job.gains + begin, end - begin, gains.of(job.valency));
    } else {
      rectangle_gains(job, begin, end, static_cast<int32_t>(rule.absent), gains);
    }
  }
  return counted(rule, job, total) ? job.count : kRefused;
}

inline int64_t split_at(const Job& job, int64_t sample) {
  return job.splits_bytes == 8 ? static_cast<const int64_t*>(job.splits)[sample]
                               : static_cast<const int32_t*>(job.splits)[sample];
}

// Moves the rows of [begin, end) that are present to `to` and after it; `to` is at most `begin`. Returns how many.
inline int64_t compact(int32_t* rows, int64_t begin, int64_t end, int64_t to, int32_t absent) {
  int64_t at = to;
  // Every row is written, and one that is absent is written over by the next: no jump to guess.
  for (int64_t i = begin; i < end; ++i) {
    const int32_t row = rows[i];
    rows[at] = row;
    at += row != absent;
  }
  return at - to;
}

// Returns the rows written, as many as ids are present, or kRefused.
inline int64_t fill_ragged(Place place, const Rule& rule, const Job& job) {
  if (job.samples < 0 || job.count < 0 || split_at(job, 0) != 0) return kRefused;
  const Tally total = place(job.ids, job.count, rule, job.rows);
  if (!counted(rule, job, total)) return kRefused;
  const bool whole = total.present == job.count;
  Gains gains{rule.combiner};
  int64_t begin = 0, at = 0;
  for (int64_t sample = 0; sample < job.samples; ++sample) {
    const int64_t end = split_at(job, sample + 1);
    if (end < begin || end > job.count) return kRefused;
    const int64_t present =
        whole ? end - begin : compact(job.rows, begin, end, at, static_cast<int32_t>(rule.absent));
    if (job.gains != nullptr) fill_gains(job.gains + at, present, gains.of(present));
    at += present;
    begin = end;
    job.ends[sample] = static_cast<int32_t>(job.first + at);
  }
  return begin == job.count ? at : kRefused;
}

}  // namespace embax::host

#endif  // EMBAX_CSRC_HOST_IDS_H_
