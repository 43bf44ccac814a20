// Arrays that notice who goes outside of them, and launches of emulated kernels in every order of blocks and threads.

#ifndef EMBAX_CSRC_TEST_GUARDED_H_
#define EMBAX_CSRC_TEST_GUARDED_H_

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "batch.h"
#include "cuda/work.h"
#include "cuda_driver.h"
#include "plain.h"

namespace embax::test {

inline std::mt19937_64 random_engine(4);
inline int64_t below(int64_t bound) { return static_cast<int64_t>(random_engine() % static_cast<uint64_t>(bound)); }
inline float number() { return below(40) == 0 ? 1e-40f : std::normal_distribution<float>()(random_engine); }
inline int32_t garbage() {
  constexpr int32_t kOdd[] = {-1, INT32_MIN, INT32_MAX, INT32_MAX - 1, 1 << 30};
  return kOdd[below(5)];
}

// Bytes that begin or end where a page does, beside one that faults; what else is in their pages is a pattern.
class Guarded {
 public:
  explicit Guarded(int64_t bytes) : size(bytes), inner_((bytes / kPage + 1) * kPage) {
    void* const memory = mmap(nullptr, inner_ + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EMBAX_CHECK(memory != MAP_FAILED, "no memory");
    pages_ = static_cast<char*>(memory) + kPage;
    mprotect(memory, kPage, PROT_NONE);
    mprotect(pages_ + inner_, kPage, PROT_NONE);
    std::memset(pages_, kPattern, inner_);
    bytes_ = below(4) == 0 ? pages_ : pages_ + inner_ - size;
    all().insert(this);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() {
    all().erase(this);
    munmap(pages_ - kPage, inner_ + 2 * kPage);
  }

  static std::set<Guarded*>& all() {
    static std::set<Guarded*> set;
    return set;
  }
  std::vector<char> saved() const { return {bytes_, bytes_ + size}; }
  void restore(const std::vector<char>& from) { std::copy(from.begin(), from.end(), bytes_); }
  void check() const {
    for (const char* byte = pages_; byte < pages_ + inner_; ++byte) {
      if (byte == bytes_) byte += size;
      if (byte < pages_ + inner_)
        EMBAX_CHECK(*byte == kPattern, "written %ld bytes from the front", static_cast<long>(byte - bytes_));
    }
  }

  const int64_t size;

 protected:
  char* bytes_;

 private:
  static constexpr char kPattern = static_cast<char>(0xa5);
  static constexpr int64_t kPage = 4096;
  int64_t inner_;
  char* pages_;
};

template <typename T>
struct Field : Guarded {
  explicit Field(int64_t count) : Guarded(count * static_cast<int64_t>(sizeof(T))), count(count) {}
  T* data() { return reinterpret_cast<T*>(bytes_); }
  T& operator[](int64_t i) { return data()[i]; }
  const int64_t count;
};

struct Numbers : Field<char> {
  Numbers(Dtype dtype, int64_t count, bool fill = true) : Field(count * size_of(dtype)), dtype(dtype) {
    for (int64_t i = 0; fill && i < count; ++i) plain::put(data(), dtype, i, below(50) ? number() : -0.0f);
  }
  float at(int64_t i) { return plain::get(data(), dtype, i); }
  const Dtype dtype;
};

// Samples in blocks, as a launch has them.
struct Split {
  Split(Dtype dtype, int64_t samples, int64_t dim, bool fill) : dim(dim) {
    const int count = below(2) ? 1 : 1 + static_cast<int>(below(cuda::kMaxBlocks));
    const bool even = below(2) && samples % count == 0;
    for (int64_t first = 0; static_cast<int>(blocks.count) < count; ++blocks.count) {
      const int64_t left = samples - first, last = blocks.count + 1 == count;
      const int64_t size = even ? samples / count : last ? left : below(left / 2 + 1);
      arrays.emplace_back(dtype, size * dim, fill);
      blocks.at[blocks.count] = arrays.back().data();
      blocks.first[blocks.count + 1] = static_cast<int32_t>(first += size);
    }
    blocks.each = even ? static_cast<int32_t>(samples / count) : 0;
  }
  float at(int64_t sample, int64_t d) {
    size_t block = 0;
    while (sample >= blocks.first[block + 1]) ++block;
    return arrays[block].at((sample - blocks.first[block]) * dim + d);
  }
  cuda::Blocks blocks{};
  std::deque<Numbers> arrays;
  int64_t dim;
};

inline std::set<const Guarded*> of(Split& split) {
  std::set<const Guarded*> all;
  for (const Numbers& each : split.arrays) all.insert(&each);
  return all;
}

inline bool same(float a, float b) { return plain::to_bits(a) == plain::to_bits(b) || (std::isnan(a) && std::isnan(b)); }

// As `dtype` holds it.
inline float held(float value, Dtype dtype) {
  float room = 0;
  plain::put(&room, dtype, 0, value);
  return plain::get(&room, dtype, 0);
}

// The sum of all columns' terms, as the lanes of a group make it, so many columns to a pass.
template <typename Term>
float sum_in_group(int64_t dim, int64_t pass, const Term& term) {
  const int64_t lanes = cuda::lanes_of(dim), vector = cuda::vector_of(dim);
  float sums[cuda::kWarp] = {};
  for (int64_t first = 0; first < dim; first += pass) {
    float parts[cuda::kWarp] = {};
    for (int64_t d = first; d < first + pass && d < dim; ++d) parts[d / vector % lanes] += term(d);
    for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += parts[lane];
  }
  for (int64_t other = lanes / 2; other > 0; other /= 2) {
    for (int64_t lane = 0; lane < other; ++lane) sums[lane] += sums[lane + other];
  }
  return sums[0];
}

inline cuda::Module load(const std::string& path) {
  cuda::Module module;
  EMBAX_CHECK(cuda::driver().load(&module, ("embax-emulated " + path).c_str()) == 0, "%s", path.c_str());
  return module;
}

inline int64_t blocks_for(int64_t things, int64_t in_block) { return (things + in_block - 1) / in_block; }

// The caller's thread flushes subnormals, as XLA's do; it must not show, nor be changed.
template <typename Work>
int launch_once(cuda::Function function, int64_t blocks, Work work) {
  void* parameters[] = {&work};
#if defined(__x86_64__)
  const unsigned before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(0x9fc0);
#endif
  const int status =
      cuda::driver().launch(function, static_cast<unsigned>(blocks), 1, 1, cuda::kThreads, 1, 1, 0, nullptr, parameters, nullptr);
#if defined(__x86_64__)
  EMBAX_CHECK((__builtin_ia32_stmxcsr() & 0xffc0) == 0x9fc0, "the caller's modes have changed");
  __builtin_ia32_ldmxcsr(before);
#endif
  return status;
}

// In every order, from the same state: the same bits, and no other array than `results` changes.
template <typename Work>
void run(cuda::Module module, const char* name, int64_t blocks, const Work& work, const std::set<const Guarded*>& results) {
  if (blocks == 0) return;
  cuda::Function function;
  EMBAX_CHECK(cuda::driver().function(&function, module, name) == 0, "%s", name);
  std::map<Guarded*, std::vector<char>> before, first;
  for (Guarded* each : Guarded::all()) before[each] = each->saved();
  for (const char* order : {"forward", "backward", "11", "12"}) {
    setenv("EMBAX_EMULATED_ORDER", order, 1);
    for (auto& [each, bytes] : before) each->restore(bytes);
    const int status = launch_once(function, blocks, work);
    EMBAX_CHECK(status == 0, "%s, order %s: %d", name, order, status);
    for (Guarded* each : Guarded::all()) {
      each->check();
      EMBAX_CHECK(results.count(each) || each->saved() == before[each], "%s writes what it reads", name);
      if (first[each].empty()) first[each] = each->saved();
      EMBAX_CHECK(each->saved() == first[each], "%s, order %s: other bits", name, order);
    }
  }
}

}  // namespace embax::test

#endif  // EMBAX_CSRC_TEST_GUARDED_H_
