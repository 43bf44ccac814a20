// Stacks that take turns on one thread.

#ifndef EMBAX_CSRC_TEST_FIBER_H_
#define EMBAX_CSRC_TEST_FIBER_H_

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

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

namespace embax::emulated {

inline void say(const char* format, ...) {
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

}  // namespace embax::emulated

#endif  // EMBAX_CSRC_TEST_FIBER_H_
