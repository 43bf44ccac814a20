// What the bindings ask the kernels to do: work orders without XLA types, and one table of functions per vector width.

#ifndef EMBAX_CSRC_KERNELS_H_
#define EMBAX_CSRC_KERNELS_H_

#include <cstdint>

namespace embax {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16, kInvalid };

constexpr int64_t kDtypeSize[] = {4, 2, 2};

// The ids of a batch: sample s owns the positions j with offsets[s] <= j < offsets[s + 1]. See gather_pool.h.
struct Ids {
  const int32_t* ids;      // [capacity]; outside [0, rows): absent
  const int32_t* offsets;  // [samples + 1]; for sums, nullptr: see sample_of
  const float* gains;      // [capacity], or nullptr: every gain is 1
  int64_t capacity;
  int64_t samples;
  const int32_t* sample_of;  // without offsets, [capacity]: each id's sample; nullptr: every id is a sample of its own
};

// Rows to read: an array [rows, dim] of one dtype.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t rows;
  int64_t dim;
};

struct GatherPool {
  Rows table;
  Ids ids;
  void* out;  // [samples, dim] of out_dtype
  Dtype out_dtype;
  bool streams;           // out is too large to stay in a cache: write around it
  const float* levels;    // low, high, width of rounding to levels, or nullptr for none
};

// Rows one by one: out[j] = table[ids[j]], NaN where there is none.
struct GatherRows {
  Rows table;
  const int32_t* ids;  // [count]
  int64_t count;
  void* out;  // [count, dim] of the table's dtype
  bool streams;
};

// out[j] = table[ids[j]] . gradients[sample of j]; 0 where there is no row or no sample.
struct RowProducts {
  Rows table;
  Ids ids;
  const int32_t* sample_of;  // [capacity]; negative: none
  const void* gradients;     // [samples, dim]
  Dtype gradient_dtype;
  const float* levels;
  float* out;  // [capacity]
};

// The gradients of activations, in blocks of samples, one for each feature.
struct Gradients {
  const void* const* blocks;  // [count]
  const int64_t* first;       // [count + 1]: block b holds the samples first[b] .. first[b + 1]
  int64_t count;
  const int32_t* guess;  // block of sample (g << shift): from there the block of a sample is a step or two away
  int shift;
  Dtype dtype;
  bool far;  // too many for a near cache: worth asking for ahead of time
};

// Rows of codes of 8 or 4 bits, each row with its own scale and bias: see quantized.h.
struct QuantizedPool {
  const uint8_t* data;  // [rows, width]
  int64_t rows;
  int64_t width;
  int64_t dim;
  int bits;   // 8 or 4
  Ids ids;    // without offsets: every id is a sample of its own, NaN where there is no such row
  void* out;  // [samples, dim] of out_dtype
  Dtype out_dtype;
  bool streams;
};

constexpr int kMaxSlots = 2;
constexpr int64_t kHyper = 8;  // hyperparameters, filled up with zeros: no formula reads more
// A row that occurs more often than this is added up in blocks of kBlock, which several threads share.
constexpr int64_t kHot = 4096, kBlock = 1024;

// A row with so many occurrences that its sum is made in blocks beforehand.
struct HotRun {
  int64_t begin, end;   // positions among the entries
  int64_t first_block;  // of its sums in Step::hot_sums
};

// One step: occurrences sorted by row, and what to do to each row.
struct Step {
  const uint64_t* entries;   // [count]: row << 32 | place; sorted, places of a row in rising order
  int64_t count;
  const int32_t* sample_of;  // sample of each place, or nullptr: the place is the sample
  const float* gains;        // gain of each place, or nullptr
  Gradients gradients;
  const HotRun* hot;
  int64_t hot_count;
  float* hot_sums;  // [blocks, dim]

  void* table;
  Dtype dtype;
  int64_t dim;
  float* slots[kMaxSlots];
  uint8_t* touched;  // [rows], or nullptr: set to 1 for the rows that are stepped
  const float* hyper;
  float clip_norm, l2, decay;  // infinity, 0, 0: none of them
  bool stochastic;
  uint32_t seed;  // of this step

  // For row gradients: rows and sums are stored in order instead, from rank first_rank on.
  int32_t* out_rows;
  void* out_values;
  Dtype out_dtype;
};

// Takes the steps of the rows whose occurrences begin in [first, last); `sum` holds dim numbers. `rank` is that of the
// first such row, for row gradients.
using StepFunction = void (*)(const Step&, int64_t first, int64_t last, float* sum, int64_t rank);

constexpr int kOptimizers = 10;

struct Kernels {
  const char* name;
  void (*gather_pool)(const GatherPool&, int64_t first, int64_t last);
  void (*gather_rows)(const GatherRows&, int64_t first, int64_t last);
  void (*row_products)(const RowProducts&, int64_t first, int64_t last);
  void (*quantized_pool)(const QuantizedPool&, int64_t first, int64_t last);
  void (*sum_hot_block)(const Step&, int64_t run, int64_t block);
  StepFunction sum_rows;
  // By optimizer (the order of EMBAX_OPTIMIZERS) and dtype of the table.
  StepFunction step[kOptimizers][3];
};

// The widest copy that this processor runs.
const Kernels& kernels();

}  // namespace embax

#endif  // EMBAX_CSRC_KERNELS_H_
