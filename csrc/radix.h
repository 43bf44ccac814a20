// A stable counting sort of a batch's ids by row, digit by digit, for a team of threads.
//
// An entry is row << 32 | place. Six ids, rows 2 0 0 3 1 1 at the places 0..5, in two digits of one bit, one thread:
//
//   by the low bit    2:0  0:1  0:2 | 3:3  1:4  1:5      row : place
//   by the high bit   0:1  0:2  1:4  1:5 | 2:0  3:3
//
// Each thread takes one chunk of what a pass reads. Counting first tells where every chunk's entries of a digit go, so
// chunks are moved independently and the outcome is that of one chunk: it does not depend on the number of threads.
// The first pass reads the ids themselves. Where a row's high bits and its place fit, what lies between two passes is
// 32 bits an id, for the low bits are known from where it lies.

#ifndef EMBAX_CSRC_RADIX_H_
#define EMBAX_CSRC_RADIX_H_

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "parallel.h"

namespace embax {

// How many digits a row is cut into, and how wide they are.
struct Digits {
  int passes, width;

  // The cheapest for so many ids and rows of so many bits: moving an id takes about as long as adding up four counts.
  static Digits cheapest(int64_t ids, int bits, int64_t chunks) {
    Digits best{0, 0};
    int64_t least = 0;
    for (int passes = 1; passes <= 4; ++passes) {
      const int width = (bits + passes - 1) / passes;
      if (width > kWidest) continue;
      const int64_t cost = passes * (4 * ids / chunks + (chunks << width));
      if (best.passes == 0 || cost < least) best = {passes, width}, least = cost;
    }
    return best;
  }

  // Wider digits have more places to write to at once than a near cache holds.
  static constexpr int kWidest = 12;
};

// Where the entries of each digit go, for every part of what is read.
class Counts {
 public:
  Counts(int64_t parts, int width) : parts_(parts), buckets_(int64_t{1} << width), counts_(parts << width) {}

  int32_t* of(int64_t part) { return counts_.data() + part * buckets_; }
  void clear(int64_t part) { std::fill(of(part), of(part) + buckets_, 0); }

  // Turns counts into the place of the first entry of each; returns how many there are.
  int64_t add_up() {
    int32_t total = 0;
    for (int64_t bucket = 0; bucket < buckets_; ++bucket) {
      for (int64_t part = 0; part < parts_; ++part) total += std::exchange(of(part)[bucket], total);
    }
    return total;
  }

 private:
  const int64_t parts_, buckets_;
  std::vector<int32_t> counts_;
};

// The middle of [first, last). A thread moves both halves of its chunk at once: of one row's entries, which now follow
// each other, every one would wait for the place that the one before has left.
struct Halves {
  int64_t first, middle, last;

  Halves(int64_t count, int64_t chunk, int64_t chunks)
      : first(count * chunk / chunks), last(count * (chunk + 1) / chunks) {
    middle = first + (last - first) / 2;
  }
  int64_t size() const { return middle - first; }  // of the first half; the second may have one more
};

// Sorts what `Source` gives: `source.chunks()`; `source.rows(chunk, use)` calls use(row) for every id of a chunk, and
// `source.entries(chunk, use)` use(row, place), in the same order.
template <typename Pool, typename Source>
class RadixSort {
 public:
  RadixSort(Team<Pool>& team, const Source& source, Digits digits)
      : team_(team),
        source_(source),
        digits_(digits),
        chunks_(source.chunks()),
        mask_((uint32_t{1} << digits.width) - 1),
        firsts_(chunks_, digits.width),
        counts_(digits.passes > 1 ? 2 * chunks_ : 0, digits.width) {}

  // Whether two passes can do with 32 bits between them, for places of so many bits.
  static bool fits_narrow(Digits digits, int bits, int place_bits) {
    return digits.passes == 2 && bits - digits.width + place_bits <= 32;
  }

  // Both passes; returns how many entries there are. `between` and `to` have room for all ids.
  int64_t sort_narrow(uint32_t* between, uint64_t* to, int place_bits) {
    const int width = digits_.width;
    const int64_t count = first_pass([=](uint32_t row, uint32_t place, int32_t at) {
      between[at] = static_cast<uint32_t>(uint64_t{row >> width} << place_bits | place);
    });
    count_halves(count, [=](int64_t i) { return uint64_t{between[i]} >> place_bits; });
    // After the first pass, the last chunk's places are the ends of the digits.
    const int32_t* ends = firsts_.of(chunks_ - 1);
    const uint32_t places = static_cast<uint32_t>((uint64_t{1} << place_bits) - 1);
    const auto digit_at = [=, last = ends + mask_ + 1](int64_t i) { return std::upper_bound(ends, last, i) - ends; };
    team_.run(chunks_, [&](int64_t chunk) {
      const Halves halves(count, chunk, chunks_);
      const auto move = [=](int64_t i, int64_t low, int32_t* next) {
        const uint32_t narrow = between[i];
        const uint64_t high = uint64_t{narrow} >> place_bits;
        to[next[high]++] = (high << width | static_cast<uint64_t>(low)) << 32 | (narrow & places);
      };
      int32_t *const left = counts_.of(2 * chunk), *const right = counts_.of(2 * chunk + 1);
      int64_t i = halves.first, k = halves.middle, low = digit_at(i), other = digit_at(k);
      while (i < halves.middle) {
        while (ends[low] <= i) ++low;
        while (ends[other] <= k) ++other;
        const int64_t steps = std::min({halves.middle - i, ends[low] - i, ends[other] - k});
        for (const int64_t end = i + steps; i < end; ++i, ++k) move(i, low, left), move(k, other, right);
      }
      if (k < halves.last) move(k, digit_at(k), right);
    });
    return count;
  }

  // All passes, between two buffers with room for all ids; the sorted entries end up in buffers.first.
  int64_t sort_wide(std::pair<uint64_t*, uint64_t*>& buffers) {
    uint64_t* first = buffers.first;
    const int64_t count = first_pass([=](uint32_t row, uint32_t place, int32_t at) {
      first[at] = uint64_t{row} << 32 | place;
    });
    for (int pass = 1; pass < digits_.passes; ++pass) {
      const uint64_t* from = buffers.first;
      uint64_t* to = buffers.second;
      const int low = 32 + pass * digits_.width;
      const auto digit_of = [=, mask = uint64_t{mask_}](int64_t i) { return from[i] >> low & mask; };
      count_halves(count, digit_of);
      team_.run(chunks_, [&](int64_t chunk) {
        const auto digit = digit_of;
        const Halves halves(count, chunk, chunks_);
        int32_t *const left = counts_.of(2 * chunk), *const right = counts_.of(2 * chunk + 1);
        for (int64_t i = halves.first, k = halves.middle; i < halves.middle; ++i, ++k) {
          to[left[digit(i)]++] = from[i];
          to[right[digit(k)]++] = from[k];
        }
        const int64_t rest = halves.middle + halves.size();
        if (rest < halves.last) to[right[digit(rest)]++] = from[rest];
      });
      std::swap(buffers.first, buffers.second);
    }
    return count;
  }

 private:
  // Calls put(row, place, at) for every id, `at` being where it goes by its lowest digit.
  template <typename Put>
  int64_t first_pass(const Put& put) {
    const uint32_t mask = mask_;
    team_.run(chunks_, [&](int64_t chunk) {
      firsts_.clear(chunk);
      int32_t* const counts = firsts_.of(chunk);
      source_.rows(chunk, [=](uint32_t row) { ++counts[row & mask]; });
    });
    const int64_t count = firsts_.add_up();
    team_.run(chunks_, [&](int64_t chunk) {
      int32_t* const places = firsts_.of(chunk);
      source_.entries(chunk, [=](uint32_t row, uint32_t place) { put(row, place, places[row & mask]++); });
    });
    return count;
  }

  template <typename Digit>
  void count_halves(int64_t count, const Digit& digit_of) {
    team_.run(chunks_, [&](int64_t chunk) {
      const Digit digit = digit_of;
      const Halves halves(count, chunk, chunks_);
      int32_t *const left = counts_.of(2 * chunk), *const right = counts_.of(2 * chunk + 1);
      counts_.clear(2 * chunk), counts_.clear(2 * chunk + 1);
      for (int64_t i = halves.first, k = halves.middle; i < halves.middle; ++i, ++k) {
        ++left[digit(i)], ++right[digit(k)];
      }
      const int64_t rest = halves.middle + halves.size();
      if (rest < halves.last) ++right[digit(rest)];
    });
    counts_.add_up();
  }

  Team<Pool>& team_;
  const Source& source_;
  const Digits digits_;
  const int64_t chunks_;
  const uint32_t mask_;
  Counts firsts_, counts_;
};

}  // namespace embax

#endif  // EMBAX_CSRC_RADIX_H_
