// The occurrences of rows in a batch, sorted by row: what every step and every sparse gradient is made of.
//
// An entry is row << 32 | place. The sort is by row alone, least significant digit first, and stable, so the places of a
// row stay in their order; its outcome does not depend on the number of threads. The first pass reads the ids themselves:
// nothing is stored unsorted. Scratch: two entries of 8 bytes an id, 4 bytes more with gains, and the digits' counts, at
// most 512 KiB.

#ifndef EMBAX_CSRC_OCCURRENCES_H_
#define EMBAX_CSRC_OCCURRENCES_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace embax {

// Calls visit(place, sample, row) for every id that is present among the positions [first, last), each at most once.
// Offsets and samples may be anything: nothing outside the arrays is read.
template <typename Visit>
void visit_present(const Ids& ids, int64_t rows, int64_t first, int64_t last, const Visit& visit) {
  const auto present = [&](int64_t row) { return static_cast<uint64_t>(row) < static_cast<uint64_t>(rows); };
  if (ids.offsets == nullptr) {
    for (int64_t j = first; j < last; ++j) {
      const int64_t row = ids.ids[j], sample = ids.sample_of == nullptr ? j : ids.sample_of[j];
      if (present(row) && static_cast<uint64_t>(sample) < static_cast<uint64_t>(ids.samples)) visit(j, sample, row);
    }
    return;
  }
  const int32_t* owner = std::upper_bound(ids.offsets, ids.offsets + ids.samples + 1, first);
  int64_t sample = std::max<int64_t>(0, owner - ids.offsets - 1), at = first;
  for (; sample < ids.samples && at < last; ++sample) {
    const int64_t begin = std::max<int64_t>(at, ids.offsets[sample]);
    const int64_t end = std::min<int64_t>(last, ids.offsets[sample + 1]);
    for (int64_t j = begin; j < end; ++j) {
      if (present(ids.ids[j])) visit(j, sample, ids.ids[j]);
    }
    at = std::max(at, end);
  }
}

class Occurrences {
 public:
  // `places` tells what an entry's place is: the position of the id, else its sample.
  template <typename Pool>
  Occurrences(Team<Pool>& team, const Ids& ids, int64_t rows, bool places)
      : capacity_(ids.capacity),
        chunks_(rising(ids) ? std::min(kMostChunks, team.threads()) : 1),
        scratch_(static_cast<size_t>(capacity_) * (places ? 20 : 16)) {
    buffers_[0] = reinterpret_cast<uint64_t*>(scratch_.data());
    buffers_[1] = buffers_[0] + capacity_;
    if (places) sample_of_ = reinterpret_cast<int32_t*>(buffers_[1] + capacity_);
    const auto visit_chunk = [&](int64_t chunk, const auto& use) {
      visit_present(ids, rows, capacity_ * chunk / chunks_, capacity_ * (chunk + 1) / chunks_, use);
    };
    const auto entry = [&](int64_t place, int64_t sample, int64_t row) {
      if (places) sample_of_[place] = static_cast<int32_t>(sample);
      return static_cast<uint64_t>(row) << 32 | static_cast<uint64_t>(places ? place : sample);
    };
    const bool sorted = ids.offsets == nullptr && ids.sample_of == nullptr && std::is_sorted(ids.ids, ids.ids + capacity_);
    if (capacity_ <= kSmall || sorted) {
      visit_present(ids, rows, 0, capacity_, [&](int64_t place, int64_t sample, int64_t row) {
        buffers_[0][count_++] = entry(place, sample, row);
      });
      if (sorted) return;
      std::stable_sort(buffers_[0], buffers_[0] + count_, [](uint64_t a, uint64_t b) { return a >> 32 < b >> 32; });
      return;
    }
    int bits = 1;
    while (bits < 31 && (rows - 1) >> bits) ++bits;
    const int widest = capacity_ < 8192 ? 8 : 11;
    const int passes = (bits + widest - 1) / widest;
    const int width = (bits + passes - 1) / passes;
    counts_.resize(static_cast<size_t>(chunks_) << width);

    count_ = pass(team, 0, width, buffers_[0],
                  [&](int64_t chunk, const auto& put) {
                    visit_chunk(chunk, [&](int64_t, int64_t, int64_t row) { put(static_cast<uint64_t>(row) << 32); });
                  },
                  [&](int64_t chunk, const auto& put) {
                    visit_chunk(chunk, [&](int64_t place, int64_t sample, int64_t row) {
                      put(entry(place, sample, row));
                    });
                  });
    for (int digit = 1; digit < passes; ++digit) {
      const uint64_t* from = buffers_[0];
      const auto read = [this, from](int64_t chunk, const auto& put) {
        const int64_t last = count_ * (chunk + 1) / chunks_;
        for (int64_t i = count_ * chunk / chunks_; i < last; ++i) put(from[i]);
      };
      pass(team, digit * width, width, buffers_[1], read, read);
      std::swap(buffers_[0], buffers_[1]);
    }
  }

  const uint64_t* entries() const { return buffers_[0]; }
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
  static constexpr int64_t kMostChunks = 64;

  // Where offsets fall, whose an id is depends on where the reading begins: one chunk, then, for any number of threads.
  static bool rising(const Ids& ids) {
    return ids.offsets == nullptr || std::is_sorted(ids.offsets, ids.offsets + ids.samples + 1);
  }

  // Moves the entries that `read` gives to `to`, ordered by `width` bits of the row from `shift` on; returns how many.
  // `count_read` gives entries with the same rows in the same order.
  template <typename Pool, typename CountRead, typename Read>
  int64_t pass(Team<Pool>& team, int shift, int width, uint64_t* to, const CountRead& count_read, const Read& read) {
    const int64_t buckets = int64_t{1} << width;
    const uint64_t mask = static_cast<uint64_t>(buckets - 1);
    const int low = 32 + shift;
    team.run(chunks_, [&](int64_t chunk) {
      int32_t* counts = counts_.data() + chunk * buckets;
      std::fill(counts, counts + buckets, 0);
      count_read(chunk, [=](uint64_t entry) { ++counts[entry >> low & mask]; });
    });
    int32_t total = 0;
    for (int64_t bucket = 0; bucket < buckets; ++bucket) {
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        total += std::exchange(counts_[static_cast<size_t>(chunk * buckets + bucket)], total);
      }
    }
    team.run(chunks_, [&](int64_t chunk) {
      int32_t* places = counts_.data() + chunk * buckets;
      read(chunk, [=](uint64_t entry) { to[places[entry >> low & mask]++] = entry; });
    });
    return total;
  }

  const int64_t capacity_, chunks_;
  int64_t count_ = 0;
  Scratch scratch_;
  uint64_t* buffers_[2];
  int32_t* sample_of_ = nullptr;
  std::vector<int32_t> counts_;
};

}  // namespace embax

#endif  // EMBAX_CSRC_OCCURRENCES_H_
