// Where the runs of equal keys begin among sorted keys, in two kernels. Six keys, 7 being absent, in tiles of four:
//
//   keys     0  3  3  5 | 6  6  7  7
//   begins   x  x     x | x     e         x: a run begins; e: the absent ones begin, where the last run ends
//
//   count_runs: counts 3, 1
//   write_runs: begins 0 1 3 4 6, runs 4; tile 1 starts writing at rank 3, the sum of the counts before it
//
// Where a key came from does not matter, unless its place among the rows is asked for.

#ifndef EMBAX_CSRC_CUDA_RUNS_H_
#define EMBAX_CSRC_CUDA_RUNS_H_

#include "cuda/device.h"

namespace embax::cuda {

EMBAX_DEVICE bool run_begins(const RunsWork& work, int64_t place) {
  if (place >= work.count || !is_row(work.keys[place], work.rows)) return false;
  return place == 0 || work.keys[place - 1] != work.keys[place];
}

struct CountRuns {
  using Work = RunsWork;

  static EMBAX_DEVICE void run(const Work& work) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kRunTile + threadIdx.x;
    int count = 0;
#pragma unroll
    for (int step = 0; step < kRunTile; step += kThreads) count += __syncthreads_count(run_begins(work, first + step));
    if (threadIdx.x == 0) work.counts[blockIdx.x] = count;
  }
};

struct WriteRuns {
  using Work = RunsWork;

  static EMBAX_DEVICE void run(const Work& work) {
    __shared__ int sums[kThreads];
    const int before = sum_of_counts(work, 0, static_cast<int>(blockIdx.x), sums);
    const int all = before + sum_of_counts(work, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), sums);
    if (blockIdx.x == 0 && threadIdx.x == 0) *work.runs = all;
    int rank = before;
#pragma unroll
    for (int step = 0; step < kRunTile; step += kThreads) {
      const int64_t place = static_cast<int64_t>(blockIdx.x) * kRunTile + step + threadIdx.x;
      rank = write_some(work, place, rank, all, sums);
    }
  }

 private:
  // The counts of the tiles [from, to), added up by the whole block. Every block reads them all, a kilobyte for a
  // quarter of a million keys: nothing beside what else a batch of some millions of ids costs.
  static EMBAX_DEVICE int sum_of_counts(const Work& work, int from, int to, int* sums) {
    int sum = 0;
    for (int tile = from + static_cast<int>(threadIdx.x); tile < to; tile += kThreads) sum += work.counts[tile];
    __syncthreads();
    sums[threadIdx.x] = sum;
    for (int other = kThreads / 2; other > 0; other /= 2) {
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < other) sums[threadIdx.x] += sums[threadIdx.x + other];
    }
    __syncthreads();
    return sums[0];
  }

  // One key to a thread; `rank` is that of the block's first. Returns that of the next kThreads keys' first.
  static EMBAX_DEVICE int write_some(const Work& work, int64_t place, int rank, int all, int* sums) {
    const bool begins = run_begins(work, place);
    const unsigned warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const unsigned ballot = __ballot_sync(0xffffffffu, begins);
    __syncthreads();
    if (lane == 0) sums[warp] = __popc(ballot);
    __syncthreads();
    int mine = rank + __popc(ballot & ((1u << lane) - 1u));  // runs that begin before this key
    for (int w = 0; w < kThreads / kWarp; ++w) {
      const int count = sums[w];
      if (w < static_cast<int>(warp)) mine += count;
      rank += count;
    }
    if (place >= work.count) return rank;
    const int key = work.keys[place];
    if (begins) {
      work.begins[mine] = static_cast<int32_t>(place);
      if (work.unique != nullptr) work.unique[mine] = key;
    }
    write_ends(work, place, key, mine + (begins ? 1 : 0));
    // The tail of the rows; every key has one of them to see to, and there are no fewer keys than rows.
    if (work.unique != nullptr && place >= all && place < work.room) work.unique[place] = work.rows;
    return rank;
  }

  // What an absent key and the last one know: where the last run ends. `upto` runs have begun with this key.
  static EMBAX_DEVICE void write_ends(const Work& work, int64_t place, int key, int upto) {
    const bool absent = !is_row(key, work.rows);
    if (absent) {
      if (place == 0 || is_row(work.keys[place - 1], work.rows)) work.begins[upto] = static_cast<int32_t>(place);
    } else if (place == work.count - 1) {
      work.begins[upto] = work.count;
    }
    if (work.places != nullptr) work.places[work.order[place]] = absent ? work.room : upto - 1;
  }
};

}  // namespace embax::cuda

#endif  // EMBAX_CSRC_CUDA_RUNS_H_
