// Gather and pool where many ids are absent; and the choice between this and gather_pool.h.

#ifndef EMBAX_CSRC_GATHER_PRESENT_H_
#define EMBAX_CSRC_GATHER_PRESENT_H_

#include "absent.h"
#include "gather_pool.h"

namespace embax::EMBAX_ISA {

// Pools with the absent ids left out first, some samples at a time: each wrong guess of a processor costs as much as
// adding up a row. Sums keep their order.
template <typename T>
EMBAX_APART void gather_present_as(const GatherPool& work, int64_t first, int64_t last) {
  constexpr int64_t kIds = 2048, kSamples = 256;
  int32_t ids[kIds + 1], offsets[kSamples + 1];
  float gains[kIds + 1];
  const Ids& all = work.ids;
  const uint64_t rows = static_cast<uint64_t>(work.table.rows);
  const int64_t out_bytes = work.table.dim * kDtypeSize[static_cast<int>(work.out_dtype)];
  while (first < last) {
    int32_t kept = 0;
    int64_t count = 0, looked = 0;
    offsets[0] = 0;
    for (; count < kSamples && first + count < last; offsets[++count] = kept) {
      const int64_t begin = clamped(all.offsets[first + count], all.capacity);
      const int64_t end = clamped(all.offsets[first + count + 1], all.capacity);
      if (end > begin) looked += end - begin;
      if (looked > kIds) break;
      for (int64_t j = begin; j < end; ++j) {
        ids[kept] = all.ids[j];
        if (all.gains != nullptr) gains[kept] = all.gains[j];
        kept += static_cast<uint64_t>(int64_t{all.ids[j]}) < rows;
      }
    }
    if (count == 0) {  // one sample of more ids than fit
      gather_pool_as<T>(work, first, first + 1);
      ++first;
      continue;
    }
    GatherPool part = work;
    part.ids = {ids, offsets, all.gains == nullptr ? nullptr : gains, kept, count, nullptr};
    part.out = static_cast<char*>(work.out) + first * out_bytes;
    gather_pool_as<T>(part, 0, count);
    first += count;
  }
}

// Pools the samples [first, last).
inline void gather_pool(const GatherPool& work, int64_t first, int64_t last) {
  const int64_t begin = clamped(work.ids.offsets[first], work.ids.capacity);
  const int64_t count = clamped(work.ids.offsets[last], work.ids.capacity) - begin;
  // One id a sample has a loop of its own, which writes as many rows as it reads and waits for those.
  const bool absent =
      often_absent(work.ids.ids + begin, count, work.table.rows) && !one_each(work.ids, first, last);
  if (work.table.dtype == Dtype::kFloat32) {
    absent ? gather_present_as<float>(work, first, last) : gather_pool_as<float>(work, first, last);
  } else if (work.table.dtype == Dtype::kBFloat16) {
    absent ? gather_present_as<BFloat16>(work, first, last) : gather_pool_as<BFloat16>(work, first, last);
  } else {
    absent ? gather_present_as<Float16>(work, first, last) : gather_pool_as<Float16>(work, first, last);
  }
}

}  // namespace embax::EMBAX_ISA

#endif  // EMBAX_CSRC_GATHER_PRESENT_H_
