// The occurrences of rows in a batch, sorted by row: what every step and every sparse gradient is made of.
//
// An entry is row << 32 | place. They are sorted by row alone, so the places of a row stay in their order; the outcome
// does not depend on the number of threads. Scratch: 12 bytes an id, 16 where a row and a place have more than 32 bits
// beside a digit, 4 bytes more with gains.

#ifndef EMBAX_CSRC_OCCURRENCES_H_
#define EMBAX_CSRC_OCCURRENCES_H_

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "absent.h"
#include "kernels.h"
#include "parallel.h"
#include "portable.h"
#include "radix.h"
#include "scratch.h"

namespace embax {

// Calls visit(place, sample, row) for every id that is present, from the front, each at most once. Offsets and samples
// may be anything: nothing outside the arrays is read.
template <typename Visit>
void visit_present(const Ids& ids, int64_t rows, const Visit& visit) {
  const auto present = [&](int64_t row) { return static_cast<uint64_t>(row) < static_cast<uint64_t>(rows); };
  if (ids.offsets == nullptr) {
    for (int64_t j = 0; j < ids.capacity; ++j) {
      const int64_t row = ids.ids[j], sample = ids.sample_of == nullptr ? j : ids.sample_of[j];
      if (present(row) && static_cast<uint64_t>(sample) < static_cast<uint64_t>(ids.samples)) visit(j, sample, row);
    }
    return;
  }
  for (int64_t sample = 0, at = 0; sample < ids.samples && at < ids.capacity; ++sample) {
    const int64_t begin = std::max<int64_t>(at, ids.offsets[sample]);
    const int64_t end = std::min<int64_t>(ids.capacity, ids.offsets[sample + 1]);
    for (int64_t j = begin; j < end; ++j) {
      if (present(ids.ids[j])) visit(j, sample, ids.ids[j]);
    }
    at = std::max(at, end);
  }
}

// The ids of a batch that are present, chunk by chunk, for RadixSort.
class PresentIds {
 public:
  // With `sample_of`, an entry's place is the position of the id, whose sample goes there, else it is the sample.
  PresentIds(const Ids& ids, int64_t rows, int32_t* sample_of, int64_t chunks)
      : ids_(ids), rows_(static_cast<uint64_t>(rows)), sample_of_(sample_of), chunks_(chunks), last_(ids.capacity) {
    // Rising offsets give every position between the first and the last of them to one sample.
    if (ids.offsets != nullptr) first_ = bound(ids.offsets[0]), last_ = bound(ids.offsets[ids.samples]);
    often_absent_ = ids.offsets != nullptr && EMBAX_ISA::often_absent(ids.ids + first_, last_ - first_, rows);
  }

  int64_t chunks() const { return chunks_; }

  // What a loop over ids reads is copied first: the compiler would fetch it anew after every entry that is stored.
  template <typename Use>
  EMBAX_INLINE void rows(int64_t chunk, const Use given) const {
    const Use use = given;
    const int64_t last = edge(chunk + 1);
    const int32_t* ids = ids_.ids;
    const uint64_t rows = rows_;
    if (ids_.offsets == nullptr) return own(chunk, [=](int64_t, uint32_t row, int64_t) { use(row); });
    if (often_absent_) return rows_kept(edge(chunk), last, use);
    for (int64_t j = edge(chunk); j < last; ++j) {
      if (is_below(ids[j], rows)) use(static_cast<uint32_t>(ids[j]));
    }
  }

  template <typename Use>
  EMBAX_INLINE void entries(int64_t chunk, const Use given) const {
    const Use use = given;
    if (int32_t* const sample_of = sample_of_) {
      each(chunk, [=](int64_t j, uint32_t row, int64_t sample) {
        sample_of[j] = static_cast<int32_t>(sample);
        use(row, static_cast<uint32_t>(j));
      });
    } else {
      each(chunk, [=](int64_t, uint32_t row, int64_t sample) { use(row, static_cast<uint32_t>(sample)); });
    }
  }

 private:
  static bool is_below(int64_t number, uint64_t bound) { return static_cast<uint64_t>(number) < bound; }
  int64_t bound(int64_t offset) const { return std::clamp<int64_t>(offset, 0, ids_.capacity); }
  int64_t edge(int64_t chunk) const { return first_ + (last_ - first_) * chunk / chunks_; }

  template <typename Use>
  EMBAX_INLINE void each(int64_t chunk, const Use use) const {
    if (ids_.offsets == nullptr) return own(chunk, use);
    const int32_t *ids = ids_.ids, *offsets = ids_.offsets;
    const uint64_t rows = rows_;
    const int64_t last = edge(chunk + 1);
    int64_t j = edge(chunk);
    int64_t sample = std::upper_bound(offsets, offsets + ids_.samples + 1, j) - offsets - 1;
    if (often_absent_) return each_kept(j, last, sample, use);
    for (; j < last; ++sample) {
      const int64_t end = std::min<int64_t>(last, offsets[sample + 1]);
      for (; j < end; ++j) {
        if (is_below(ids[j], rows)) use(j, static_cast<uint32_t>(ids[j]), sample);
      }
    }
  }

  // The same two where many ids are absent: a wrong guess costs more than a place in an array.
  template <typename Use>
  EMBAX_APART void rows_kept(int64_t j, int64_t last, const Use use) const {
    const int32_t* ids = ids_.ids;
    const uint64_t rows = rows_;
    uint32_t kept[kTogether + 1];
    while (j < last) {
      int64_t count = 0;
      for (const int64_t end = std::min(last, j + kTogether); j < end; ++j) {
        kept[count] = static_cast<uint32_t>(ids[j]);
        count += is_below(ids[j], rows);
      }
      for (int64_t i = 0; i < count; ++i) use(kept[i]);
    }
  }

  template <typename Use>
  EMBAX_APART void each_kept(int64_t j, int64_t last, int64_t sample, const Use use) const {
    struct Kept {
      int32_t place, sample;
      uint32_t row;
    } kept[kTogether + 1];
    const int32_t *ids = ids_.ids, *offsets = ids_.offsets;
    const uint64_t rows = rows_;
    int64_t count = 0;
    const auto put = [&] {
      for (int64_t i = 0; i < count; ++i) use(kept[i].place, kept[i].row, kept[i].sample);
      count = 0;
    };
    for (; j < last; ++sample) {
      const int64_t end = std::min<int64_t>(last, offsets[sample + 1]);
      for (; j < end; ++j) {
        kept[count] = {static_cast<int32_t>(j), static_cast<int32_t>(sample), static_cast<uint32_t>(ids[j])};
        count += is_below(ids[j], rows);
        if (count == kTogether) put();
      }
    }
    put();
  }

  // The same where ids say themselves whose they are.
  template <typename Use>
  EMBAX_INLINE void own(int64_t chunk, const Use use) const {
    const int32_t *ids = ids_.ids, *sample_of = ids_.sample_of;
    const uint64_t rows = rows_, samples = static_cast<uint64_t>(ids_.samples);
    const int64_t last = edge(chunk + 1);
    for (int64_t j = edge(chunk); j < last; ++j) {
      const int64_t sample = sample_of == nullptr ? j : sample_of[j];
      if (is_below(ids[j], rows) && is_below(sample, samples)) use(j, static_cast<uint32_t>(ids[j]), sample);
    }
  }

  static constexpr int64_t kTogether = 512;

  const Ids& ids_;
  const uint64_t rows_;
  int32_t* const sample_of_;
  const int64_t chunks_;
  int64_t first_ = 0, last_;
  bool often_absent_ = false;
};

// The bits that the numbers below `count` need.
inline int bits_below(int64_t count) {
  int bits = 1;
  while (count > int64_t{1} << bits) ++bits;
  return bits;
}

class Occurrences {
 public:
  // `places` tells what an entry's place is: the position of the id, else its sample.
  template <typename Pool>
  Occurrences(Team<Pool>& team, const Ids& given, int64_t rows, bool places) {
    const int64_t capacity = given.capacity, room = capacity + (capacity & 1);
    Ids ids = given;
    std::vector<int32_t> owners;
    if (!rising(ids)) ids = with_owners(ids, rows, owners);
    const int64_t chunks = std::clamp<int64_t>(capacity / kSmallestChunk, 1, std::min(kMostChunks, team.threads()));
    const int bits = bits_below(rows), place_bits = bits_below(places ? capacity : ids.samples);
    const Digits digits = Digits::cheapest(capacity, bits, chunks);
    using Sort = RadixSort<Pool, PresentIds>;
    const bool narrow = Sort::fits_narrow(digits, bits, place_bits);

    scratch_.emplace(static_cast<size_t>(room) * (narrow ? 12 : 16) + static_cast<size_t>(places ? room * 4 : 0));
    uint64_t* first = reinterpret_cast<uint64_t*>(scratch_->data());
    uint64_t* second = first + room;
    int32_t* sample_of = nullptr;
    if (places) sample_of = reinterpret_cast<int32_t*>(scratch_->data() + room * (narrow ? 12 : 16));
    entries_ = first;
    sample_of_ = sample_of;

    const bool plain = ids.offsets == nullptr && ids.sample_of == nullptr;
    const bool sorted = plain && std::is_sorted(ids.ids, ids.ids + capacity);
    if (capacity <= kSmall || sorted) {
      const PresentIds all(ids, rows, sample_of, 1);
      all.entries(0, [&](uint32_t row, uint32_t place) { first[count_++] = uint64_t{row} << 32 | place; });
      if (!sorted) std::stable_sort(first, first + count_, [](uint64_t a, uint64_t b) { return a >> 32 < b >> 32; });
      return;
    }
    const PresentIds source(ids, rows, sample_of, chunks);
    Sort sort(team, source, digits);
    if (narrow) {
      count_ = sort.sort_narrow(reinterpret_cast<uint32_t*>(second), first, place_bits);
    } else {
      std::pair<uint64_t*, uint64_t*> buffers(first, second);
      count_ = sort.sort_wide(buffers);
      entries_ = buffers.first;
    }
  }

  const uint64_t* entries() const { return entries_; }
  int64_t count() const { return count_; }
  const int32_t* sample_of() const { return sample_of_; }

  // The rows that occur more than kHot times, in order.
  std::vector<HotRun> hot_runs() const {
    std::vector<HotRun> runs;
    const uint64_t* all = entries();
    int64_t blocks = 0;
    constexpr int64_t stride = kHot / 2;  // so long a run holds two neighbouring multiples of it
    for (int64_t i = 0; i + stride < count_; i += stride) {
      const uint64_t row = all[i] >> 32;
      if (all[i + stride] >> 32 != row || (!runs.empty() && i < runs.back().end)) continue;
      const uint64_t* begin = std::lower_bound(all, all + i, row << 32);
      const uint64_t* end = std::lower_bound(all + i, all + count_, (row + 1) << 32);
      if (end - begin <= kHot) continue;
      runs.push_back({begin - all, end - all, blocks});
      blocks += (end - begin + kBlock - 1) / kBlock;
    }
    return runs;
  }

 private:
  // Up to here a comparison sort is faster than counting digits.
  static constexpr int64_t kSmall = 128;
  // A chunk for each thread. More of them would write to the same lines of memory: those of one digit lie side by side.
  static constexpr int64_t kMostChunks = 64, kSmallestChunk = 4096;

  static bool rising(const Ids& ids) {
    return ids.offsets == nullptr || std::is_sorted(ids.offsets, ids.offsets + ids.samples + 1);
  }

  // Where offsets fall, whose an id is depends on where the reading begins: it is found out once, from the front.
  static Ids with_owners(const Ids& ids, int64_t rows, std::vector<int32_t>& owners) {
    owners.assign(static_cast<size_t>(ids.capacity), -1);
    visit_present(ids, rows, [&](int64_t j, int64_t sample, int64_t) {
      owners[static_cast<size_t>(j)] = static_cast<int32_t>(sample);
    });
    return {ids.ids, nullptr, ids.gains, ids.capacity, ids.samples, owners.data()};
  }

  std::optional<Scratch> scratch_;
  const uint64_t* entries_ = nullptr;
  const int32_t* sample_of_ = nullptr;
  int64_t count_ = 0;
};

// How many rows begin before each range of kRankedRange sorted entries; the last number is that of all rows.
constexpr int64_t kRankedRange = 1024;

template <typename Pool>
std::vector<int64_t> ranks_of_ranges(Team<Pool>& team, const uint64_t* entries, int64_t count) {
  const int64_t ranges = (count + kRankedRange - 1) / kRankedRange;
  std::vector<int64_t> ranks(static_cast<size_t>(ranges) + 1, 0);
  team.run(ranges, [&](int64_t range) {
    int64_t begins = 0;
    for (int64_t i = range * kRankedRange; i < std::min(count, (range + 1) * kRankedRange); ++i) {
      begins += i == 0 || entries[i] >> 32 != entries[i - 1] >> 32;
    }
    ranks[static_cast<size_t>(range) + 1] = begins;
  });
  for (size_t range = 1; range < ranks.size(); ++range) ranks[range] += ranks[range - 1];
  return ranks;
}

}  // namespace embax

#endif  // EMBAX_CSRC_OCCURRENCES_H_
