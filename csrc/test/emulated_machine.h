// The threads of a block on the host, and who of them waits for whom: see emulated_driver.cc.

#ifndef EMBAX_CSRC_TEST_EMULATED_MACHINE_H_
#define EMBAX_CSRC_TEST_EMULATED_MACHINE_H_

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "test/emulated.h"
#include "test/fiber.h"

namespace embax::emulated {

using cuda::Status;

// Of CUresult.
constexpr Status kSuccess = 0, kInvalidValue = 1, kInvalidImage = 200, kFileNotFound = 301, kNotFound = 500,
                 kTooManyResources = 701, kTimeout = 702, kFailed = 719;

// In which order blocks and threads come.
class Order {
 public:
  Order() {
    const char* const asked = std::getenv("EMBAX_EMULATED_ORDER");
    if (asked == nullptr || *asked == '\0' || std::strcmp(asked, "forward") == 0) return;
    backward_ = std::strcmp(asked, "backward") == 0;
    if (!backward_) state_ = std::strtoull(asked, nullptr, 10) * 2 + 1;
  }

  // Arranges what has come forward.
  void arrange(std::vector<unsigned>& numbers) {
    if (backward_) std::reverse(numbers.begin(), numbers.end());
    for (size_t i = numbers.size(); state_ != 0 && i > 1; --i) std::swap(numbers[i - 1], numbers[random() % i]);
  }

  // Where among so many to begin to look for who goes on, and in which steps.
  size_t start(size_t count) { return state_ != 0 ? random() % count : backward_ ? count - 1 : 0; }
  size_t step(size_t count) const { return backward_ ? count - 1 : 1; }

  bool shuffles() const { return state_ != 0; }
  // Whether to look elsewhere first, this time.
  bool skips() { return state_ != 0 && random() % 2 != 0; }

 private:
  uint64_t random() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return state_ >> 33;
  }

  bool backward_ = false;
  uint64_t state_ = 0;
};

enum class State { kReady, kRuns, kWaits, kEnded };

struct Thread {
  State state = State::kReady;
  Call call{};
  uint32_t result = 0;
  Fiber* fiber = nullptr;
};

inline bool meet(const Call& a, const Call& b) {
  return a.kind == b.kind && a.mask == b.mask && a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

inline const char* name_of(Kind kind) {
  constexpr const char* kNames[] = {"__syncthreads", "__syncthreads_count", "__ballot_sync", "__shfl_sync", "__shfl_xor_sync"};
  return kNames[static_cast<int>(kind)];
}

// The one block that runs, and the launch that it belongs to.
class Machine {
 public:
  Status launch(const Program& program, const void* work, unsigned blocks, unsigned threads) {
    program_ = &program;
    work_ = work;
    *program.threads = {threads, 1, 1};
    *program.blocks = {blocks, 1, 1};
    *program.wait = [](const Call& call) { return only().wait(call); };
    Order order;
    block_order_.resize(blocks);
    std::iota(block_order_.begin(), block_order_.end(), 0u);
    order.arrange(block_order_);
    Status status = kSuccess;
    for (size_t i = 0; i < block_order_.size() && status == kSuccess; ++i) {
      *program.block = {block_order_[i], 0, 0};
      for (char* byte = program.shared; byte < program.shared_end; ++byte) *byte = static_cast<char>(0xa5);
      status = run_block(order);
    }
    return status;
  }

  static Machine& only() {
    static Machine* const machine = new Machine;  // stacks are left to the process's end
    return *machine;
  }

 private:
  // One warp at a time, as far as it gets: so warps are as far from each other as barriers let them.
  Status run_block(Order& order) {
    threads_.assign(program_->threads->x, Thread{});
    ended_ = at_lanes_ = 0;
    wake_warps(order);
    while (ended_ < threads_.size()) {
      ready_.clear();
      if ((order.skips() || !release_lanes(order)) && !next_warp()) {
        if (release_barrier()) {
          wake_warps(order);
        } else if (!order.shuffles() || !release_lanes(order)) {
          say_who_waits();
          return fail(kTimeout);
        }
      }
      if (failed_) return fail(kFailed);
      order.arrange(ready_);
      run_ready();
    }
    return kSuccess;
  }

  void wake_warps(Order& order) {
    warps_.resize((threads_.size() + kWarp - 1) / kWarp);
    std::iota(warps_.rbegin(), warps_.rend(), 0u);  // the last comes first
    order.arrange(warps_);
  }

  bool next_warp() {
    if (warps_.empty()) return false;
    const unsigned first = warps_.back() * kWarp;
    warps_.pop_back();
    for (unsigned t = first; t < first + kWarp && t < threads_.size(); ++t) {
      if (threads_[t].state == State::kReady) ready_.push_back(t);
    }
    return true;
  }

  // They begin together or go on together.
  void run_ready() {
    begun_ = 0;
    for (const unsigned t : ready_) {
      if (threads_[t].fiber == nullptr) break;
      ++begun_;
      resume(t);
    }
    while (begun_ < ready_.size()) enter(free_fiber());
  }

  // Stacks: each runs threads that have not begun, one after another, until one of them waits.

  Fiber& free_fiber() {
    if (free_.empty()) {
      all_.push_back(std::make_unique<Fiber>([] { only().run_threads(); }));
      free_.push_back(all_.back().get());
    }
    Fiber* const fiber = free_.back();
    free_.pop_back();
    return *fiber;
  }

  void enter(Fiber& fiber) {
    running_ = &fiber;
    caller_.leave_for(fiber);
  }

  void resume(unsigned t) {
    threads_[t].state = State::kRuns;
    set_current(t);
    enter(*threads_[t].fiber);
  }

  void leave() { running_->leave_for(caller_); }

  void set_current(unsigned t) {
    current_ = t;
    *program_->thread = {t, 0, 0};
  }

  void run_threads() {
    running_->arrived();
    for (;;) {
      while (begun_ < ready_.size() && threads_[ready_[begun_]].fiber == nullptr) {
        set_current(ready_[begun_++]);
        threads_[current_].state = State::kRuns;
        program_->run(work_);
        threads_[current_].state = State::kEnded;
        ++ended_;
      }
      free_.push_back(running_);
      leave();
    }
  }

  uint32_t wait(const Call& call) {
    Thread& thread = threads_[current_];
    thread.call = call;
    thread.state = State::kWaits;
    thread.fiber = running_;
    at_lanes_ += call.kind >= Kind::kBallot;
    leave();
    return thread.result;
  }

  // Who waits may go on when everybody is there: the lanes of one call, or all threads.

  bool release_lanes(Order& order) {
    if (at_lanes_ == 0) return false;
    const size_t count = threads_.size(), step = order.step(count);
    size_t t = order.start(count);
    for (size_t i = 0; i < count; ++i, t = (t + step) % count) {
      if (threads_[t].state != State::kWaits || threads_[t].call.kind < Kind::kBallot || !complete(t)) continue;
      give(t);
      return true;
    }
    return false;
  }

  bool release_barrier() {
    const Thread* first = nullptr;
    uint32_t sum = 0;
    for (const Thread& thread : threads_) {
      if (thread.state == State::kEnded) continue;
      if (thread.state != State::kWaits || thread.call.kind > Kind::kCount) return false;
      if (first == nullptr) first = &thread;
      if (!meet(first->call, thread.call)) return false;
      sum += thread.call.value;
    }
    for (size_t t = 0; t < threads_.size(); ++t) {
      if (threads_[t].state == State::kWaits) threads_[t].result = sum, threads_[t].state = State::kReady;
    }
    return true;
  }

  // The lanes of thread t's warp that its mask names and that have not ended are at its call.
  bool complete(size_t t) const {
    const Call& call = threads_[t].call;
    if ((call.mask >> t % kWarp & 1u) == 0) return false;
    for (size_t lane = 0; lane < kWarp; ++lane) {
      const size_t other = t / kWarp * kWarp + lane;
      if ((call.mask >> lane & 1u) == 0 || other >= threads_.size() || threads_[other].state == State::kEnded) continue;
      if (threads_[other].state != State::kWaits || !meet(call, threads_[other].call)) return false;
    }
    return true;
  }

  // Gives the lanes of thread t's call what they ask for.
  void give(size_t t) {
    const size_t first = t / kWarp * kWarp, behind = std::min(first + kWarp, threads_.size());
    const Call call = threads_[t].call;
    const auto here = [&](size_t other) {
      return other < behind && (call.mask >> (other - first) & 1u) != 0 && threads_[other].state != State::kEnded;
    };
    uint32_t ballot = 0;
    for (size_t other = first; other < behind; ++other) {
      if (here(other)) ballot |= threads_[other].call.value << (call.kind == Kind::kBallot ? other - first : 0);
    }
    for (size_t other = first; other < behind; ++other) {
      if (!here(other)) continue;
      threads_[other].result = call.kind == Kind::kBallot ? ballot : taken(first, other, here);
      ready_.push_back(static_cast<unsigned>(other));
      --at_lanes_;
    }
  }

  template <typename Here>
  uint32_t taken(size_t first, size_t taker, const Here& here) {
    const Call& call = threads_[taker].call;
    const size_t width = static_cast<size_t>(call.width), own = taker - first, segment = own / width * width;
    const size_t lane = static_cast<size_t>(call.lane);
    const size_t crossed = (own ^ lane) < segment + width ? own ^ lane : own;
    const size_t from = call.kind == Kind::kXor ? crossed : segment + lane % width;
    if (from < static_cast<size_t>(kWarp) && here(first + from)) return threads_[first + from].call.value;
    if (std::exchange(failed_, true)) return 0;
    say("block %u, thread %zu takes lane %zu's number, which is not there: %s, mask %08x, %s:%d", program_->block->x, taker, from,
        name_of(call.kind), call.mask, call.file, call.line);
    return 0;
  }

  // Leaves the block as it is; all stacks begin anew.
  Status fail(Status status) {
    failed_ = false;
    free_.clear();
    for (const auto& fiber : all_) {
      fiber->begin();
      free_.push_back(fiber.get());
    }
    return status;
  }

  // Says where threads wait, neighbours of one place in one line, a dozen lines at most.
  void say_who_waits() const {
    say("block %u of %u: threads wait for each other", program_->block->x, program_->blocks->x);
    int lines = 0;
    for (size_t t = 0, behind; t < threads_.size() && lines < 12; t = behind, ++lines) {
      const Thread& thread = threads_[t];
      const auto alike = [&](const Thread& other) {
        return other.state == thread.state && (other.state != State::kWaits || meet(other.call, thread.call));
      };
      for (behind = t + 1; behind < threads_.size() && alike(threads_[behind]);) ++behind;
      if (thread.state == State::kEnded) {
        say("  threads %zu to %zu have ended", t, behind - 1);
      } else {
        say("  threads %zu to %zu: %s, mask %08x, %s:%d", t, behind - 1, name_of(thread.call.kind), thread.call.mask,
            thread.call.file, thread.call.line);
      }
    }
  }

  const Program* program_ = nullptr;
  const void* work_ = nullptr;
  std::vector<unsigned> block_order_, warps_;
  std::vector<Thread> threads_;
  std::vector<unsigned> ready_;
  size_t begun_ = 0, ended_ = 0, at_lanes_ = 0;  // at_lanes_: how many wait for lanes of their warp
  unsigned current_ = 0;
  bool failed_ = false;
  Fiber caller_;
  Fiber* running_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> free_;
};

}  // namespace embax::emulated

#endif  // EMBAX_CSRC_TEST_EMULATED_MACHINE_H_
