// What the kernels ask of a compiler, and nothing else: inlining, vector loops, prefetch.
//
// Files that hold loops over rows are compiled once for each vector width (see isa.cc): what they define lies in
// the namespace embax::EMBAX_ISA, so that no function of a wide copy can stand in for one of a narrow copy. They call
// nothing from the standard library but memcpy.

#ifndef EMBAX_CSRC_PORTABLE_H_
#define EMBAX_CSRC_PORTABLE_H_

#ifndef EMBAX_ISA
#define EMBAX_ISA portable
#endif

#if defined(__clang__)
#define EMBAX_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define EMBAX_VECTORIZE _Pragma("GCC ivdep")
#else
#define EMBAX_VECTORIZE
#endif

#if defined(__clang__)
#define EMBAX_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define EMBAX_UNROLL _Pragma("GCC unroll 16")
#else
#define EMBAX_UNROLL
#endif

#if defined(__GNUC__)
#define EMBAX_INLINE inline __attribute__((always_inline))
// Called, not copied into its caller, whose loop would have fewer registers.
#define EMBAX_APART __attribute__((noinline))
// Into the second cache: more requests can be under way to it than to the first, which is worth a quarter of the time of
// a gather.
#define EMBAX_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#else
#define EMBAX_INLINE inline
#define EMBAX_APART
#define EMBAX_PREFETCH(address) (void)(address)
#endif

// NVRTC has no headers: integers of known width by the names that <cstdint> gives them.
#if defined(__CUDACC_RTC__)
namespace embax {
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
}  // namespace embax
#endif

// A formula of optimizers.h: read by a host compiler here, and by NVRTC, which has no host headers.
#if defined(__CUDACC__)
#define EMBAX_FORMULA __device__ __forceinline__
#else
#define EMBAX_FORMULA EMBAX_INLINE
#endif

#endif  // EMBAX_CSRC_PORTABLE_H_
