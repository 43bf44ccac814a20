// Huge pages for tables, where the process asked for them (embax.tune_allocator) and the system offers them.
//
// A step on a large table reads rows at random: with pages of 4 KiB nearly each of them costs a walk of the page tables as
// well. The advice changes no number and holds for the memory's lifetime, so an array is advised once, when a kernel first
// meets it: its pages are then put together into huge ones, which takes as long as copying it.

#ifndef EMBAX_CSRC_HUGE_PAGES_H_
#define EMBAX_CSRC_HUGE_PAGES_H_

#include <cstddef>

namespace embax {

// Does nothing unless turned on, nor for arrays of less than 32 MiB.
void advise_table(const void* data, size_t bytes);

}  // namespace embax

#endif  // EMBAX_CSRC_HUGE_PAGES_H_
