// Stands in for NVRTC, so that a host compiler reads the CUDA kernels as they are: included before a program,
//
//   c++ -std=c++17 -O1 -ffp-contract=off -fPIC -shared -D__CUDACC__ -include csrc/test/emulated.h -I csrc
//       -x c++ program.cu -o program.so
//
// it defines what NVRTC has built in and the kernels use. A program's threads are run by emulated_driver.cc, which reads this
// file without __CUDACC__: then there is only what the two say to each other.

#ifndef EMBAX_CSRC_TEST_EMULATED_H_
#define EMBAX_CSRC_TEST_EMULATED_H_

#include <cstddef>
#include <cstdint>

namespace embax::emulated {

constexpr int kWarp = 32;

struct Index {
  unsigned x, y, z;
};

// What a thread waits for, and where in the sources: threads meet in one call of one line or not at all.
enum class Kind { kBarrier, kCount, kBallot, kFrom, kXor };
struct Call {
  Kind kind;
  unsigned mask;   // of lanes; barriers have none
  uint32_t value;  // what this thread gives
  int lane;        // whose value it takes: a number within `width` lanes, or what its own is xored with
  int width;
  const char* file;
  int line;
};

// What a program exports by the name of its kernel.
struct Program {
  size_t size;  // of this struct: programs and drivers of different sources do not mix
  void (*run)(const void* work);
  size_t work_bytes;
  unsigned most_threads;  // of a block
  Index *thread, *block, *threads, *blocks;
  uint32_t (**wait)(const Call&);  // set by the driver
  char *shared, *shared_end;
};

}  // namespace embax::emulated

#if defined(__CUDACC__)

#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads)
#define __forceinline__ inline
#define __shared__ static __attribute__((section("embax_shared")))

extern "C" {
float sqrtf(float) noexcept;
float powf(float, float) noexcept;
float rintf(float) noexcept;
extern char __start_embax_shared[] __attribute__((weak, visibility("hidden")));  // what the linker calls the section's ends
extern char __stop_embax_shared[] __attribute__((weak, visibility("hidden")));
}

// No program takes a function or a block's memory from another.
#pragma GCC visibility push(hidden)

static embax::emulated::Index threadIdx, blockIdx, blockDim, gridDim;
static uint32_t (*embax_wait)(const embax::emulated::Call&);

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <typename T>
inline T __ldg(const T* from) {
  return *from;
}
template <typename T>
inline T __ldcs(const T* from) {
  return *from;
}
template <typename T>
inline void __stcs(T* to, T value) {
  *to = value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

#define EMBAX_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMBAX_HERE) { embax_wait({embax::emulated::Kind::kBarrier, 0, 0, 0, 0, file, line}); }

inline int __syncthreads_count(int counts, EMBAX_HERE) {
  return static_cast<int>(embax_wait({embax::emulated::Kind::kCount, 0, counts != 0, 0, 0, file, line}));
}

inline unsigned __ballot_sync(unsigned mask, int votes, EMBAX_HERE) {
  return embax_wait({embax::emulated::Kind::kBallot, mask, votes != 0, 0, embax::emulated::kWarp, file, line});
}

template <typename T>
inline T embax_shuffled(embax::emulated::Kind kind, unsigned mask, T value, int lane, int width, EMBAX_HERE) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits = embax_wait({kind, mask, bits, lane, width, file, line});
  __builtin_memcpy(&value, &bits, sizeof bits);
  return value;
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = embax::emulated::kWarp, EMBAX_HERE) {
  return embax_shuffled(embax::emulated::Kind::kFrom, mask, value, lane, width, file, line);
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane, int width = embax::emulated::kWarp, EMBAX_HERE) {
  return embax_shuffled(embax::emulated::Kind::kXor, mask, value, lane, width, file, line);
}

#undef EMBAX_HERE

// A library may hold several, by names of their own.
#define EMBAX_EMULATED_KERNEL(name, ...)                                                                 \
  extern "C" __attribute__((visibility("default"))) embax::emulated::Program name;                       \
  embax::emulated::Program name = {                                                                      \
      sizeof(embax::emulated::Program),                                                                  \
      [](const void* work) { __VA_ARGS__::run(*static_cast<const typename __VA_ARGS__::Work*>(work)); }, \
      sizeof(typename __VA_ARGS__::Work),                                                                \
      embax::cuda::kThreads,                                                                             \
      &threadIdx,                                                                                        \
      &blockIdx,                                                                                         \
      &blockDim,                                                                                         \
      &gridDim,                                                                                          \
      &embax_wait,                                                                                       \
      __start_embax_shared,                                                                              \
      __stop_embax_shared};

#define EMBAX_CUDA_KERNEL(...) EMBAX_EMULATED_KERNEL(embax_kernel, __VA_ARGS__)

#endif  // defined(__CUDACC__)

#endif  // EMBAX_CSRC_TEST_EMULATED_H_
