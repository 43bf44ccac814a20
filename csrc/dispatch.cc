// Which copy of the kernels this processor runs: the widest it knows, or the one that EMBAX_CPU_ISA names.

#include <cstdlib>
#include <cstring>

#include "kernels.h"
#if defined(EMBAX_X86)
#include <cpuid.h>
#endif

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

namespace {

struct Copy {
  const Kernels* kernels;
  bool runs;
};

#if defined(EMBAX_X86)
// __builtin_cpu_supports does not know the name before GCC 11 and clang 15.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;
}
#endif

const Kernels& choose() {
#if defined(EMBAX_X86)
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool middle = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && has_f16c();
  const Copy copies[] = {
      {&avx512::kKernels, wide && middle}, {&avx2::kKernels, middle}, {&portable::kKernels, true}};
#else
  const Copy copies[] = {{&portable::kKernels, true}};
#endif
  // A name that is not there, or that this processor cannot run, changes nothing.
  const char* wanted = std::getenv("EMBAX_CPU_ISA");
  for (const Copy& copy : copies) {
    if (copy.runs && wanted != nullptr && std::strcmp(wanted, copy.kernels->name) == 0) return *copy.kernels;
  }
  for (const Copy& copy : copies) {
    if (copy.runs) return *copy.kernels;
  }
  return portable::kKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace embax

// The name of the copy in use, for those who ask why.
extern "C" const char* embax_isa() { return embax::kernels().name; }
