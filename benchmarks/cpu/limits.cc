// What the memory of this machine allows: rows gathered and summed, rows read and written back. Plain loops with software
// prefetch, compiled for this machine at run time; called through ctypes, on the tables of the contenders.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kLine = 16;     // floats
constexpr int64_t kChunk = 2048;  // ids

// Ids between asking for a row and reading it; into the second cache, which was the faster hint by a quarter.
inline int64_t ahead(int64_t dim) { return dim <= kLine ? 32 : 48; }

// Asks for rows, 16 at a time where their lines have room: the first line of each to begin with, for a request waits for
// the address of its page, and the waits of neighbours overlap.
class Ahead {
 public:
  Ahead(const float* table, const int32_t* ids, int64_t first, int64_t total, int64_t dim)
      : table_(table), ids_(ids), total_(total), dim_(dim), asked_(first) {}

  void to(int64_t i) {
    if (i + ahead(dim_) < asked_) return;
    const int64_t end = std::min(total_, asked_ + kTogether);
    for (int64_t k = asked_; k < end; ++k) __builtin_prefetch(table_ + ids_[k] * dim_, 0, 2);
    for (int64_t k = asked_; k < end; ++k) {
      for (int64_t d = kLine; d < dim_; d += kLine) __builtin_prefetch(table_ + ids_[k] * dim_ + d, 0, 2);
    }
    asked_ += kTogether;
  }

 private:
  static constexpr int64_t kTogether = 16;
  const float* const table_;
  const int32_t* const ids_;
  const int64_t total_, dim_;
  int64_t asked_;
};

// out[bag] = sum of the bag's rows, for bags first .. last - 1. kDim is 0 where it is not known at compile time.
template <int kDim>
void gather_bags(const float* table, const int32_t* ids, int64_t first, int64_t last, int64_t total, int64_t valency,
                 int64_t dim_, float* out) {
  const int64_t dim = kDim ? kDim : dim_;
  Ahead asked(table, ids, first * valency, total, dim);
  for (int64_t bag = first; bag < last; ++bag) {
    float* target = out + bag * dim;
    float sums[kDim ? kDim : 1];
    float* to = kDim ? sums : target;
    for (int64_t d = 0; d < dim; ++d) to[d] = 0.0f;
    for (int64_t i = bag * valency; i < (bag + 1) * valency; ++i) {
      asked.to(i);
      const float* row = table + ids[i] * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] += row[d];
    }
    if (kDim) std::copy(sums, sums + kDim, target);
  }
}

template <int kDim>
void add_to_rows(float* table, const int32_t* ids, int64_t first, int64_t last, int64_t total, int64_t dim_,
                 float value) {
  const int64_t dim = kDim ? kDim : dim_;
  Ahead asked(table, ids, first, total, dim);
  for (int64_t i = first; i < last; ++i) {
    asked.to(i);
    float* row = table + ids[i] * dim;
    for (int64_t d = 0; d < dim; ++d) row[d] += value;
  }
}

// Calls work(first, last) for chunks of 0 .. count - 1, in this thread and others; whoever is free takes the next chunk.
template <class Work>
void in_threads(int64_t count, int64_t chunk, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto run = [&] {
    for (int64_t first; (first = next.fetch_add(chunk)) < count;) work(first, std::min(first + chunk, count));
  };
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(run);
  run();
  for (std::thread& other : others) other.join();
}

template <class Function>
void with_dim(int64_t dim, const Function& function) {
  switch (dim) {
    case 16: return function(std::integral_constant<int, 16>());
    case 64: return function(std::integral_constant<int, 64>());
    case 128: return function(std::integral_constant<int, 128>());
    default: return function(std::integral_constant<int, 0>());
  }
}

}  // namespace

extern "C" {

// ids: [bags, valency]; out: [bags, dim].
void gather(const float* table, const int32_t* ids, int64_t bags, int64_t valency, int64_t dim, float* out,
            int threads) {
  in_threads(bags, std::max<int64_t>(1, kChunk / valency), threads, [&](int64_t first, int64_t last) {
    with_dim(dim, [&](auto known) {
      gather_bags<decltype(known)::value>(table, ids, first, last, bags * valency, valency, dim, out);
    });
  });
}

// Adds value to every row of ids, which must be distinct.
void read_modify_write(float* table, const int32_t* ids, int64_t count, int64_t dim, float value, int threads) {
  in_threads(count, kChunk, threads, [&](int64_t first, int64_t last) {
    with_dim(dim, [&](auto known) { add_to_rows<decltype(known)::value>(table, ids, first, last, count, dim, value); });
  });
}

}  // extern "C"
