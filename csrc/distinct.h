// The distinct rows of a batch, and where each id's row is among them.
//
// Six ids of a table of 5 rows:
//
//   ids     4 1 4 0 9 1       9 is absent
//   unique  0 1 4 5 5         rising, filled up with the number of rows
//   places  2 1 2 0 5 1       absent: the length of unique

#ifndef EMBAX_CSRC_DISTINCT_H_
#define EMBAX_CSRC_DISTINCT_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "occurrences.h"
#include "parallel.h"

namespace embax {

struct DistinctRows {
  const int32_t* ids;  // [count]; outside [0, rows): absent
  int64_t count;
  int64_t rows;
  int32_t* unique;  // [min(count, rows)]
  int32_t* places;  // [count]
};

// Returns how many distinct rows there are.
template <typename Pool>
int64_t find_distinct(Team<Pool>& team, const DistinctRows& work) {
  const int64_t room = std::min(work.count, work.rows);
  team.run_ranges(work.count, 4096, [&](int64_t first, int64_t last) {
    std::fill(work.places + first, work.places + last, static_cast<int32_t>(room));
  });
  if (room == 0) return 0;
  const Ids ids{work.ids, nullptr, nullptr, work.count, work.count, nullptr};
  const Occurrences occurrences(team, ids, work.rows, false);
  const uint64_t* entries = occurrences.entries();
  const int64_t count = occurrences.count();
  const std::vector<int64_t> ranks = ranks_of_ranges(team, entries, count);
  team.run(static_cast<int64_t>(ranks.size()) - 1, [&](int64_t range) {
    int32_t *const unique = work.unique, *const places = work.places;
    int64_t rank = ranks[static_cast<size_t>(range)] - 1;
    for (int64_t i = range * kRankedRange; i < std::min(count, (range + 1) * kRankedRange); ++i) {
      const uint64_t row = entries[i] >> 32;
      if (i == 0 || row != entries[i - 1] >> 32) unique[++rank] = static_cast<int32_t>(row);
      places[entries[i] & 0xffffffffu] = static_cast<int32_t>(rank);
    }
  });
  std::fill(work.unique + ranks.back(), work.unique + room, static_cast<int32_t>(work.rows));
  return ranks.back();
}

}  // namespace embax

#endif  // EMBAX_CSRC_DISTINCT_H_
