// What Python calls on the host by ctypes: the ids of a feature, the distinct rows of a batch, what it needs of parts,
// and the rows of an array that shards share.

#include "host_ids.h"
#include "host_layout.h"
#include "host_partitions.h"

#include <memory>
#include <new>

namespace {

using embax::host::kRefused;

struct Type {
  embax::host::Place place;
  int64_t bytes;
};

// host.py numbers the types in this order.
constexpr Type kTypes[] = {
    {embax::host::place<int8_t>, 1},   {embax::host::place<int16_t>, 2},  {embax::host::place<int32_t>, 4},
    {embax::host::place<int64_t>, 8},  {embax::host::place<uint8_t>, 1},  {embax::host::place<uint16_t>, 2},
    {embax::host::place<uint32_t>, 4}, {embax::host::place<uint64_t>, 8},
};

constexpr int kDigitBits = 11;  // the counts of a digit's values fit the first cache, and pages their translation

struct Digits {
  int passes = 0;
  int bits = 0;
};

// As few digits as hold the numbers 0 .. bound, of equal width.
Digits digits_of(int32_t bound) {
  int bits = 1;
  while (bits < 31 && (bound >> bits) != 0) ++bits;
  Digits digits;
  digits.passes = (bits + kDigitBits - 1) / kDigitBits;
  digits.bits = (bits + digits.passes - 1) / digits.passes;
  return digits;
}

// Sorts keys by their upper halves, in place, equal ones in their order; uses a second array of the same length.
void sort_keys(uint64_t* keys, uint64_t* spare, int64_t count, int32_t bound) {
  const Digits digits = digits_of(bound);
  const uint32_t mask = (1u << digits.bits) - 1;
  uint64_t *from = keys, *to = spare;
  for (int pass = 0; pass < digits.passes; ++pass) {
    const int shift = 32 + pass * digits.bits;
    uint32_t next[1 << kDigitBits] = {};
    for (int64_t i = 0; i < count; ++i) ++next[(from[i] >> shift) & mask];
    uint32_t before = 0;
    for (uint32_t value = 0; value <= mask; ++value) {
      const uint32_t size = next[value];
      next[value] = before;
      before += size;
    }
    for (int64_t i = 0; i < count; ++i) to[next[(from[i] >> shift) & mask]++] = from[i];
    uint64_t* other = from;
    from = to;
    to = other;
  }
  if (from != keys) {
    for (int64_t i = 0; i < count; ++i) keys[i] = from[i];
  }
}

// The distinct rows of [0, bound), rising, then bound in every place left; inverse[i] is the place of rows[i] among
// them, that of the first bound if it is outside. Example: rows 5 3 -1 5, bound 7: unique 3 5 7 7, inverse 1 0 2 1.
int64_t unique_rows(const int32_t* rows, int64_t count, int32_t bound, int32_t* unique, int32_t* inverse) {
  if (count < 0 || count > std::numeric_limits<int32_t>::max() || bound < 0) return kRefused;
  const std::unique_ptr<uint64_t[]> memory(new (std::nothrow) uint64_t[2 * static_cast<size_t>(count) + 1]);
  if (memory == nullptr) return kRefused;
  uint64_t* keys = memory.get();
  for (int64_t i = 0; i < count; ++i) {
    const bool inside = rows[i] >= 0 && rows[i] < bound;
    keys[i] = static_cast<uint64_t>(inside ? rows[i] : bound) << 32 | static_cast<uint64_t>(i);
  }
  sort_keys(keys, keys + count, count, bound);
  int64_t distinct = 0, place = -1;
  int32_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t row = static_cast<int32_t>(keys[i] >> 32);
    place += row != last;
    last = row;
    unique[place] = row;
    distinct = place + (row < bound);
    inverse[static_cast<uint32_t>(keys[i])] = static_cast<int32_t>(place);
  }
  for (int64_t i = place + 1; i < count; ++i) unique[i] = bound;
  return distinct;
}

constexpr int64_t kNoMemory = -2;
constexpr int64_t kMostCounted = int64_t{1} << 30, kMostRows = (int64_t{1} << 31) - 1;

// Whether so many parts of so many rows are rows that 32 bits number.
bool shared(int64_t part_rows, int64_t parts) {
  return part_rows >= 1 && parts >= 1 && part_rows <= kMostRows && parts <= kMostRows / part_rows;
}

}  // namespace

extern "C" {

// Returns the rows written, or -1: refused.
int64_t embax_host_fill(int type, const embax::host::Rule* rule, const embax::host::Job* job) {
  if (type < 0 || type >= static_cast<int>(sizeof(kTypes) / sizeof(kTypes[0]))) return kRefused;
  return job->splits == nullptr ? embax::host::fill_rectangle(kTypes[type].place, kTypes[type].bytes, *rule, *job)
                                : embax::host::fill_ragged(kTypes[type].place, *rule, *job);
}

// Returns the number of distinct rows, or -1: no memory, or more rows than int32 can number.
int64_t embax_host_unique(const int32_t* rows, int64_t count, int32_t bound, int32_t* unique, int32_t* inverse) {
  return unique_rows(rows, count, bound, unique, inverse);
}

// Returns 0, or -1: no memory, or numbers that do not fit 32 bits.
int64_t embax_host_partitions(const int32_t* rows, int64_t count, const int32_t* offsets, int64_t samples,
                              int64_t part_rows, int64_t parts, int32_t* ids, int32_t* distinct) {
  if (count < 0 || count > kMostCounted || !shared(part_rows, parts)) return kRefused;
  try {
    embax::host::count_partitions(rows, count, offsets, samples, {part_rows, parts, ids, distinct});
  } catch (const std::bad_alloc&) {
    return kRefused;
  }
  return 0;
}

// Returns 0; -1, with nothing written: numbers, offsets or features that do not fit; -2: no memory to count.
int64_t embax_host_lay(const embax::host::Laid* work) {
  const bool fits = work->count >= 0 && work->count <= kMostCounted && work->samples >= 0 && work->feature_count >= 0 &&
                    shared(work->shard_rows, work->shards);
  if (!fits) return kRefused;
  try {
    return embax::host::lay(*work) ? 0 : kRefused;
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
}

}  // extern "C"
