// Sorted occurrences for the kernels under test, and the sums of their gradients by plain loops.

#ifndef EMBAX_CSRC_TEST_EMULATED_ENTRIES_H_
#define EMBAX_CSRC_TEST_EMULATED_ENTRIES_H_

#include <algorithm>
#include <vector>

#include "test/emulated_programs.h"
#include "test/guarded.h"

namespace embax::test {

constexpr int kField = cuda::kPiece * cuda::kPiece;

// Sorted occurrences: runs that end at `ends`, and `absent` keys behind them.
struct Entries {
  Entries(const std::vector<int>& ends, int absent)
      : sampled(!ends.empty() && ends.back() + absent > kSamples),
        count((ends.empty() ? 0 : ends.back()) + absent),
        keys(count),
        samples(count),
        order(count),
        gains(count) {
    for (int end : ends) {
      rows += 1 + below(3);
      std::fill(keys.data() + begins.back(), keys.data() + end, static_cast<int32_t>(rows - 1));
      begins.push_back(end);
    }
    rows += below(2);
    for (int64_t i = begins.back(); i < count; ++i) keys[i] = i + absent / 2 < count ? static_cast<int32_t>(rows) : INT32_MAX;
    for (int64_t i = 0; i < count; ++i) {
      samples[i] = static_cast<int32_t>(!sampled ? i : below(9) ? below(kSamples) : garbage());
      order[i] = static_cast<int32_t>(i), gains[i] = number();
    }
    std::shuffle(order.data(), order.data() + count, random_engine);
  }
  static constexpr int kSamples = 60;
  bool sampled;  // else entry i is sample i
  int64_t count, rows = 0;
  std::vector<int> begins{0};
  Field<int32_t> keys, samples, order;
  Field<float> gains;
};

// Sums of a run in their order: entries, and whole tiles and fields by their sums.
struct Summer {
  const Library& k;
  Entries& entries;
  Split& gradients;

  float entry_sum(int64_t begin, int64_t end, int64_t d, float total) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = entries.samples[i];
      if (sample < 0 || sample >= Entries::kSamples) continue;
      const float value = gradients.at(sample, d);
      total += k.gained ? entries.gains[i] * value : value;
    }
    return total;
  }
  float sum(int64_t begin, int64_t end, int64_t d) const {
    float total = 0;
    for (int64_t at = begin; at < end;) {
      const int64_t behind = std::min((at / cuda::kPiece + 1) * cuda::kPiece, end);
      if (at % kField == 0 && at + kField <= end) {
        float field = 0;
        for (const int64_t last = at + kField; at < last; at += cuda::kPiece) field += entry_sum(at, at + cuda::kPiece, d, 0);
        total += field;
      } else if (at % cuda::kPiece == 0 && at + cuda::kPiece <= end) {
        total += entry_sum(at, behind, d, 0), at = behind;
      } else {
        total = entry_sum(at, behind, d, total), at = behind;
      }
    }
    return total;
  }
  std::vector<std::vector<float>> sums() const {
    std::vector<std::vector<float>> all;
    for (size_t r = 0; r + 1 < entries.begins.size(); ++r) {
      all.emplace_back();
      for (int64_t d = 0; d < k.dim; ++d) all.back().push_back(sum(entries.begins[r], entries.begins[r + 1], d));
    }
    return all;
  }
};

}  // namespace embax::test

#endif  // EMBAX_CSRC_TEST_EMULATED_ENTRIES_H_
