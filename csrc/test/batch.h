// Work orders over arrays in heap blocks of exactly their size, so that a sanitizer sees every byte outside; a thread
// pool in place of XLA's; and the drive from ids to steps, as the bindings do it.

#ifndef EMBAX_CSRC_TEST_BATCH_H_
#define EMBAX_CSRC_TEST_BATCH_H_

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "kernels.h"
#include "occurrences.h"
#include "parallel.h"

namespace embax {

namespace portable {
extern const Kernels kKernels;
}
#if defined(EMBAX_X86)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace test {

// The copies of the kernels that this processor runs: the widest and all narrower ones.
inline std::vector<const Kernels*> copies() {
#if defined(EMBAX_X86)
  const Kernels* const all[] = {&portable::kKernels, &avx2::kKernels, &avx512::kKernels};
#else
  const Kernels* const all[] = {&portable::kKernels};
#endif
  std::vector<const Kernels*> found;
  for (const Kernels* copy : all) {
    found.push_back(copy);
    if (copy == &kernels()) break;
  }
  return found;
}

// An array of exactly `count` numbers; aligned as XLA aligns, which streams need.
template <typename T>
class Array {
 public:
  explicit Array(int64_t count = 0)
      : count_(count),
        data_(static_cast<T*>(::operator new (static_cast<size_t>(count) * sizeof(T), std::align_val_t{64}))) {
    for (int64_t i = 0; i < count; ++i) data_[i] = T{};
  }
  Array(const Array& other) : Array(other.count_) {
    for (int64_t i = 0; i < count_; ++i) data_[i] = other.data_[i];
  }
  Array(Array&& other) noexcept : count_(other.count_), data_(other.data_) { other.data_ = nullptr, other.count_ = 0; }
  Array& operator=(Array other) noexcept {
    std::swap(count_, other.count_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Array() { ::operator delete (data_, std::align_val_t{64}); }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }

 private:
  int64_t count_;
  T* data_;
};

inline int64_t size_of(Dtype dtype) { return kDtypeSize[static_cast<int>(dtype)]; }

// Threads that run what they are given, in order; one of `num_threads` is the caller's.
class Threads {
 public:
  explicit Threads(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Threads() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
    }
    woken_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  int64_t num_threads() const { return static_cast<int64_t>(workers_.size()) + 1; }
  void Schedule(std::function<void()> task) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    woken_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      woken_.wait(lock, [this] { return closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable woken_;
  std::deque<std::function<void()>> tasks_;
  std::vector<std::thread> workers_;
  bool closed_ = false;
};

// Gradients of `samples` samples in blocks.
struct Blocks {
  std::vector<Array<char>> data;
  std::vector<const void*> pointers;
  std::vector<int64_t> first{0};
  std::vector<int32_t> guess;
  Gradients view{};

  void add(Array<char> block, int64_t samples) {
    data.push_back(std::move(block));
    first.push_back(first.back() + samples);
  }
  const Gradients& finish(Dtype dtype) {
    const int64_t count = static_cast<int64_t>(data.size());
    pointers.clear();
    for (const Array<char>& block : data) pointers.push_back(block.data());
    view = {pointers.data(), first.data(), count, nullptr, 0, dtype, true};
    while (first.back() >> view.shift > 4 * count) ++view.shift;
    guess.clear();
    for (int64_t sample = 0, block = 0; sample < first.back(); sample += int64_t{1} << view.shift) {
      while (sample >= first[static_cast<size_t>(block) + 1]) ++block;
      guess.push_back(static_cast<int32_t>(block));
    }
    view.guess = guess.data();
    return view;
  }
};

// From ids to `use(step, team)`: sorted, and what is hot summed beforehand.
template <typename Use>
void for_runs(Threads& pool, const Kernels& copy, const Ids& ids, int64_t rows, Step step, const Use& use) {
  Team<Threads> team(pool, ids.capacity);
  const Occurrences occurrences(team, ids, rows, ids.gains != nullptr);
  step.entries = occurrences.entries();
  step.count = occurrences.count();
  step.sample_of = occurrences.sample_of();
  step.gains = ids.gains;
  const std::vector<HotRun> hot = occurrences.hot_runs();
  step.hot = hot.data();
  step.hot_count = static_cast<int64_t>(hot.size());
  std::vector<int64_t> run_of, block_of;
  for (size_t run = 0; run < hot.size(); ++run) {
    for (int64_t block = 0; block * kBlock < hot[run].end - hot[run].begin; ++block) {
      run_of.push_back(static_cast<int64_t>(run));
      block_of.push_back(block);
    }
  }
  const int64_t blocks = static_cast<int64_t>(run_of.size());
  Array<float> sums(blocks * step.dim);
  step.hot_sums = sums.data();
  team.run(blocks, [&](int64_t i) {
    copy.sum_hot_block(step, run_of[static_cast<size_t>(i)], block_of[static_cast<size_t>(i)]);
  });
  use(step, team);
}

inline void update(Threads& pool, const Kernels& copy, int optimizer, const Ids& ids, int64_t rows, const Step& work) {
  for_runs(pool, copy, ids, rows, work, [&](const Step& step, Team<Threads>& team) {
    team.run_ranges(step.count, 128, [&](int64_t first, int64_t last) {
      Array<float> sum(step.dim);
      copy.step[optimizer][static_cast<int>(step.dtype)](step, first, last, sum.data(), 0);
    });
  });
}

// Returns how many distinct rows were written to out_rows and out_values.
inline int64_t row_gradients(Threads& pool, const Kernels& copy, const Ids& ids, int64_t rows, const Step& work) {
  int64_t found = 0;
  for_runs(pool, copy, ids, rows, work, [&](const Step& step, Team<Threads>& team) {
    constexpr int64_t kRange = 1024;
    std::vector<int64_t> ranks;
    for (int64_t i = 0; i < step.count; ++i) {
      if (i % kRange == 0) ranks.push_back(found);
      found += i == 0 || step.entries[i] >> 32 != step.entries[i - 1] >> 32;
    }
    team.run(static_cast<int64_t>(ranks.size()), [&](int64_t range) {
      Array<float> sum(step.dim);
      copy.sum_rows(step, range * kRange, std::min(step.count, (range + 1) * kRange), sum.data(),
                    ranks[static_cast<size_t>(range)]);
    });
  });
  return found;
}

#define EMBAX_CHECK(condition, ...)                                                \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                           \
      std::fprintf(stderr, "\n");                                                  \
      std::abort();                                                                \
    }                                                                              \
  } while (false)

}  // namespace test
}  // namespace embax

#endif  // EMBAX_CSRC_TEST_BATCH_H_
