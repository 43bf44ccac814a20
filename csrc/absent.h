// Whether many ids of a batch name no row of the table, as where a mesh's ids go to all devices. A processor cannot guess
// which are there; kernels that are told so leave the others out without a branch. Only speed depends on the answer.

#ifndef EMBAX_CSRC_ABSENT_H_
#define EMBAX_CSRC_ABSENT_H_

#include <cstdint>

#include "portable.h"

namespace embax::EMBAX_ISA {

// Looks at a few of `count` ids: at neighbours in four places, for every place waits for memory.
EMBAX_INLINE bool often_absent(const int32_t* ids, int64_t count, int64_t rows) {
  constexpr int64_t kPlaces = 4, kLooks = 16;
  if (count < kPlaces * kLooks) return false;
  int64_t absent = 0;
  for (int64_t place = 0; place < kPlaces; ++place) {
    const int32_t* own = ids + place * (count - kLooks) / (kPlaces - 1);
    for (int64_t i = 0; i < kLooks; ++i) {
      absent += static_cast<uint64_t>(int64_t{own[i]}) >= static_cast<uint64_t>(rows);
    }
  }
  return absent >= kPlaces * kLooks / 8;
}

}  // namespace embax::EMBAX_ISA

#endif  // EMBAX_CSRC_ABSENT_H_
