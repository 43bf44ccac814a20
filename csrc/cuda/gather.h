// Lookups: rows pooled by sample, rows one by one, the derivatives of gains. The laws are those of gather_pool.h.

#ifndef EMBAX_CSRC_CUDA_GATHER_H_
#define EMBAX_CSRC_CUDA_GATHER_H_

#include "cuda/device.h"

namespace embax::cuda {

// One id a sample, or rows one by one: a group has several samples in hand, those of a block being neighbours.
template <typename T, typename O, int64_t dim, bool levelled>
struct GatherOne {
  using Work = GatherWork;
  using G = Group<dim>;
  static constexpr int kTogether = together_of(dim);

  static EMBAX_DEVICE void run(const Work& work) {
    const int64_t block = static_cast<int64_t>(blockIdx.x) * (G::kGroups * kTogether) + G::in_block();
    const int used =
        work.offsets == nullptr ? work.capacity : clamped(__ldg(work.offsets + work.samples), work.capacity);
    int id[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const int64_t sample = block + t * G::kGroups;
      id[t] = sample < used ? __ldg(work.ids + sample) : -1;
    }
#pragma unroll 1
    for (int strip = 0; strip < G::kAll; ++strip) {
      const int64_t column = G::column(0, strip);
      if (!G::holds(column)) continue;
      typename G::V values[kTogether];
#pragma unroll
      for (int t = 0; t < kTogether; ++t) values[t] = value_of(work, id[t], column);
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const int64_t sample = block + t * G::kGroups;
        if (sample >= work.samples) continue;
        O* out = row_at<O, dim>(work.out, static_cast<int>(sample)) + column;
        store<O, G::kVector>(out, values[t], work.streams != 0);
      }
    }
  }

 private:
  static EMBAX_DEVICE typename G::V value_of(const Work& work, int id, int64_t column) {
    typename G::V values;
    if (is_row(id, work.rows)) {
      values =
          load_constant<T, G::kVector>(static_cast<const T*>(work.table) + static_cast<int64_t>(id) * dim + column);
      if constexpr (levelled) round_to_levels(values, work.low, work.high, work.width);
    } else {
#pragma unroll
      for (int i = 0; i < G::kVector; ++i) values.at[i] = float_of(work.fill);
    }
    return values;
  }
};

// A group to a sample; its ids in their order, kAhead of them under way at a time.
template <typename T, typename O, int64_t dim, bool gained, bool levelled>
struct GatherPool {
  using Work = GatherWork;
  using G = Group<dim>;
  static constexpr int kAhead = 4;

  static EMBAX_DEVICE void run(const Work& work) {
    const int64_t sample = G::index();
    if (sample >= work.samples) return;
    const int begin = clamped(__ldg(work.offsets + sample), work.capacity);
    const int end = clamped(__ldg(work.offsets + sample + 1), work.capacity);
    O* const out = row_at<O, dim>(work.out, static_cast<int>(sample));
#pragma unroll 1
    for (int pass = 0; pass < G::kPasses; ++pass) {
      typename G::V total[G::kHeld] = {};
      for (int j = begin; j < end; j += kAhead) add_some(work, pass, j, end, total);
#pragma unroll
      for (int strip = 0; strip < G::kHeld; ++strip) {
        const int64_t column = G::column(pass, strip);
        if (G::holds(column)) store<O, G::kVector>(out + column, total[strip], work.streams != 0);
      }
    }
  }

 private:
  static EMBAX_DEVICE void add_some(const Work& work, int pass, int j, int end, typename G::V* total) {
    int id[kAhead];
    float gain[kAhead];
#pragma unroll
    for (int t = 0; t < kAhead; ++t) {
      id[t] = j + t < end ? __ldg(work.ids + j + t) : -1;
      gain[t] = 1.0f;
      if constexpr (gained) gain[t] = j + t < end ? __ldg(work.gains + j + t) : 0.0f;
    }
#pragma unroll
    for (int strip = 0; strip < G::kHeld; ++strip) {
      const int64_t column = G::column(pass, strip);
      if (!G::holds(column)) continue;
      typename G::V values[kAhead];
#pragma unroll
      for (int t = 0; t < kAhead; ++t) {
        if (!is_row(id[t], work.rows)) continue;
        values[t] = load_constant<T, G::kVector>(static_cast<const T*>(work.table) + static_cast<int64_t>(id[t]) * dim +
                                                 column);
      }
#pragma unroll
      for (int t = 0; t < kAhead; ++t) {
        if (!is_row(id[t], work.rows)) continue;  // absent: neither it nor its gain adds anything
        if constexpr (levelled) round_to_levels(values[t], work.low, work.high, work.width);
#pragma unroll
        for (int i = 0; i < G::kVector; ++i) {
          total[strip].at[i] += gained ? gain[t] * values[t].at[i] : values[t].at[i];
        }
      }
    }
  }
};

// The sample that owns a place, by bisection; places before the first sample or behind the last get one of those.
EMBAX_DEVICE int sample_of(const int32_t* offsets, int samples, int place) {
  int low = 0, high = samples;  // offsets[low] <= place < offsets[high], if any
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (__ldg(offsets + middle) <= place) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct SamplesOf {
  using Work = SamplesWork;

  static EMBAX_DEVICE void run(const Work& work) {
    const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (place < work.count) work.out[place] = sample_of(work.offsets, work.samples, static_cast<int>(place));
  }
};

// A group to an id: its row times the gradient of its sample; 0 where there is no row or no sample.
template <typename T, typename D, int64_t dim, bool levelled>
struct RowProducts {
  using Work = ProductWork;
  using G = Group<dim>;

  static EMBAX_DEVICE void run(const Work& work) {
    const int64_t place = G::index();
    if (place >= work.count) return;
    const int id = __ldg(work.ids + place);
    const int sample = sample_of(work.offsets, work.samples, static_cast<int>(place));
    const bool owned = __ldg(work.offsets + sample) <= place && place < __ldg(work.offsets + sample + 1);
    float product = 0;
    if (owned && is_row(id, work.rows)) {
      const T* row = static_cast<const T*>(work.table) + static_cast<int64_t>(id) * dim;
      const D* gradient = static_cast<const D*>(work.gradients) + static_cast<int64_t>(sample) * dim;
      for (int strip = 0; strip < G::kAll; ++strip) {
        const int64_t column = G::column(0, strip);
        if (!G::holds(column)) continue;
        auto values = load_constant<T, G::kVector>(row + column);
        const auto factors = load_constant<D, G::kVector>(gradient + column);
        if constexpr (levelled) round_to_levels(values, work.low, work.high, work.width);
#pragma unroll
        for (int i = 0; i < G::kVector; ++i) product += values.at[i] * factors.at[i];
      }
    }
    product = G::sum(product);
    if (G::lane() == 0) work.out[place] = product;
  }
};

}  // namespace embax::cuda

#endif  // EMBAX_CSRC_CUDA_GATHER_H_
