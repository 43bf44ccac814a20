// parallel_for: cut [0, count) into chunks and share them between the caller and a thread pool.
//
// The caller works too, and every worker claims chunks from one atomic counter. A task that the pool starts late
// finds no chunk left and touches nothing but the shared counter, which it keeps alive. So the caller waits
// only for chunks that somebody is already working on: a busy pool delays nothing and cannot deadlock.

#ifndef EMBAX_CSRC_PARALLEL_H_
#define EMBAX_CSRC_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace embax {

constexpr int64_t kChunksPerThread = 8;  // enough for an even end, few enough to cost nothing

// Calls body(first, last) for disjoint ranges that cover [0, count); returns when all of them are done.
// `Pool` offers num_threads() and Schedule(callable).
template <typename Pool, typename Body>
void parallel_for(Pool& pool, int64_t count, const Body& body) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t chunk = std::max<int64_t>(1, count / (threads * kChunksPerThread));
  const int64_t chunks = (count + chunk - 1) / chunk;

  struct Progress {
    std::atomic<int64_t> claimed{0};
    std::atomic<int64_t> done{0};
  };
  auto progress = std::make_shared<Progress>();
  const Body* borrowed = &body;  // alive until every chunk is done
  auto work = [progress, borrowed, chunk, chunks, count] {
    for (;;) {
      const int64_t mine = progress->claimed.fetch_add(1, std::memory_order_relaxed);
      if (mine >= chunks) return;
      (*borrowed)(mine * chunk, std::min(count, (mine + 1) * chunk));
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min(threads, chunks) - 1;
  // Schedule keeps what it is given, so every helper gets a copy of its own.
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(work)(work));
  work();
  while (progress->done.load(std::memory_order_acquire) < chunks) std::this_thread::yield();
}

}  // namespace embax

#endif  // EMBAX_CSRC_PARALLEL_H_
