// Runs CUDA kernels on the host, in place of cuda_driver.cc: programs that a host compiler has made (see emulated.h), which
// load() opens from an image that is the text "embax-emulated " and the library's path.
//
// A launch runs on the caller's thread, block by block. Each thread of a block has a stack of its own and runs until it waits for
// others (a barrier, a shuffle, a ballot) or ends; threads that wait go on once all who belong to the call have come to it.
// That is CUDA's law since Volta, and a little stricter: threads meet in one line of the sources, and nobody takes a number from
// a thread that has ended or is not in the mask. Where none can go on the launch fails, and stderr says who waits where.
// What a block shares is filled with rubbish before it begins. Float32 subnormals are kept, whatever the caller's thread does.
//
// Read from the environment at each launch:
//
//   EMBAX_EMULATED_ORDER            forward (blocks and threads by their numbers), backward, or a number: shuffled by it.
//                                   Kernels without races give the same bits in every order.
// and whenever a caller asks for it:
//   EMBAX_EMULATED_MULTIPROCESSORS  2 unless it says something else

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cfenv>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "test/emulated.h"

#if defined(__SANITIZE_ADDRESS__)
#define EMBAX_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMBAX_ASAN 1
#endif
#endif
#if defined(EMBAX_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what a callee must keep on its stack, and goes on where another stack was left.
extern "C" void embax_emulated_switch(void** left, void* entered);
asm(R"(
  .text
  .hidden embax_emulated_switch
  .globl embax_emulated_switch
  .type embax_emulated_switch, @function
embax_emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size embax_emulated_switch, .-embax_emulated_switch
)");
#else
#include <ucontext.h>
#endif

namespace embax::cuda {
namespace {

using emulated::Call;
using emulated::Index;
using emulated::Kind;
using emulated::kWarp;
using emulated::Program;

// Of CUresult.
constexpr Status kSuccess = 0, kInvalidValue = 1, kInvalidImage = 200, kFileNotFound = 301, kNotFound = 500,
                 kTooManyResources = 701, kTimeout = 702, kFailed = 719;

void say(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("embax, emulated CUDA: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
}

// A stack and where it was left; or, with no stack of its own, the caller's thread.
class Fiber {
 public:
  explicit Fiber(void (*entry)()) : entry_(entry) {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
      say("no memory for a stack");
      std::abort();
    }
    stack_ = static_cast<char*>(memory) + kGuard;
    begin();
  }
  Fiber() = default;
  Fiber(const Fiber&) = delete;

  // Forgets where it was left; it will run its entry.
  void begin() {
#if defined(EMBAX_ASAN)
    __asan_unpoison_memory_region(stack_, kStack);
    fake_ = nullptr;
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack_ + kStack) - 8;  // six registers, the entry, and no caller of it
    std::memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(entry_);
    left_ = top;
#else
    getcontext(&left_);
    left_.uc_stack.ss_sp = stack_;
    left_.uc_stack.ss_size = kStack;
    left_.uc_link = nullptr;
    makecontext(&left_, entry_, 0);
#endif
  }

  // Leaves this one, which is running, for another: from the caller's thread to a stack, or back.
  void leave_for(Fiber& other) {
#if defined(EMBAX_ASAN)
    const bool home = other.entry_ == nullptr;
    __sanitizer_start_switch_fiber(&fake_, home ? home_ : other.stack_, home ? home_size_ : kStack);
#endif
#if defined(__x86_64__)
    embax_emulated_switch(&left_, other.left_);
#else
    swapcontext(&left_, &other.left_);
#endif
    arrived();
  }

  // The first thing that runs after a switch.
  void arrived() {
#if defined(EMBAX_ASAN)
    const void* from = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fake_, &from, &size);
    if (entry_ != nullptr) home_ = from, home_size_ = size;
#endif
  }

 private:
  static constexpr size_t kGuard = 1 << 14, kStack = 1 << 16;

  void (*entry_)() = nullptr;
  char* stack_ = nullptr;
#if defined(EMBAX_ASAN)
  void* fake_ = nullptr;
  static inline const void* home_;  // the caller's own stack
  static inline size_t home_size_;
#endif
#if defined(__x86_64__)
  void* left_ = nullptr;
#else
  ucontext_t left_{};
#endif
};

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

 private:
  uint64_t random() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return state_ >> 33;
  }

  bool backward_ = false;
  uint64_t state_ = 0;
};

enum class State { kRuns, kWaits, kEnded };

struct Thread {
  State state = State::kRuns;
  Call call{};
  uint32_t result = 0;
  Fiber* fiber = nullptr;
};

bool meet(const Call& a, const Call& b) {
  return a.kind == b.kind && a.mask == b.mask && a.line == b.line &&
         (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

const char* name_of(Kind kind) {
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
    thread_order_.resize(threads);
    std::iota(thread_order_.begin(), thread_order_.end(), 0u);
    order.arrange(thread_order_);
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
  Status run_block(Order& order) {
    threads_.assign(thread_order_.size(), Thread{});
    ended_ = 0;
    for (begun_ = 0; begun_ < threads_.size();) enter(free_fiber());
    while (ended_ < threads_.size()) {
      ready_.clear();
      if (!release_lanes(order) && !release_barrier()) {
        say_who_waits();
        return fail(kTimeout);
      }
      if (failed_) return fail(kFailed);
      order.arrange(ready_);
      for (const unsigned t : ready_) resume(t);
    }
    return kSuccess;
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
      while (begun_ < threads_.size()) {
        set_current(thread_order_[begun_++]);
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
    leave();
    return thread.result;
  }

  // Who waits may go on when everybody is there. Lanes go first, one call at a time, so that warps get as far from each other as
  // barriers let them.

  bool release_lanes(Order& order) {
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
      if (threads_[t].state == State::kWaits) threads_[t].result = sum, ready_.push_back(static_cast<unsigned>(t));
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
  std::vector<unsigned> block_order_, thread_order_;
  std::vector<Thread> threads_;
  std::vector<unsigned> ready_;
  size_t begun_ = 0, ended_ = 0;
  unsigned current_ = 0;
  bool failed_ = false;
  Fiber caller_;
  Fiber* running_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> all_;
  std::vector<Fiber*> free_;
};

Status load(Module* module, const void* image) {
  constexpr char kMark[] = "embax-emulated ";
  if (std::strncmp(static_cast<const char*>(image), kMark, sizeof kMark - 1) != 0) return kInvalidImage;
  const char* const path = static_cast<const char*>(image) + sizeof kMark - 1;
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) say("%s", dlerror());
  *module = static_cast<Module>(library);
  return library == nullptr ? kFileNotFound : kSuccess;
}

Status function(Function* function, Module module, const char* name) {
  auto* const program = static_cast<Program*>(dlsym(module, name));
  if (program == nullptr) return kNotFound;
  *function = reinterpret_cast<Function>(program);
  return program->size == sizeof(Program) ? kSuccess : kInvalidImage;
}

Status launch(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
              unsigned block_z, unsigned, Stream, void** parameters, void** extra) {
  const auto& program = *reinterpret_cast<const Program*>(function);
  constexpr unsigned kMostBlocks = 0x7fffffff;
  if (grid_x == 0 || grid_x > kMostBlocks || grid_y != 1 || grid_z != 1 || block_x == 0 || block_y != 1 || block_z != 1 ||
      extra != nullptr) {
    return kInvalidValue;
  }
  if (block_x > program.most_threads) return kTooManyResources;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  struct alignas(16) Word {
    char bytes[16];
  };
  std::vector<Word> work((program.work_bytes + sizeof(Word) - 1) / sizeof(Word));
  std::memcpy(work.data(), parameters[0], program.work_bytes);
  fenv_t callers;
  std::fegetenv(&callers);
  std::fesetenv(FE_DFL_ENV);
  const Status status = Machine::only().launch(program, work.data(), grid_x, block_x);
  std::fesetenv(&callers);
  return status;
}

Status attribute(int* value, int which, Device) {
  const char* const asked = std::getenv("EMBAX_EMULATED_MULTIPROCESSORS");
  if (which == kMultiprocessors) *value = asked == nullptr ? 2 : std::atoi(asked);
  if (which == kMajor) *value = 9;
  if (which == kMinor) *value = 0;
  return which == kMultiprocessors || which == kMajor || which == kMinor ? kSuccess : kInvalidValue;
}

Status error_name(Status status, const char** name) {
  constexpr std::pair<Status, const char*> kNames[] = {{kSuccess, "CUDA_SUCCESS"},
                                                       {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
                                                       {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE"},
                                                       {kFileNotFound, "CUDA_ERROR_FILE_NOT_FOUND"},
                                                       {kNotFound, "CUDA_ERROR_NOT_FOUND"},
                                                       {kTooManyResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
                                                       {kTimeout, "CUDA_ERROR_LAUNCH_TIMEOUT"},
                                                       {kFailed, "CUDA_ERROR_LAUNCH_FAILED"}};
  for (const auto& [number, its_name] : kNames) {
    if (number == status) return *name = its_name, kSuccess;
  }
  return kInvalidValue;
}

Driver emulator() {
  Driver d{};
  d.init = [](unsigned) { return kSuccess; };
  d.device_count = [](int* count) { return *count = 1, kSuccess; };
  d.device = [](Device* device, int ordinal) { return *device = ordinal, ordinal == 0 ? kSuccess : kInvalidValue; };
  d.attribute = attribute;
  d.current_context = [](Context* context) {
    static char place;
    return *context = reinterpret_cast<Context>(&place), kSuccess;
  };
  d.context_device = [](Device* device) { return *device = 0, kSuccess; };
  d.load = load;
  d.function = function;
  d.launch = launch;
  d.copy = [](void* to, const void* from, size_t bytes, Stream) {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return kSuccess;
  };
  d.error_name = error_name;
  return d;
}

}  // namespace

const Driver& driver() {
  static const Driver only = emulator();
  return only;
}

const char* platform() { return "cpu"; }

}  // namespace embax::cuda
