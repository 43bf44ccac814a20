// What a batch needs of each part of a table: how many rows, each once a sample, and how many distinct rows.
//
// Two samples, a table of 8 rows in 2 parts of 4:
//
//   rows      5 5 1 | 5 0       the second 5 of a sample is not counted again
//   ids       part 0: 1 0       part 1: 5 5
//   distinct  part 0: 0 1       part 1: 5
//
// A table of the rows that were seen says of each which sample saw it last: one look tells both.

#ifndef EMBAX_CSRC_HOST_PARTITIONS_H_
#define EMBAX_CSRC_HOST_PARTITIONS_H_

#include <cstdint>
#include <memory>
#include <new>

namespace embax::host {

// Counts rows inside of [0, part_rows * parts) of the samples, sample s having those from offsets[s] to offsets[s + 1] of
// `rows`; offsets that do not rise within [0, count] give their sample nothing. Returns false if there is no memory.
inline bool count_partitions(const int32_t* rows, int64_t count, const int32_t* offsets, int64_t samples,
                             int64_t part_rows, int64_t parts, int32_t* ids, int32_t* distinct) {
  struct Seen {
    int32_t row, sample;
  };
  int bits = 4;
  while ((int64_t{1} << bits) < 2 * count) ++bits;
  const std::unique_ptr<Seen[]> seen(new (std::nothrow) Seen[size_t{1} << bits]);
  if (seen == nullptr) return false;
  const uint32_t mask = static_cast<uint32_t>((int64_t{1} << bits) - 1);
  for (int64_t i = 0; i <= static_cast<int64_t>(mask); ++i) seen[static_cast<size_t>(i)] = {-1, -1};
  for (int64_t part = 0; part < parts; ++part) ids[part] = distinct[part] = 0;
  const uint64_t all = static_cast<uint64_t>(part_rows) * static_cast<uint64_t>(parts);
  const uint32_t divisor = static_cast<uint32_t>(part_rows);
  for (int64_t sample = 0; sample < samples; ++sample) {
    const int64_t begin = offsets[sample], end = offsets[sample + 1];
    if (begin < 0 || end > count) continue;
    for (int64_t i = begin; i < end; ++i) {
      const int32_t row = rows[i];
      if (static_cast<uint64_t>(int64_t{row}) >= all) continue;
      uint32_t at = (static_cast<uint32_t>(row) * 0x9E3779B1u) >> (32 - bits);
      while (seen[at].row != row && seen[at].row >= 0) at = (at + 1) & mask;
      if (seen[at].row == row && seen[at].sample == static_cast<int32_t>(sample)) continue;
      const uint32_t part = static_cast<uint32_t>(row) / divisor;
      distinct[part] += seen[at].row < 0;
      ++ids[part];
      seen[at] = {row, static_cast<int32_t>(sample)};
    }
  }
  return true;
}

}  // namespace embax::host

#endif  // EMBAX_CSRC_HOST_PARTITIONS_H_
