// Fuzzing of the host's part: the ids of a feature, the distinct rows of a batch and what it needs of parts, from any
// bytes whatever. Every
// array lies in a heap block of exactly its size, which AddressSanitizer guards; the law of host_ids.h is asserted
// besides.

#include <algorithm>
#include <cstring>
#include <set>

#include "batch.h"
#include "host_ids.h"
#include "host_layout.h"

extern "C" int64_t embax_host_lay(const embax::host::Laid* work);
extern "C" int64_t embax_host_fill(int type, const embax::host::Rule* rule, const embax::host::Job* job);
extern "C" int64_t embax_host_partitions(const int32_t* rows, int64_t count, const int32_t* offsets, int64_t samples,
                                         int64_t part_rows, int64_t parts, int32_t* ids, int32_t* distinct);
extern "C" int64_t embax_host_unique(const int32_t* rows, int64_t count, int32_t bound, int32_t* unique,
                                     int32_t* inverse);

namespace embax::test {
namespace {

// The bytes of one input, in order; zeros when they run out.
struct Bytes {
  const uint8_t* data;
  size_t left;

  template <typename T>
  T take() {
    T value{};
    const size_t size = std::min(left, sizeof(T));
    if (size > 0) std::memcpy(&value, data, size);
    data += size;
    left -= size;
    return value;
  }
  int64_t below(int64_t bound) { return take<uint16_t>() % bound; }
};

constexpr int64_t kBytes[] = {1, 2, 4, 8, 1, 2, 4, 8};  // of the types, as host_ids.cc numbers them

// Whether the id at `i` is present, by the law.
bool present(const Array<char>& ids, int type, int64_t i, const host::Rule& rule) {
  uint64_t raw = 0;
  const int64_t size = kBytes[type];
  std::memcpy(&raw, ids.data() + i * size, static_cast<size_t>(size));
  const int shift = static_cast<int>(64 - 8 * size);
  const bool is_signed = type < 4;
  const int64_t value = is_signed ? static_cast<int64_t>(raw << shift) >> shift : static_cast<int64_t>(raw);
  const bool negative = is_signed ? value < 0 : false;
  const bool huge = !is_signed && value < 0;  // beyond int64
  if (rule.has_padding && !huge && value == rule.padding) return false;
  return !negative && !huge && value < rule.vocabulary;
}

// That what was written, `written` rows, is what the law says.
void check_filled(const host::Rule& rule, const host::Job& job, int type, const Array<char>& ids, int64_t written) {
  const bool ragged = job.splits != nullptr, gained = job.gains != nullptr;
  const int32_t *rows = job.rows, *ends = job.ends, *counts = job.counts;
  const float* gains = job.gains;
  int64_t expected = 0;
  for (int64_t i = 0; i < job.count; ++i) expected += present(ids, type, i, rule);
  EMBAX_CHECK(written == (ragged ? expected : job.count), "%ld rows", static_cast<long>(written));
  EMBAX_CHECK(job.counts_stride == 0 || counts[0] == expected, "%d present", counts[0]);
  for (int64_t i = 0; i < written; ++i) {
    const bool inside = rows[i] >= rule.row_offset && rows[i] < rule.row_offset + rule.vocabulary;
    EMBAX_CHECK(inside || (!ragged && rows[i] == rule.absent), "row %d", rows[i]);
    EMBAX_CHECK(!gained || (gains[i] >= 0 && gains[i] <= 1), "a gain");
  }
  for (int64_t s = 0; s < job.samples; ++s)
    EMBAX_CHECK(ends[s] >= (s ? ends[s - 1] : job.first) && ends[s] <= job.first + written, "an end");
}

void fill(Bytes& bytes) {
  const int type = static_cast<int>(bytes.below(8));
  host::Rule rule{};
  rule.vocabulary = bytes.below(8) == 0 ? bytes.take<uint32_t>() % (uint32_t{1} << 31) - 1 : bytes.below(50);
  rule.vocabulary = std::clamp<int64_t>(rule.vocabulary, 0, (int64_t{1} << 31) - 2);
  rule.row_offset = bytes.below(20);
  rule.row_offset = std::min(rule.row_offset, (int64_t{1} << 31) - 2 - rule.vocabulary);
  rule.absent = rule.vocabulary + rule.row_offset;
  rule.has_padding = bytes.below(2);
  rule.padding = bytes.below(2) ? bytes.take<int8_t>() : bytes.take<int64_t>();
  rule.drop = bytes.below(2);
  rule.combiner = bytes.below(3);
  const bool ragged = bytes.below(2);
  host::Job job{};
  job.samples = bytes.below(40);
  job.valency = bytes.below(12);
  job.count = ragged ? bytes.below(400) : job.samples * job.valency;
  if (bytes.below(16) == 0) job.valency = bytes.take<int64_t>();  // a rectangle that does not fit its ids
  job.first = bytes.below(100);
  job.splits_bytes = bytes.below(2) ? 8 : 4;
  Array<int64_t> wide(ragged && job.splits_bytes == 8 ? job.samples + 1 : 0);
  Array<int32_t> narrow(ragged && job.splits_bytes == 4 ? job.samples + 1 : 0);
  if (ragged) {
    const bool honest = bytes.below(4) != 0;
    int64_t last = 0;
    for (int64_t s = 0; s <= job.samples; ++s) {
      const int64_t next = honest           ? (s == 0             ? 0
                                               : s == job.samples ? job.count
                                                                  : std::min(job.count, last + bytes.below(20)))
                           : bytes.below(3) ? bytes.below(400)
                                            : bytes.take<int64_t>();
      if (job.splits_bytes == 8)
        wide[s] = next;
      else
        narrow[s] = static_cast<int32_t>(next);
      last = next;
    }
    job.splits = job.splits_bytes == 8 ? static_cast<const void*>(wide.data()) : narrow.data();
  }
  Array<char> ids(job.count * kBytes[type]);
  for (int64_t i = 0; i < job.count; ++i) {
    const int64_t id =
        bytes.below(16) == 0 ? bytes.take<int64_t>() : static_cast<int64_t>(bytes.take<uint8_t>()) % 60 - 4;
    std::memcpy(ids.data() + i * kBytes[type], &id, static_cast<size_t>(kBytes[type]));
  }
  Array<int32_t> rows(job.count), ends(job.samples), counts(3 * 5);
  const bool gained = bytes.below(2);
  Array<float> gains(gained ? job.count : 0);
  job.ids = ids.data();
  job.rows = rows.data();
  job.ends = ends.data();
  job.gains = gained ? gains.data() : nullptr;
  job.counts = counts.data();
  job.counts_stride = bytes.below(6);

  const int64_t written = embax_host_fill(type, &rule, &job);
  if (written == host::kRefused) return;
  check_filled(rule, job, type, ids, written);
}

void partitions(Bytes& bytes) {
  const int64_t count = bytes.below(300), samples = bytes.below(40), part_rows = 1 + bytes.below(20);
  const int64_t parts = 1 + bytes.below(5);
  Array<int32_t> rows(count), offsets(samples + 1), ids(parts), distinct(parts);
  for (int32_t& row : rows)
    row = bytes.below(8) == 0 ? bytes.take<int32_t>() : static_cast<int32_t>(bytes.below(70)) - 5;
  const bool honest = bytes.below(4) != 0;
  int64_t last = 0;
  for (int32_t& offset : offsets) {
    if (honest) last = std::min(count, last + bytes.below(20));
    offset = honest ? static_cast<int32_t>(last) : bytes.take<int32_t>();
  }
  const int64_t done = embax_host_partitions(rows.data(), count, offsets.data(), samples, part_rows, parts, ids.data(),
                                             distinct.data());
  EMBAX_CHECK(done == 0, "refused");
  if (!honest) return;
  std::set<std::pair<int64_t, int32_t>> once;
  std::set<int32_t> all;
  for (int64_t sample = 0; sample < samples; ++sample) {
    for (int64_t i = offsets[sample]; i < offsets[sample + 1]; ++i) {
      if (rows[i] < 0 || rows[i] >= part_rows * parts) continue;
      once.insert({sample, rows[i]});
      all.insert(rows[i]);
    }
  }
  Array<int32_t> want(parts), want_distinct(parts);
  for (const auto& [sample, row] : once) ++want[row / part_rows];
  for (int32_t row : all) ++want_distinct[row / part_rows];
  for (int64_t part = 0; part < parts; ++part) {
    EMBAX_CHECK(ids[part] == want[part] && distinct[part] == want_distinct[part], "part %ld", static_cast<long>(part));
  }
}

void lay(Bytes& bytes) {
  host::Laid work{};
  work.feature_count = bytes.below(4);
  work.shards = 1 + bytes.below(5);
  work.shard_rows = bytes.below(8) == 0 ? bytes.take<uint32_t>() : 40;
  work.absent = 60;
  work.first = bytes.below(50);
  Array<host::Feature> features(work.feature_count);
  const bool honest = bytes.below(4) != 0;
  for (host::Feature& feature : features) {
    feature = {bytes.below(12), bytes.below(work.shards), bytes.below(20)};
    if (!honest) feature.samples = bytes.take<int16_t>();
    work.samples += feature.samples;
  }
  if (!honest) work.samples = bytes.below(40);
  Array<int32_t> offsets(work.samples + 1), ends(work.samples), ids_of(work.shards), distinct_of(work.shards);
  for (int64_t sample = 1; sample <= work.samples; ++sample)
    offsets[sample] = offsets[sample - 1] + static_cast<int32_t>(bytes.below(sample % 16 == 0 ? 1500 : 9));
  work.count = offsets[work.samples];
  if (!honest && work.samples > 0) offsets[bytes.below(work.samples + 1)] = bytes.take<int32_t>();
  Array<int32_t> ids(work.count), rows(work.count);
  for (int32_t& id : ids) id = bytes.below(16) == 0 ? bytes.take<int32_t>() : static_cast<int32_t>(bytes.below(66));
  work.ids = ids.data(), work.offsets = offsets.data(), work.features = features.data(), work.rows = rows.data();
  work.ends = ends.data(), work.ids_of = ids_of.data(), work.distinct_of = distinct_of.data();
  const bool done = embax_host_lay(&work) == 0;
  EMBAX_CHECK(done || !honest || work.shard_rows != 40, "refused");
  if (!done || !honest) return;
  int64_t sample = 0;
  for (const host::Feature& feature : features) {
    for (int64_t end = sample + feature.samples; sample < end; ++sample) {
      EMBAX_CHECK(ends[sample] == work.first + offsets[sample + 1], "an end");
      for (int64_t i = offsets[sample]; i < offsets[sample + 1]; ++i) {
        const bool present = ids[i] >= 0 && ids[i] < work.absent;
        const int64_t shard = (ids[i] % work.shards + feature.rotation) % work.shards;
        const int64_t row = shard * work.shard_rows + ids[i] / work.shards + feature.row_offset;
        const int64_t want = present ? row : work.shards * work.shard_rows;
        EMBAX_CHECK(rows[i] == static_cast<int32_t>(want), "row %d of id %d", rows[i], ids[i]);
      }
    }
  }
}

void unique(Bytes& bytes) {
  const int64_t count = bytes.below(500);
  const int32_t bound = bytes.below(4) == 0 ? bytes.take<int32_t>() : static_cast<int32_t>(bytes.below(60));
  Array<int32_t> rows(count), distinct(count), inverse(count);
  for (int32_t& row : rows)
    row = bytes.below(8) == 0 ? bytes.take<int32_t>() : static_cast<int32_t>(bytes.below(70)) - 5;
  const int64_t found = embax_host_unique(rows.data(), count, bound, distinct.data(), inverse.data());
  EMBAX_CHECK((found == host::kRefused) == (bound < 0), "bound %d", bound);
  if (found == host::kRefused) return;
  std::set<int32_t> want;
  for (int32_t row : rows) {
    if (row >= 0 && row < bound) want.insert(row);
  }
  EMBAX_CHECK(found == static_cast<int64_t>(want.size()) && std::equal(want.begin(), want.end(), distinct.begin()),
              "%ld rows", static_cast<long>(found));
  for (int64_t i = found; i < count; ++i) EMBAX_CHECK(distinct[i] == bound, "filled up");
  for (int64_t i = 0; i < count; ++i) {
    const bool inside = rows[i] >= 0 && rows[i] < bound;
    EMBAX_CHECK(inverse[i] >= 0 && inverse[i] < count && distinct[inverse[i]] == (inside ? rows[i] : bound), "inverse");
  }
}

}  // namespace
}  // namespace embax::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  embax::test::Bytes bytes{data, size};
  switch (bytes.below(5)) {
    case 0: embax::test::unique(bytes); break;
    case 1: embax::test::partitions(bytes); break;
    case 2: embax::test::lay(bytes); break;
    default: embax::test::fill(bytes);
  }
  return 0;
}
