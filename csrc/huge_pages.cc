#include "huge_pages.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace embax {
namespace {

std::atomic<bool> wanted{false};

#if defined(__linux__)
constexpr size_t kSmallest = size_t{32} << 20;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr size_t kMostRemembered = 4096;
#if !defined(MADV_HUGEPAGE)
#define MADV_HUGEPAGE 14
#endif
constexpr int kCollapse = 25;  // MADV_COLLAPSE, from Linux 6.1 on; older ones refuse it and go on

std::mutex mutex;
std::vector<std::pair<const void*, size_t>> advised;

// Whether the array is new here; memory that was freed and given out again in the same place counts as known.
bool is_new(const void* data, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto array = std::make_pair(data, bytes);
  if (std::find(advised.begin(), advised.end(), array) != advised.end()) return false;
  if (advised.size() == kMostRemembered) advised.clear();
  advised.push_back(array);
  return true;
}
#endif

}  // namespace

void advise_table(const void* data, size_t bytes) {
#if defined(__linux__)
  if (!wanted.load(std::memory_order_relaxed) || bytes < kSmallest || !is_new(data, bytes)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace embax

extern "C" void embax_use_huge_pages(int on) { embax::wanted.store(on != 0, std::memory_order_relaxed); }
