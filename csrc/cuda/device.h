// What the CUDA kernels ask of their compiler, and the numbers of a row as a lane holds them.
//
// NVRTC compiles these files on the machine that runs them: no headers but those of this folder and the formulas. A
// test compiles them for the host, with threads that it makes itself (csrc/test/emulated.h).

#ifndef EMBAX_CSRC_CUDA_DEVICE_H_
#define EMBAX_CSRC_CUDA_DEVICE_H_

#ifndef EMBAX_ISA
#define EMBAX_ISA cuda
#endif

#include "cuda/work.h"
#include "numbers.h"
#include "optimizers.h"

#define EMBAX_DEVICE __device__ __forceinline__

// The one kernel of a program: K::run over K::Work. The work order lies where the kernel's parameters do, and may be
// indexed.
#ifndef EMBAX_CUDA_KERNEL
#define EMBAX_CUDA_KERNEL(...)                                                \
  extern "C" __global__ void __launch_bounds__(embax::cuda::kThreads)         \
      embax_kernel(const __grid_constant__ typename __VA_ARGS__::Work work) { \
    __VA_ARGS__::run(work);                                                   \
  }
#endif

namespace embax::cuda {

// n neighbouring numbers as float32.
template <int n>
struct Numbers {
  float at[n];
};

// A word of that many bytes, which one instruction loads.
template <int bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<4> {
  using type = unsigned int;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// The bits of n numbers, as a word and one by one.
template <typename T, int n>
union Bits {
  typename WordOf<sizeof(T) * n>::type word;
  uint32_t full[sizeof(T) == 4 ? n : 1];
  uint16_t half[sizeof(T) == 2 ? n : 1];
};

template <typename T, int n>
EMBAX_DEVICE Numbers<n> unpacked(const Bits<T, n>& bits) {
  Numbers<n> numbers;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (sizeof(T) == 4) {
      numbers.at[i] = float_of(bits.full[i]);
    } else {
      numbers.at[i] = widened(T{bits.half[i]});
    }
  }
  return numbers;
}

// Numbers that this kernel also writes.
template <typename T, int n>
EMBAX_DEVICE Numbers<n> load(const T* from) {
  Bits<T, n> bits;
  bits.word = *reinterpret_cast<const typename WordOf<sizeof(T) * n>::type*>(from);
  return unpacked<T, n>(bits);
}

// Numbers that nobody writes while the kernel runs.
template <typename T, int n>
EMBAX_DEVICE Numbers<n> load_constant(const T* from) {
  Bits<T, n> bits;
  bits.word = __ldg(reinterpret_cast<const typename WordOf<sizeof(T) * n>::type*>(from));
  return unpacked<T, n>(bits);
}

template <typename T, int n>
EMBAX_DEVICE void store_word(T* to, const Bits<T, n>& bits, bool streams) {
  auto* word = reinterpret_cast<typename WordOf<sizeof(T) * n>::type*>(to);
  if (streams) {
    __stcs(word, bits.word);
  } else {
    *word = bits.word;
  }
}

template <typename T, int n>
EMBAX_DEVICE void store(T* to, const Numbers<n>& numbers, bool streams = false) {
  Bits<T, n> bits;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (sizeof(T) == 4) {
      bits.full[i] = bits_of(numbers.at[i]);
    } else {
      bits.half[i] = narrowed(numbers.at[i], T{}).bits;
    }
  }
  store_word<T, n>(to, bits, streams);
}

// Sums that come out of a loop: NVRTC (13.5) takes a plain store of those apart into stores of 4 bytes.
template <int n>
EMBAX_DEVICE void store_sums(float* to, const Numbers<n>& sums) {
#if defined(__CUDACC_RTC__)
  if constexpr (n == 4) {
    asm("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(sums.at[0]), "f"(sums.at[1]), "f"(sums.at[2]),
        "f"(sums.at[3])
        : "memory");
    return;
  } else if constexpr (n == 2) {
    asm("st.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(sums.at[0]), "f"(sums.at[1]) : "memory");
    return;
  }
#endif
  store<float, n>(to, sums);
}

// Rounded up with the probability of what is cut off.
template <typename T, int n>
EMBAX_DEVICE void store_at_random(T* to, const Numbers<n>& numbers, uint32_t row_seed, int64_t column) {
  Bits<T, n> bits;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    bits.half[i] = rounded_at_random(numbers.at[i], random_bits(row_seed, column + i), T{}).bits;
  }
  store_word<T, n>(to, bits, false);
}

// The group of threads that a row of `dim` numbers belongs to.
template <int64_t dim>
struct Group {
  static constexpr int kLanes = lanes_of(dim), kVector = vector_of(dim), kGroups = groups_of(dim);
  static constexpr int kStrip = kLanes * kVector;
  static constexpr int kAll = static_cast<int>(strips_of(dim));
  static constexpr int kHeld = kAll < kMostStrips ? kAll : kMostStrips;  // strips in hand at a time
  static constexpr int kPasses = (kAll + kHeld - 1) / kHeld;
  using V = Numbers<kVector>;

  EMBAX_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % kLanes; }
  EMBAX_DEVICE static int in_block() { return static_cast<int>(threadIdx.x) / kLanes; }
  EMBAX_DEVICE static int64_t index() { return static_cast<int64_t>(blockIdx.x) * kGroups + in_block(); }
  EMBAX_DEVICE static int64_t in_grid() { return static_cast<int64_t>(gridDim.x) * kGroups; }

  // This lane's first column of a strip; past the end of the row there is nothing to do.
  EMBAX_DEVICE static int64_t column(int pass, int strip) {
    return static_cast<int64_t>(pass * kHeld + strip) * kStrip + lane() * kVector;
  }
  // Whether strips may end past the row, or lanes may have none: known where rows fill their strips.
  EMBAX_DEVICE static bool holds(int64_t column) {
    return kAll % kHeld == 0 && dim % kStrip == 0 ? true : column < dim;
  }

  // The sum of every lane's value, for all of the group, in an order that only the number of lanes says.
  EMBAX_DEVICE static float sum(float value) {
    if constexpr (kLanes > 1) {
#pragma unroll
      for (int other = kLanes / 2; other > 0; other /= 2) value += __shfl_xor_sync(mask(), value, other);
    }
    return value;
  }
  // What lane 0 has.
  EMBAX_DEVICE static float first(float value) {
    if constexpr (kLanes > 1) value = __shfl_sync(mask(), value, 0, kLanes);
    return value;
  }

 private:
  EMBAX_DEVICE static unsigned mask() {
    if constexpr (kLanes == kWarp) {
      return 0xffffffffu;
    } else {
      const unsigned within = threadIdx.x % kWarp;
      return ((1u << kLanes) - 1u) << (within / kLanes * kLanes);
    }
  }
};

// A sample's place in the blocks of a stack.
struct Spot {
  int block;
  int64_t at;
};

EMBAX_DEVICE Spot spot_of(const Blocks& blocks, int sample) {
  if (blocks.count == 1) return {0, sample};
  if (blocks.each > 0) {
    const int block = static_cast<int>(static_cast<uint32_t>(sample) / static_cast<uint32_t>(blocks.each));
    return {block, sample - block * blocks.each};
  }
  int low = 0, high = blocks.count;  // first[low] <= sample < first[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (blocks.first[middle] <= sample) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {low, sample - blocks.first[low]};
}

template <typename T, int64_t dim>
EMBAX_DEVICE T* row_at(const Blocks& blocks, int sample) {
  const Spot spot = spot_of(blocks, sample);
  return static_cast<T*>(blocks.at[spot.block]) + spot.at * dim;
}

EMBAX_DEVICE bool is_row(int id, int64_t rows) {
  return static_cast<uint64_t>(static_cast<int64_t>(id)) < static_cast<uint64_t>(rows);
}

EMBAX_DEVICE int clamped(int offset, int capacity) { return offset < 0 ? 0 : offset > capacity ? capacity : offset; }

// Rounded to levels; half goes to the even level.
template <int n>
EMBAX_DEVICE void round_to_levels(Numbers<n>& numbers, float low, float high, float width) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float value = numbers.at[i], clipped = value < low ? low : value > high ? high : value;
    numbers.at[i] = low + rintf((clipped - low) / width) * width;
  }
}

}  // namespace embax::cuda

#endif  // EMBAX_CSRC_CUDA_DEVICE_H_
