// Work orders of the CUDA kernels, and how a row's numbers are dealt out to threads: read by the kernels' compiler
// and by the bindings' compiler, which must see the same bytes and the same arithmetic.
//
// A row belongs to a group of threads, its lanes, neighbours in a warp. A lane holds `vector` neighbouring numbers,
// then those one strip further on. Rows of 10 numbers, vector 2, lanes 8 (a power of two; lanes 5, 6 and 7 have
// nothing to do):
//
//   numbers  0 1 | 2 3 | 4 5 | 6 7 | 8 9
//   lane       0     1     2     3     4
//
// Rows of 1,030 numbers, vector 2, lanes 32: a strip is 64 numbers, there are 17; a pass does up to kMostStrips of
// them.

#ifndef EMBAX_CSRC_CUDA_WORK_H_
#define EMBAX_CSRC_CUDA_WORK_H_

#include "portable.h"

#if !defined(__CUDACC_RTC__)
#include <cstdint>
#endif

// A rule that both compilers compute with while they compile.
#if defined(__CUDACC__)
#define EMBAX_RULE __device__ constexpr
#else
#define EMBAX_RULE constexpr
#endif

namespace embax::cuda {

constexpr int kThreads = 256;  // of a block, whatever the kernel
constexpr int kWarp = 32;
constexpr int kMostStrips = 4;  // the most a lane holds at a time

// Numbers that a lane loads at once: 16 bytes of float32, where the rows' lengths keep them aligned.
EMBAX_RULE int vector_of(int64_t dim) { return dim % 4 == 0 ? 4 : dim % 2 == 0 ? 2 : 1; }

// Threads to a row: as many as it has vectors, rounded up to a power of two, a warp at most.
EMBAX_RULE int lanes_of(int64_t dim) {
  int lanes = 1;
  while (lanes < kWarp && static_cast<int64_t>(lanes) * vector_of(dim) < dim) lanes *= 2;
  return lanes;
}

EMBAX_RULE int64_t strips_of(int64_t dim) {
  const int64_t strip = static_cast<int64_t>(lanes_of(dim)) * vector_of(dim);
  return (dim + strip - 1) / strip;
}

EMBAX_RULE int groups_of(int64_t dim) { return kThreads / lanes_of(dim); }  // rows that a block has in hand

// Samples that a group of an unpooled gather has in hand, so that enough bytes are under way: about 64 to a thread.
EMBAX_RULE int together_of(int64_t dim) { return strips_of(dim) >= 4 ? 1 : strips_of(dim) >= 2 ? 2 : 4; }

// Sorted occurrences that a block of count_runs and write_runs has: 4 to a thread.
constexpr int kRunTile = 4 * kThreads;

// A long run is added up in pieces: kPiece entries from one multiple of kPiece to the next are a tile, kPiece tiles a
// field. Tiles that lie in one run are summed by a group each, then fields by those sums; who steps the row adds up
// what lies before, between and behind. With kPiece = 4, the run 2..13:
//
//   entries  2 3 | 4 5 6 7 | 8 9 10 11 | 12 13         e2 + e3 + tile 1 + tile 2 + e12 + e13
constexpr int kPiece = 128;

// The activations of a stack, or their gradients: a block for each feature.
constexpr int kMaxBlocks = 128;
struct Blocks {
  void* at[kMaxBlocks];           // [samples of the block, dim]
  int32_t first[kMaxBlocks + 1];  // its first sample; behind the last: all samples
  int32_t count;
  int32_t each;  // samples of every block where that is one number, else 0
};

// out[s] = sum over j in sample s of gains[j] * table[ids[j]]. Without offsets position j is sample j, and absent
// rows are `fill` (its bits): rows one by one.
struct GatherWork {
  const void* table;
  int64_t rows;
  const int32_t* ids;      // [capacity]
  const int32_t* offsets;  // [samples + 1], or nullptr
  const float* gains;      // [capacity], or nullptr
  int32_t capacity;
  int32_t samples;
  uint32_t fill;
  int32_t streams;         // out is too large to stay in the cache
  float low, high, width;  // of the levels that rows are rounded to
  Blocks out;
};

// out[j] = table[ids[j]] . gradients[samples[j]]
struct ProductWork {
  const void* table;
  int64_t rows;
  const int32_t* ids;      // [count]
  const int32_t* offsets;  // [samples + 1]
  const void* gradients;   // [samples, dim]
  int32_t count;
  int32_t samples;
  float low, high, width;
  float* out;  // [count]
};

// out[j] = the sample that position j is in
struct SamplesWork {
  const int32_t* offsets;  // [samples + 1]
  int32_t samples;
  int32_t count;
  int32_t* out;  // [count]
};

// Where the runs of equal keys begin: see runs.h.
struct RunsWork {
  const int32_t* keys;  // [count], sorted; `rows` and more: absent
  int32_t count;
  int32_t rows;
  int32_t* counts;  // [tiles]: runs that begin in each tile of kRunTile keys
  int32_t* begins;  // [count + 1]
  int32_t* runs;    // [1]: how many there are
  int32_t* unique;  // [room], or nullptr: the rows, filled up with `rows`
  int32_t room;
  const int32_t* order;  // [count]: where each key came from, for
  int32_t* places;       // [count], or nullptr: the place among the rows of each key as it came, `room` for absent ones
};

constexpr int kMaxSlots = 2;

// Sums of the gradients of each run, and what is done with them: see step.h.
struct StepWork {
  const int32_t* keys;     // [count], sorted
  const int32_t* samples;  // [count]: whose gradient; nullptr: entry i is sample i
  const float* gains;      // [count], or nullptr
  int32_t count;
  int32_t sample_count;
  int64_t rows;
  const int32_t* begins;  // [runs + 1]
  const int32_t* runs;    // nullptr: every entry is a run of its own
  float* tiles;           // [count / kPiece, dim]
  float* fields;          // [count / kPiece / kPiece, dim]
  void* table;            // [rows, dim]
  float* slots[kMaxSlots];
  uint8_t* touched;        // [rows], or nullptr
  const float* hyper;      // [8]
  const float* modifiers;  // clip norm, l2, decay
  const uint32_t* seed;
  int32_t stochastic;
  int32_t room;       // for row gradients: rows of
  float* out_values;  // [room, dim]
  Blocks gradients;
};

}  // namespace embax::cuda

#endif  // EMBAX_CSRC_CUDA_WORK_H_
