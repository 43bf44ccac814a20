// Finds the CUDA driver, which comes with the graphics driver and not with any package, when it is first asked for.

#include "cuda_driver.h"

#if defined(__linux__)
#include <dlfcn.h>

// They moved from libdl to libc in glibc 2.34; under their old names both have them. See glibc_floor.cc.
#if defined(__GLIBC__) && defined(__x86_64__) && defined(__LP64__)
__asm__(".symver dlopen, dlopen@GLIBC_2.2.5");
__asm__(".symver dlsym, dlsym@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver dlopen, dlopen@GLIBC_2.17");
__asm__(".symver dlsym, dlsym@GLIBC_2.17");
#endif
#endif

namespace embax::cuda {
namespace {

#if defined(__linux__)
template <typename F>
bool bind(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  return function != nullptr;
}

Driver opened() {
  Driver d{};
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    d.why_not = "there is no CUDA driver (libcuda.so.1)";
    return d;
  }
  const bool whole = bind(library, "cuInit", d.init) && bind(library, "cuDeviceGetCount", d.device_count) &&
                     bind(library, "cuDeviceGet", d.device) && bind(library, "cuDeviceGetAttribute", d.attribute) &&
                     bind(library, "cuCtxGetCurrent", d.current_context) &&
                     bind(library, "cuCtxGetDevice", d.context_device) && bind(library, "cuModuleLoadData", d.load) &&
                     bind(library, "cuModuleGetFunction", d.function) && bind(library, "cuLaunchKernel", d.launch) &&
                     bind(library, "cuGetErrorName", d.error_name);
  using CopyAddresses = Status (*)(unsigned long long, unsigned long long, size_t, Stream);
  static CopyAddresses copy_addresses = nullptr;
  const bool copies = bind(library, "cuMemcpyDtoDAsync_v2", copy_addresses);
  d.copy = [](void* to, const void* from, size_t bytes, Stream stream) {
    return copy_addresses(reinterpret_cast<unsigned long long>(to), reinterpret_cast<unsigned long long>(from), bytes,
                          stream);
  };
  if (!whole || !copies) d.why_not = "the CUDA driver (libcuda.so.1) lacks a function; it is older than CUDA 12";
  return d;
}
#else
Driver opened() {
  Driver d{};
  d.why_not = "embax has CUDA kernels on Linux only";
  return d;
}
#endif

}  // namespace

const Driver& driver() {
  static const Driver only = opened();
  return only;
}

const char* platform() { return "CUDA"; }

}  // namespace embax::cuda
