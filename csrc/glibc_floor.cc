// Keeps the library loadable on older systems than the one that built it (glibc only; empty elsewhere).
//
// libstdc++ is linked statically. Built on a recent system its objects ask for two symbols that glibc gained, or gave
// a new version, in 2.32 and 2.34; everything else is older than 2.17. Hidden definitions here answer them
// inside this library and change nothing outside it. On x86-64 powf got a new version in 2.27, which reports errors
// less; the old one returns the same numbers, and the kernels ask for that.

#include <climits>  // any C header defines __GLIBC__

#if defined(__GLIBC__)

extern "C" {

// "Is this process single-threaded for certain?" Never: reference counts are then atomic, as they must be here.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// 0: nobody ran it (PTHREAD_ONCE_INIT), 1: somebody is running it, 2: done.
__attribute__((visibility("hidden"))) int pthread_once(int* state, void (*run)()) {
  int expected = 0;
  if (__atomic_compare_exchange_n(state, &expected, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_ACQUIRE)) {
    run();
    __atomic_store_n(state, 2, __ATOMIC_RELEASE);
  }
  while (__atomic_load_n(state, __ATOMIC_ACQUIRE) != 2) {
  }
  return 0;
}

#if defined(__x86_64__) && defined(__LP64__)
__asm__(".symver embax_old_powf, powf@GLIBC_2.2.5");
float embax_old_powf(float base, float exponent);
float powf(float base, float exponent) noexcept {  // hidden by exports.map
  return embax_old_powf(base, exponent);
}
#endif

}  // extern "C"

#endif  // __GLIBC__
