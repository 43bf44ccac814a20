// A team: the caller and, where it pays, helpers from a thread pool, who share out one phase of work after another.
//
//   Team team(pool, ids);
//   team.run(chunks, [&](int64_t chunk) { ... });     // returns when all chunks are done
//   team.run(other, [&](int64_t chunk) { ... });
//
// The caller works too, and everybody claims chunks from one atomic counter per phase. A helper that the pool starts late
// finds no chunk left and touches nothing but the shared counters, which it keeps alive. So the caller waits only for
// chunks that somebody is already working on: a busy pool delays nothing and cannot deadlock. Helpers stay for the
// next phase, for waking one costs more than a phase of a small batch.

#ifndef EMBAX_CSRC_PARALLEL_H_
#define EMBAX_CSRC_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace embax {

// Below this many ids waking a second thread costs more than it saves.
constexpr int64_t kParallelIds = 16384;

// `Pool` offers num_threads() and Schedule(callable).
template <typename Pool>
class Team {
 public:
  Team(Pool& pool, int64_t ids)
      : pool_(pool), helpers_(ids < kParallelIds ? 0 : std::max<int64_t>(0, pool.num_threads() - 1)) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  ~Team() {
    if (shared_) shared_->closed.store(true, std::memory_order_release);
  }

  int64_t threads() const { return helpers_ + 1; }

  // Calls body(chunk) once for each chunk in [0, chunks).
  template <typename Body>
  void run(int64_t chunks, const Body& body) {
    if (helpers_ == 0 || chunks < 2 || phases_ == kPhases) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) body(chunk);
      return;
    }
    const bool first = !shared_;
    if (first) shared_ = std::make_shared<Shared>();
    Phase& phase = shared_->phases[phases_];
    phase.body = &body;  // alive until every chunk is done
    phase.call = [](const void* erased, int64_t chunk) { (*static_cast<const Body*>(erased))(chunk); };
    phase.chunks = chunks;
    shared_->published.store(++phases_, std::memory_order_release);
    if (first) recruit(std::min(helpers_, chunks - 1));
    work(phase);
    while (phase.done.load(std::memory_order_acquire) < chunks) std::this_thread::yield();
  }

  // Calls body(first, last) for ranges that cover [0, count), several for each thread.
  template <typename Body>
  void run_ranges(int64_t count, int64_t smallest, const Body& body) {
    const int64_t size = std::max(smallest, count / (threads() * kRangesPerThread) + 1);
    run((count + size - 1) / size, [&](int64_t i) { body(i * size, std::min(count, (i + 1) * size)); });
  }

 private:
  static constexpr int kPhases = 32;
  static constexpr int64_t kRangesPerThread = 16;  // enough for an even end, few enough to cost nothing

  struct Phase {
    const void* body;
    void (*call)(const void*, int64_t);
    int64_t chunks;
    std::atomic<int64_t> claimed{0};
    std::atomic<int64_t> done{0};
  };
  struct Shared {
    Phase phases[kPhases];
    std::atomic<int> published{0};
    std::atomic<bool> closed{false};
  };

  static void work(Phase& phase) {
    for (;;) {
      const int64_t mine = phase.claimed.fetch_add(1, std::memory_order_relaxed);
      if (mine >= phase.chunks) return;
      phase.call(phase.body, mine);
      phase.done.fetch_add(1, std::memory_order_release);
    }
  }

  static void help(Shared& shared) {
    for (int next = 0;;) {
      if (next < shared.published.load(std::memory_order_acquire)) {
        work(shared.phases[next++]);
      } else if (shared.closed.load(std::memory_order_acquire)) {
        return;
      } else {
        std::this_thread::yield();
      }
    }
  }

  void recruit(int64_t helpers) {
    // A pool whose queue is full may run a task at once, on the thread that schedules it: the caller works without it.
    auto task = [shared = shared_, caller = std::this_thread::get_id()] {
      if (std::this_thread::get_id() != caller) help(*shared);
    };
    // Schedule keeps what it is given, so every helper gets a copy of its own.
    for (int64_t i = 0; i < helpers; ++i) pool_.Schedule(decltype(task)(task));
  }

  Pool& pool_;
  const int64_t helpers_;
  int phases_ = 0;
  std::shared_ptr<Shared> shared_;
};

}  // namespace embax

#endif  // EMBAX_CSRC_PARALLEL_H_
