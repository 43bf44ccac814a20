// What a batch needs of each part of a table: how many rows, each once a sample, and how many distinct rows.
//
// Two samples, a table of 8 rows in 2 parts of 4:
//
//   rows      5 5 1 | 5 0       the second 5 of a sample is not counted again
//   ids       part 0: 1 0       part 1: 5 5
//   distinct  part 0: 0 1       part 1: 5
//
// A bit for each row of the table says whether the batch had it; where the table is so large that these bits are more
// work than the ids, a hash table of the rows does. Within a sample a few bits, chosen by the row, tell almost every row
// that is new there; one that they do not tell is looked for.

#ifndef EMBAX_CSRC_HOST_PARTITIONS_H_
#define EMBAX_CSRC_HOST_PARTITIONS_H_

#include <cstdint>
#include <cstring>

#include "scratch.h"

namespace embax::host {

// Division of numbers below 2^31 by one that stays the same: a product and a shift (Granlund and Montgomery, 1994). With
// 2^s >= by, the factor is 2^(31 + s) / by and at most 1 more, too much by less than one part in 2^31.
struct Divisor {
  explicit Divisor(int64_t by) {
    while ((int64_t{1} << (shift - 31)) < by) ++shift;
    factor = (uint64_t{1} << shift) / static_cast<uint64_t>(by) + 1;
  }
  uint32_t of(uint32_t number) const { return static_cast<uint32_t>((uint64_t{number} * factor) >> shift); }
  int shift = 31;
  uint64_t factor;
};

constexpr uint32_t kHash = 0x9E3779B1u;

// The rows of [0, rows) that were seen: a bit for each.
class SeenBits {
 public:
  static int64_t bytes(int64_t rows) { return (rows + 63) / 64 * 8; }
  SeenBits(char* memory, int64_t rows) : words_(reinterpret_cast<uint64_t*>(memory)) {
    std::memset(memory, 0, static_cast<size_t>(bytes(rows)));
  }
  bool add(int32_t row) {
    uint64_t& word = words_[static_cast<uint32_t>(row) >> 6];
    const uint64_t bit = uint64_t{1} << (row & 63);
    const bool fresh = (word & bit) == 0;
    word |= bit;
    return fresh;
  }

 private:
  uint64_t* words_;
};

// The same of any rows, at most half as many as there are places.
class SeenTable {
 public:
  static int bits(int64_t count) {
    int bits = 4;
    while ((int64_t{1} << bits) < 2 * count) ++bits;
    return bits;
  }
  static int64_t bytes(int64_t count) { return int64_t{4} << bits(count); }
  SeenTable(char* memory, int64_t count) : rows_(reinterpret_cast<int32_t*>(memory)), bits_(bits(count)) {
    std::memset(memory, 0xff, static_cast<size_t>(bytes(count)));
  }
  bool add(int32_t row) {
    const uint32_t mask = static_cast<uint32_t>((int64_t{1} << bits_) - 1);
    uint32_t at = (static_cast<uint32_t>(row) * kHash) >> (32 - bits_);
    while (rows_[at] != row && rows_[at] >= 0) at = (at + 1) & mask;
    const bool fresh = rows_[at] < 0;
    rows_[at] = row;
    return fresh;
  }

 private:
  int32_t* rows_;
  int bits_;
};

// Whether a row stood in its sample before: asked of the sample's rows one after another.
class SampleRows {
 public:
  static constexpr int64_t kMost = 1024;  // rows of a sample; longer ones are put into a SeenTable

  explicit SampleRows(int64_t size) {
    // Four words for 8 rows, so that few rows share a bit.
    while (words_ < kMost / 32 && words_ * 8 < size * 4) words_ *= 2;
    for (uint32_t i = 0; i < words_; ++i) bits_[i] = 0;
  }
  bool is_new(const int32_t* begin, const int32_t* row) {
    const uint32_t hash = (static_cast<uint32_t>(*row) * kHash) >> 16;
    uint64_t& word = bits_[(hash >> 6) & (words_ - 1)];
    const uint64_t bit = uint64_t{1} << (hash & 63);
    if ((word & bit) == 0) {
      word |= bit;
      return true;
    }
    int32_t found = 0;
    for (const int32_t* other = begin; other < row; ++other) found |= *other == *row;
    return found == 0;
  }

 private:
  uint32_t words_ = 1;
  uint64_t bits_[kMost / 32];
};

// What is counted, and where.
struct Partitions {
  int64_t part_rows;
  int64_t parts;
  int32_t* ids;       // [parts]
  int32_t* distinct;  // [parts]
};

template <typename Seen>
struct Counter {
  Partitions out;
  Seen seen;
  char* spare;  // for the rows of a long sample
  Divisor part{out.part_rows};
  uint32_t all = static_cast<uint32_t>(out.part_rows * out.parts);

  bool present(int32_t row) const { return static_cast<uint32_t>(row) < all; }

  void count(int32_t row) {
    const uint32_t own = part.of(static_cast<uint32_t>(row));
    ++out.ids[own];
    out.distinct[own] += seen.add(row);
  }

  // Rows that are samples by themselves.
  void each(const int32_t* begin, const int32_t* end) {
    if (out.parts > 1) {
      for (; begin < end; ++begin) {
        if (present(*begin)) count(*begin);
      }
      return;
    }
    int32_t ids = 0, distinct = 0;
    for (; begin < end; ++begin) {
      if (!present(*begin)) continue;
      ++ids;
      distinct += seen.add(*begin);
    }
    out.ids[0] += ids;
    out.distinct[0] += distinct;
  }

  void sample(const int32_t* begin, const int32_t* end) {
    if (end - begin <= SampleRows::kMost) {
      SampleRows own(end - begin);
      for (const int32_t* row = begin; row < end; ++row) {
        if (present(*row) && own.is_new(begin, row)) count(*row);
      }
    } else {
      SeenTable own(spare, end - begin);
      for (const int32_t* row = begin; row < end; ++row) {
        if (present(*row) && own.add(*row)) count(*row);
      }
    }
  }
};

// Counts rows inside of [0, part_rows * parts) of the samples, sample s having those from offsets[s] to offsets[s + 1] of
// `rows`; offsets that do not rise within [0, count] give their sample nothing. part_rows * parts is below 2^31.
inline void count_partitions(const int32_t* rows, int64_t count, const int32_t* offsets, int64_t samples,
                             const Partitions& out) {
  int64_t longest = 0, total = 0;
  bool rising = true;
  for (int64_t sample = 0; sample < samples; ++sample) {
    const int64_t begin = offsets[sample], end = offsets[sample + 1];
    const bool fits = begin >= 0 && end <= count && end >= begin;
    const int64_t size = fits ? end - begin : 0;
    rising &= fits;
    longest = size > longest ? size : longest;
    total += size;
  }
  const int64_t all = out.part_rows * out.parts;
  const bool by_bits = all / 512 <= count;
  const int64_t bytes = by_bits ? SeenBits::bytes(all) : SeenTable::bytes(total);
  const int64_t spare = longest > SampleRows::kMost ? SeenTable::bytes(longest) : 0;
  Scratch scratch(static_cast<size_t>(bytes + spare));
  for (int64_t part = 0; part < out.parts; ++part) out.ids[part] = out.distinct[part] = 0;
  auto count_all = [&](auto seen) {
    Counter<decltype(seen)> counter{out, seen, scratch.data() + bytes};
    if (rising && longest == 1) return counter.each(rows + offsets[0], rows + offsets[samples]);
    for (int64_t sample = 0; sample < samples; ++sample) {
      const int64_t begin = offsets[sample], end = offsets[sample + 1];
      if (begin >= 0 && end <= count && begin < end) counter.sample(rows + begin, rows + end);
    }
  };
  if (by_bits) {
    count_all(SeenBits(scratch.data(), all));
  } else {
    count_all(SeenTable(scratch.data(), total));
  }
}

}  // namespace embax::host

#endif  // EMBAX_CSRC_HOST_PARTITIONS_H_
