// One optimizer step on every row that a batch touched, or the sums of their gradients: step.h of the CPU, for a
// card.
//
// Entries come sorted by row. A group of threads has a run: it adds up the gradients of its entries in their order,
// whole tiles and fields of a long run by their sums (see kPiece), then reads the row, steps it and writes it: once,
// by one group. So no number is added by two, and the bits of a result depend on the entries alone, not on how blocks
// are scheduled.

#ifndef EMBAX_CSRC_CUDA_STEP_H_
#define EMBAX_CSRC_CUDA_STEP_H_

#include "cuda/device.h"

namespace embax::cuda {

constexpr int kField = kPiece * kPiece;

// Gradients of entries, added up strip by strip.
template <typename D, int64_t dim, bool gained>
struct Sums {
  using G = Group<dim>;
  using V = typename G::V;
  static constexpr int kAhead = 4;

  // Adds the entries [begin, end), in order.
  static EMBAX_DEVICE void add_entries(const StepWork& work, int pass, int begin, int end, V* total) {
    for (int i = begin; i < end; i += kAhead) {
      int sample[kAhead];
      float gain[kAhead];
#pragma unroll
      for (int t = 0; t < kAhead; ++t) {
        sample[t] = i + t >= end ? -1 : work.samples == nullptr ? i + t : __ldg(work.samples + i + t);
        gain[t] = 1.0f;
        if constexpr (gained) gain[t] = i + t < end ? __ldg(work.gains + i + t) : 0.0f;
      }
      const D* from[kAhead];
#pragma unroll
      for (int t = 0; t < kAhead; ++t) {
        from[t] = is_row(sample[t], work.sample_count) ? row_at<const D, dim>(work.gradients, sample[t]) : nullptr;
      }
#pragma unroll
      for (int strip = 0; strip < G::kHeld; ++strip) add_strip(from, gain, G::column(pass, strip), total[strip]);
    }
  }

  // Adds `count` rows of sums that lie one behind the other, in order.
  template <int ahead>
  static EMBAX_DEVICE void add_rows(const float* sums, int count, int pass, V* total) {
#pragma unroll ahead
    for (int k = 0; k < count; ++k) {
#pragma unroll
      for (int strip = 0; strip < G::kHeld; ++strip) {
        const int64_t column = G::column(pass, strip);
        if (!G::holds(column)) continue;
        const V values = load_constant<float, G::kVector>(sums + static_cast<int64_t>(k) * dim + column);
#pragma unroll
        for (int i = 0; i < G::kVector; ++i) total[strip].at[i] += values.at[i];
      }
    }
  }

  // Adds a whole run.
  static EMBAX_DEVICE void add_run(const StepWork& work, int pass, int begin, int end, V* total) {
    for (int at = begin; at < end;) {
      const int tile = at / kPiece,
                behind = tile * kPiece + kPiece;  // at most count + kPiece: no overflow, see the binding
      if (at % kPiece != 0 || behind > end) {
        const int until = behind < end ? behind : end;
        add_entries(work, pass, at, until, total);
        at = until;
        continue;
      }
      // Whole fields, else the tiles before the next field.
      const bool in_fields = at % kField == 0 && end - at >= kField;
      const int size = in_fields ? kField : kPiece, next = at / kField * kField + kField;
      const int count = ((in_fields || end < next ? end : next) - at) / size;
      add_rows<2>((in_fields ? work.fields : work.tiles) + static_cast<int64_t>(at / size) * dim, count, pass, total);
      at += count * size;
    }
  }

 private:
  static EMBAX_DEVICE void add_strip(const D* const* from, const float* gain, int64_t column, V& total) {
    if (!G::holds(column)) return;
    V values[kAhead];
#pragma unroll
    for (int t = 0; t < kAhead; ++t) {
      if (from[t] != nullptr) values[t] = load_constant<D, G::kVector>(from[t] + column);
    }
#pragma unroll
    for (int t = 0; t < kAhead; ++t) {
      if (from[t] == nullptr) continue;
#pragma unroll
      for (int i = 0; i < G::kVector; ++i) total.at[i] += gained ? gain[t] * values[t].at[i] : values[t].at[i];
    }
  }
};

// Whether the entries [first, first + size) are there and of one row.
EMBAX_DEVICE bool is_whole(const StepWork& work, int64_t first, int size) {
  if (first + size > work.count) return false;
  const int key = work.keys[first];
  return is_row(key, work.rows) && work.keys[first + size - 1] == key;
}

// Sums of tiles that lie in one run; a group to a tile.
template <typename D, int64_t dim, bool gained>
struct TileSums {
  using Work = StepWork;
  using G = Group<dim>;

  static EMBAX_DEVICE void run(const Work& work) {
    const int64_t tile = G::index(), first = tile * kPiece;
    if (!is_whole(work, first, kPiece)) return;
    for (int pass = 0; pass < G::kPasses; ++pass) {
      typename G::V total[G::kHeld] = {};
      Sums<D, dim, gained>::add_entries(work, pass, static_cast<int>(first), static_cast<int>(first) + kPiece, total);
      for (int strip = 0; strip < G::kHeld; ++strip) {
        const int64_t column = G::column(pass, strip);
        if (G::holds(column)) store_sums(work.tiles + tile * dim + column, total[strip]);
      }
    }
  }
};

// Sums of fields that lie in one run, of their tiles' sums.
template <int64_t dim>
struct FieldSums {
  using Work = StepWork;
  using G = Group<dim>;

  static EMBAX_DEVICE void run(const Work& work) {
    const int64_t field = G::index();
    if (!is_whole(work, field * kField, kField)) return;
    for (int pass = 0; pass < G::kPasses; ++pass) {
      typename G::V total[G::kHeld] = {};
      Sums<float, dim, false>::template add_rows<16>(work.tiles + field * kPiece * dim, kPiece, pass, total);
      for (int strip = 0; strip < G::kHeld; ++strip) {
        const int64_t column = G::column(pass, strip);
        if (G::holds(column)) store_sums(work.fields + field * dim + column, total[strip]);
      }
    }
  }
};

// Row gradients: the sums of the runs, then zeros up to the last row of the result.
template <typename D, int64_t dim, bool gained>
struct SumRows {
  using Work = StepWork;
  using G = Group<dim>;

  static EMBAX_DEVICE void run(const Work& work) {
    const int runs = *work.runs;
    for (int64_t rank = G::index(); rank < work.room; rank += G::in_grid()) {
      const int begin = rank < runs ? work.begins[rank] : 0, end = rank < runs ? work.begins[rank + 1] : 0;
      for (int pass = 0; pass < G::kPasses; ++pass) {
        typename G::V total[G::kHeld] = {};
        Sums<D, dim, gained>::add_run(work, pass, begin, end, total);
        for (int strip = 0; strip < G::kHeld; ++strip) {
          const int64_t column = G::column(pass, strip);
          if (G::holds(column)) store_sums(work.out_values + rank * dim + column, total[strip]);
        }
      }
    }
  }
};

// Sums and steps. With `apart` every entry is a run, as where rows are distinct already.
template <typename Optimizer, typename T, typename D, int64_t dim, bool gained, bool apart>
struct Step {
  using Work = StepWork;
  using G = Group<dim>;
  using V = typename G::V;
  static constexpr int kSlots = Optimizer::kElementSlots;

  static EMBAX_DEVICE void run(const Work& work) {
    const Constants constants(work);
    const int runs = apart ? work.count : *work.runs;
    for (int64_t rank = G::index(); rank < runs; rank += G::in_grid()) {
      const int begin = apart ? static_cast<int>(rank) : work.begins[rank];
      const int end = apart ? begin + 1 : work.begins[rank + 1];
      const int key = work.keys[begin];
      if (is_row(key, work.rows)) step_row(work, constants, key, begin, end);
    }
  }

 private:
  // What is the same for all rows.
  struct Constants {
    typename Optimizer::Hyper hyper;
    float clip_norm, l2, decay;
    uint32_t seed;
    bool clips, squares;

    EMBAX_DEVICE explicit Constants(const Work& work)
        : hyper(work.hyper),
          clip_norm(work.modifiers[0]),
          l2(work.modifiers[1]),
          decay(work.modifiers[2]),
          seed(*work.seed),
          clips(clip_norm < float_of(0x7f800000)),
          squares(clips || Optimizer::kMeanSquare) {}
  };

  // A row's strips in hand, as they were before the step.
  struct Held {
    V row[G::kHeld], slot0[kSlots > 0 ? G::kHeld : 1], slot1[kSlots > 1 ? G::kHeld : 1];

    // Asked for before the gradients are, so that both are under way at once.
    EMBAX_DEVICE Held(const Work& work, int64_t row_number, int pass) {
#pragma unroll
      for (int strip = 0; strip < G::kHeld; ++strip) {
        const int64_t column = G::column(pass, strip), at = row_number * dim + column;
        if (!G::holds(column)) continue;
        row[strip] = load<T, G::kVector>(static_cast<const T*>(work.table) + at);
        if constexpr (kSlots > 0) slot0[strip] = load<float, G::kVector>(work.slots[0] + at);
        if constexpr (kSlots > 1) slot1[strip] = load<float, G::kVector>(work.slots[1] + at);
      }
    }
  };

  static EMBAX_DEVICE void sum(const Work& work, int pass, int begin, int end, V* total) {
#pragma unroll
    for (int strip = 0; strip < G::kHeld; ++strip) total[strip] = V{};
    if constexpr (apart) {
      Sums<D, dim, gained>::add_entries(work, pass, begin, end, total);
    } else {
      Sums<D, dim, gained>::add_run(work, pass, begin, end, total);
    }
  }

  // This lane's part of the gradient's squares, with the L2 term if there is one.
  static EMBAX_DEVICE float squares_of(const V* gradient, const Held& held, int pass, float scale, float l2) {
    float squares = 0;
#pragma unroll
    for (int strip = 0; strip < G::kHeld; ++strip) {
      if (!G::holds(G::column(pass, strip))) continue;
#pragma unroll
      for (int i = 0; i < G::kVector; ++i) {
        float value = gradient[strip].at[i] * scale;
        if (l2 != 0) value += l2 * held.row[strip].at[i];
        squares += value * value;
      }
    }
    return squares;
  }

  // The sum of squares of the whole row; rows of more than one pass are summed again for it.
  static EMBAX_DEVICE float all_squares(const Work& work, int64_t row, int begin, int end, float scale, float l2) {
    float squares = 0;
    for (int pass = 0; pass < G::kPasses; ++pass) {
      V gradient[G::kHeld];
      const Held held(work, row, pass);
      sum(work, pass, begin, end, gradient);
      squares += squares_of(gradient, held, pass, scale, l2);
    }
    return G::sum(squares);
  }

  struct Factors {
    float scale, factor;
  };

  // What the whole row says about its numbers' steps; writes the row's own slot.
  template <typename Squares>
  static EMBAX_DEVICE Factors factors_of(const Work& work, const Constants& c, int64_t row, float own,
                                         const Squares& squares) {
    float scale = 1, factor = 0;
    if (c.clips) {
      const float norm = sqrtf(squares(1.0f, 0.0f));
      if (norm > c.clip_norm) scale = c.clip_norm / norm;
    }
    if constexpr (Optimizer::kRowSlot) {
      float* const slot = work.slots[kSlots] + row;
      float value = G::first(own);
      float mean_square = 0;
      if constexpr (Optimizer::kMeanSquare) mean_square = squares(scale, c.l2) / static_cast<float>(dim);
      Optimizer::begin_row(c.hyper, mean_square, value);
      factor = Optimizer::factor(c.hyper, value);
      if (G::lane() == 0) *slot = value;
    }
    return {scale, factor};
  }

  static EMBAX_DEVICE void step_row(const Work& work, const Constants& c, int64_t row, int begin, int end) {
    Factors factors{1, 0};
    float own = 0;  // the row's own slot, which lane 0 has; asked for with the row
    if constexpr (Optimizer::kRowSlot) {
      if (G::lane() == 0) own = work.slots[kSlots][row];
    }
    if constexpr (G::kPasses == 1) {
      V gradient[G::kHeld];
      Held held(work, row, 0);
      sum(work, 0, begin, end, gradient);
      factors = factors_of(work, c, row, own,
                           [&](float scale, float l2) { return G::sum(squares_of(gradient, held, 0, scale, l2)); });
      step_strips(work, c, row, 0, factors, gradient, held);
    } else {
      if (c.squares || Optimizer::kRowSlot) {
        factors = factors_of(work, c, row, own,
                             [&](float scale, float l2) { return all_squares(work, row, begin, end, scale, l2); });
      }
#pragma unroll 1
      for (int pass = 0; pass < G::kPasses; ++pass) {
        V gradient[G::kHeld];
        Held held(work, row, pass);
        sum(work, pass, begin, end, gradient);
        step_strips(work, c, row, pass, factors, gradient, held);
      }
    }
    if (work.touched != nullptr && G::lane() == 0) work.touched[row] = 1;
  }

  static EMBAX_DEVICE void step_strips(const Work& work, const Constants& c, int64_t row, int pass, Factors factors,
                                       const V* gradient, Held& held) {
#pragma unroll
    for (int strip = 0; strip < G::kHeld; ++strip) {
      const int64_t column = G::column(pass, strip);
      if (!G::holds(column)) continue;
      V stepped = held.row[strip];
      V& slot0 = held.slot0[kSlots > 0 ? strip : 0];
      V& slot1 = held.slot1[kSlots > 1 ? strip : 0];
#pragma unroll
      for (int i = 0; i < G::kVector; ++i) {
        const float before = held.row[strip].at[i];
        float g = gradient[strip].at[i], unused0 = 0, unused1 = 0;
        if (c.clips) g *= factors.scale;
        if (c.l2 != 0) g += c.l2 * before;
        float& w = stepped.at[i];
        Optimizer::step(c.hyper, factors.factor, g, w, kSlots > 0 ? slot0.at[i] : unused0,
                        kSlots > 1 ? slot1.at[i] : unused1);
        if (c.decay != 0) w -= c.decay * before;
      }
      write(work, c, row, column, stepped, slot0, slot1);
    }
  }

  static EMBAX_DEVICE void write(const Work& work, const Constants& c, int64_t row, int64_t column, const V& stepped,
                                 const V& slot0, const V& slot1) {
    const int64_t at = row * dim + column;
    if constexpr (kSlots > 0) store<float, G::kVector>(work.slots[0] + at, slot0);
    if constexpr (kSlots > 1) store<float, G::kVector>(work.slots[1] + at, slot1);
    T* const to = static_cast<T*>(work.table) + at;
    if constexpr (sizeof(T) == 2) {
      if (work.stochastic != 0) return store_at_random<T, G::kVector>(to, stepped, row_seed(c.seed, row), column);
    }
    store<T, G::kVector>(to, stepped);
  }
};

}  // namespace embax::cuda

#endif  // EMBAX_CSRC_CUDA_STEP_H_
