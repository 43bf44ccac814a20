// Ids of a stack made rows of an array that S shards share: id i of a table is in shard (i mod S + rotation) mod S, at
// place i div S after the rows of the tables before it.
//
// A table of 6 rows after 2 others of each shard, S = 2, rotation 1, shards of 5 rows; 10 is absent, one past the end:
//
//   id    0  1  2  3  4  5  absent
//   row   7  2  8  3  9  4  10

#ifndef EMBAX_CSRC_HOST_LAYOUT_H_
#define EMBAX_CSRC_HOST_LAYOUT_H_

#include <cstdint>

#include "host_partitions.h"

namespace embax::host {

// The samples of one feature. Every field is an int64: Python packs it.
struct Feature {
  int64_t samples;
  int64_t rotation;    // in [0, shards)
  int64_t row_offset;  // in the shard
};

// The ids of a part of a batch, and where their rows go. Every field is an int64 or an address.
struct Laid {
  const int32_t* ids;      // [count]
  int64_t count;
  const int32_t* offsets;  // [samples + 1]: where the ids of each sample begin, and the end
  int64_t samples;
  const Feature* features;
  int64_t feature_count;
  int64_t shard_rows;
  int64_t shards;
  int64_t absent;          // an id of at least this is absent
  int32_t* rows;           // [count]
  int32_t* ends;           // [samples]: the offsets at which the samples end
  int64_t first;           // the offset at which the first one begins
  int32_t* ids_of;         // [shards]: how many rows are needed of each, those of a sample once
  int32_t* distinct_of;    // [shards]: how many distinct ones
};

static_assert(sizeof(void*) != 8 || (sizeof(Feature) == 3 * 8 && sizeof(Laid) == 14 * 8), "host.py packs these");

inline void lay_rows(const int32_t* ids, int64_t count, const Feature& feature, const Laid& work, int32_t* rows) {
  const uint32_t shards = static_cast<uint32_t>(work.shards), shard_rows = static_cast<uint32_t>(work.shard_rows);
  const uint32_t rotation = static_cast<uint32_t>(feature.rotation), offset = static_cast<uint32_t>(feature.row_offset);
  const uint32_t known = static_cast<uint32_t>(work.absent), absent = shards * shard_rows;
  if (shards == 1) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t id = static_cast<uint32_t>(ids[i]);
      rows[i] = static_cast<int32_t>(id < known ? id + offset : absent);
    }
    return;
  }
  const Divisor by(work.shards);
  for (int64_t i = 0; i < count; ++i) {
    const bool present = static_cast<uint32_t>(ids[i]) < known;
    const uint32_t id = present ? static_cast<uint32_t>(ids[i]) : 0, place = by.of(id);
    uint32_t shard = id - place * shards + rotation;
    shard -= shard >= shards ? shards : 0;
    rows[i] = static_cast<int32_t>(present ? shard * shard_rows + place + offset : absent);
  }
}

// Whether the features have all samples, and offsets rise from 0 to the number of ids.
inline bool fits(const Laid& work) {
  int64_t samples = 0;
  for (int64_t number = 0; number < work.feature_count; ++number) {
    const Feature& feature = work.features[number];
    if (feature.samples < 0 || feature.samples > work.samples - samples) return false;
    if (feature.rotation < 0 || feature.rotation >= work.shards) return false;
    samples += feature.samples;
  }
  bool rising = work.offsets[0] == 0 && work.offsets[work.samples] == work.count;
  for (int64_t i = 0; i < work.samples; ++i) rising &= work.offsets[i] <= work.offsets[i + 1];
  return rising && samples == work.samples;
}

// Returns whether the work fits; if not, nothing is written. `rows` may be `ids`, and `ends` may be `offsets` + 1.
inline bool lay(const Laid& work) {
  if (!fits(work)) return false;
  int64_t sample = 0;
  for (int64_t number = 0; number < work.feature_count; ++number) {
    const Feature& feature = work.features[number];
    const int64_t begin = work.offsets[sample], end = work.offsets[sample + feature.samples];
    lay_rows(work.ids + begin, end - begin, feature, work, work.rows + begin);
    sample += feature.samples;
  }
  count_partitions(work.rows, work.count, work.offsets, work.samples,
                   {work.shard_rows, work.shards, work.ids_of, work.distinct_of});
  for (int64_t i = 0; i < work.samples; ++i) work.ends[i] = static_cast<int32_t>(work.first + work.offsets[i + 1]);
  return true;
}

}  // namespace embax::host

#endif  // EMBAX_CSRC_HOST_LAYOUT_H_
