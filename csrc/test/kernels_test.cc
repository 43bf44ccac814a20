// Every kernel, in every copy that this processor runs, against plain loops: the same bits, for 1 to 4 threads.

#include <random>

#include "batch.h"
#include "distinct.h"
#include "plain.h"

namespace embax::test {
namespace {

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

std::mt19937_64 random_engine(4);

int64_t below(int64_t bound) { return static_cast<int64_t>(random_engine() % static_cast<uint64_t>(bound)); }
float number() { return std::normal_distribution<float>()(random_engine); }

Array<char> numbers(Dtype dtype, int64_t count, float scale = 1) {
  Array<char> data(count * size_of(dtype));
  for (int64_t i = 0; i < count; ++i) plain::put(data.data(), dtype, i, below(50) == 0 ? -0.0f : scale * number());
  return data;
}

Array<float> floats(int64_t count, bool positive = false) {
  Array<float> data(count);
  for (float& value : data) value = positive ? std::fabs(number()) : number();
  return data;
}

bool same(float a, float b) { return plain::to_bits(a) == plain::to_bits(b) || (std::isnan(a) && std::isnan(b)); }

void check_same(const Array<char>& got, const Array<char>& want, Dtype dtype, const char* what, const char* copy,
                int64_t dim) {
  for (int64_t i = 0; i < got.size() / size_of(dtype); ++i) {
    const float a = plain::get(got.data(), dtype, i), b = plain::get(want.data(), dtype, i);
    EMBAX_CHECK(same(a, b), "%s, %s, dim %ld, dtype %d: number %ld is %.9g, not %.9g", what, copy,
                static_cast<long>(dim), static_cast<int>(dtype), static_cast<long>(i), static_cast<double>(a),
                static_cast<double>(b));
  }
}

std::vector<int64_t> dims() {
  std::vector<int64_t> all;
  for (int64_t dim = 1; dim <= 33; ++dim) all.push_back(dim);
  all.insert(all.end(), {64, 100});
  return all;
}

int32_t garbage() {
  constexpr int32_t kOdd[] = {-1, INT32_MIN, INT32_MAX, INT32_MAX - 1, 1 << 30};
  return kOdd[below(5)];
}

// Ids and the samples they belong to.
struct Batch {
  Array<int32_t> ids, offsets, sample_of;
  Array<float> gains;
  Ids view{};
};

enum class Form { kOffsets, kSamples, kOwn };

// Every eleventh id or so names no row, in a third of the batches every second. `samples` is ignored where every id is a sample.
Batch batch_of(Form form, int64_t capacity, int64_t samples, int64_t rows, bool gained, bool wild = false) {
  Batch batch;
  batch.ids = Array<int32_t>(capacity);
  const int64_t one_in = below(3) == 0 ? 2 : 11;
  for (int32_t& id : batch.ids)
    id = below(one_in) == 0 || rows == 0 ? (below(2) ? garbage() : static_cast<int32_t>(rows))
                                     : static_cast<int32_t>(below(rows));
  if (form == Form::kOwn) samples = capacity;
  if (form == Form::kOffsets) {
    batch.offsets = Array<int32_t>(samples + 1);
    for (int64_t s = 1; s <= samples; ++s) batch.offsets[s] = static_cast<int32_t>(below(capacity + 1));
    std::sort(batch.offsets.begin(), batch.offsets.end());
    if (wild) {
      for (int32_t& offset : batch.offsets) {
        if (below(4) == 0) offset = below(2) ? garbage() : static_cast<int32_t>(below(capacity + 1));
      }
    }
  } else if (form == Form::kSamples) {
    batch.sample_of = Array<int32_t>(capacity);
    for (int32_t& sample : batch.sample_of)
      sample = below(13) == 0 || samples == 0 ? garbage() : static_cast<int32_t>(below(samples));
  }
  if (gained) batch.gains = floats(capacity);
  batch.view = {batch.ids.data(),
                form == Form::kOffsets ? batch.offsets.data() : nullptr,
                gained ? batch.gains.data() : nullptr,
                capacity,
                samples,
                form == Form::kSamples ? batch.sample_of.data() : nullptr};
  return batch;
}

void test_conversions(const Kernels& copy) {
  constexpr int64_t kDim = 61;  // strips of every width but 2
  for (Dtype narrow : {Dtype::kBFloat16, Dtype::kFloat16}) {
    const int64_t rows = 65536 / kDim + 1;
    Array<char> table(rows * kDim * 2), wide(rows * kDim * 4), back(rows * kDim * 2), want(rows * kDim * 2);
    Array<int32_t> ids(rows), offsets(rows + 1);
    for (int64_t i = 0; i < rows * kDim; ++i) reinterpret_cast<uint16_t*>(table.data())[i] = static_cast<uint16_t>(i);
    for (int64_t i = 0; i < rows; ++i) ids[i] = static_cast<int32_t>(i), offsets[i + 1] = static_cast<int32_t>(i + 1);
    const Ids view{ids.data(), offsets.data(), nullptr, rows, rows, nullptr};
    copy.gather_pool({{table.data(), narrow, rows, kDim}, view, wide.data(), Dtype::kFloat32, false, nullptr}, 0, rows);
    for (int64_t i = 0; i < rows * kDim; ++i) {
      const float value = plain::get(table.data(), narrow, i) + 0.0f;  // a sum that begins with 0 has no -0
      EMBAX_CHECK(same(plain::get(wide.data(), Dtype::kFloat32, i), value), "%s, bits %ld", copy.name,
                  static_cast<long>(i));
    }
    for (int round = 0; round < 8; ++round) {
      for (int64_t i = 0; i < rows * kDim; ++i) {
        const uint32_t bits =
            round == 0 ? static_cast<uint32_t>(0x33000000 + i * 64) : static_cast<uint32_t>(random_engine());
        reinterpret_cast<float*>(wide.data())[i] = plain::from_bits(bits) + 0.0f;
        plain::put(want.data(), narrow, i, reinterpret_cast<float*>(wide.data())[i]);
      }
      copy.gather_pool({{wide.data(), Dtype::kFloat32, rows, kDim}, view, back.data(), narrow, false, nullptr}, 0,
                       rows);
      check_same(back, want, narrow, "narrowed", copy.name, kDim);
    }
  }
}

void test_lookup(const Kernels& copy, int64_t dim, Dtype dtype, Dtype out_dtype, bool gained, bool leveled,
                 bool streams) {
  const int64_t rows = below(40), capacity = below(below(16) == 0 ? 9000 : 200), samples = below(30);
  const Array<char> table = numbers(dtype, rows * dim);
  Batch batch = batch_of(Form::kOffsets, capacity, samples, rows, gained, below(2) == 0);
  if (capacity >= samples && below(2) == 0) {  // one id a sample has a loop of its own
    const int64_t front = below(capacity - samples + 1);
    for (int64_t s = 0; s <= samples; ++s) batch.offsets[s] = static_cast<int32_t>(front + s);
  }
  const float levels[] = {-1, 1, 0.125f};
  const float* asked = leveled ? levels : nullptr;
  Array<char> out(samples * dim * size_of(out_dtype)), want(out.size());
  const Rows view{table.data(), dtype, rows, dim};
  const GatherPool work{view, batch.view, out.data(), out_dtype, streams, asked};
  copy.gather_pool(work, 0, samples);
  for (int64_t i = 0; i < samples * dim; ++i)
    plain::put(want.data(), out_dtype, i, plain::pooled(work, i / dim, i % dim));
  check_same(out, want, out_dtype, "gather_pool", copy.name, dim);

  Array<char> copied(capacity * dim * size_of(dtype)), whole(copied.size());
  copy.gather_rows({view, batch.ids.data(), capacity, copied.data(), streams && dtype == Dtype::kFloat32}, 0, capacity);
  Array<int32_t> sample_of(capacity);
  for (int32_t& sample : sample_of) sample = samples == 0 || below(9) == 0 ? -1 : static_cast<int32_t>(below(samples));
  Array<float> products(capacity);
  const Array<char> gradients = numbers(out_dtype, samples * dim);
  copy.row_products({view, batch.view, sample_of.data(), gradients.data(), out_dtype, asked, products.data()}, 0,
                    capacity);
  for (int64_t j = 0; j < capacity; ++j) {
    const int32_t id = batch.ids[j];
    const bool there = plain::present(view, id);
    for (int64_t d = 0; d < dim; ++d)
      plain::put(whole.data(), dtype, j * dim + d, there ? plain::get(table.data(), dtype, id * dim + d) : NAN);
    const float product = !there || sample_of[j] < 0 ? 0.0f : plain::sum_in_lanes(dim, [&](int64_t d) {
      return plain::leveled(asked, plain::get(table.data(), dtype, id * dim + d)) *
             plain::get(gradients.data(), out_dtype, sample_of[j] * dim + d);
    });
    EMBAX_CHECK(same(product, products[j]), "row_products, %s, dim %ld", copy.name, static_cast<long>(dim));
  }
  check_same(copied, whole, dtype, "gather_rows", copy.name, dim);
}

void test_lookups(const Kernels& copy) {
  for (int64_t dim : dims()) {
    for (Dtype dtype : kDtypes) {
      for (Dtype out_dtype : kDtypes) {
        for (int mode = 0; mode < 8; ++mode)
          test_lookup(copy, dim, dtype, out_dtype, mode & 1, mode & 2, (mode & 4) && dim % 16 == 0);
      }
    }
  }
}

void check_entries(const Occurrences& got, const Batch& batch, int64_t rows, bool places) {
  std::vector<uint64_t> want;
  visit_present(batch.view, rows, [&](int64_t place, int64_t sample, int64_t row) {
    want.push_back(static_cast<uint64_t>(row) << 32 | static_cast<uint64_t>(places ? place : sample));
  });
  std::stable_sort(want.begin(), want.end(), [](uint64_t a, uint64_t b) { return a >> 32 < b >> 32; });
  EMBAX_CHECK(got.count() == static_cast<int64_t>(want.size()), "%ld entries, not %zu", static_cast<long>(got.count()),
              want.size());
  for (int64_t i = 0; i < got.count(); ++i)
    EMBAX_CHECK(got.entries()[i] == want[static_cast<size_t>(i)], "entry %ld", static_cast<long>(i));
}

void test_occurrences(Threads& pool) {
  for (int64_t capacity : {0, 1, 100, 129, 8191, 20000, 140000}) {
    // One digit, two with 32 bits between the passes, three with 64.
    for (int64_t rows : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{2000}, int64_t{1} << 20, int64_t{1} << 31}) {
      for (Form form : {Form::kOffsets, Form::kSamples, Form::kOwn}) {
        for (bool wild : {false, true}) {
          Batch batch = batch_of(form, capacity, capacity / 7 + 1, rows, false, wild);
          if (form == Form::kOwn && wild) std::sort(batch.ids.begin(), batch.ids.end());
          Team<Threads> team(pool, capacity);
          const bool places = below(2) == 0;
          const Occurrences found(team, batch.view, rows, places);
          check_entries(found, batch, rows, places);
          EMBAX_CHECK(found.count() <= capacity, "%ld", static_cast<long>(found.count()));
          for (int64_t i = 0; i < found.count(); ++i) {
            const uint64_t entry = found.entries()[i];
            EMBAX_CHECK(
                static_cast<int64_t>(entry >> 32) < rows && (i == 0 || found.entries()[i - 1] >> 32 <= entry >> 32),
                "sorted");
            EMBAX_CHECK(static_cast<int64_t>(entry & 0xffffffffu) < (places ? capacity : batch.view.samples), "place");
          }
        }
      }
    }
  }
}

void test_distinct(Threads& pool) {
  for (int64_t capacity : {0, 1, 100, 129, 1025, 20000, 140000}) {
    for (int64_t rows : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{2000}, int64_t{1} << 20, int64_t{INT32_MAX}}) {
      for (bool absent : {false, true}) {
        Batch batch = batch_of(Form::kOwn, capacity, 0, absent ? 0 : rows, false);
        if (absent) std::fill(batch.ids.begin(), batch.ids.end(), below(2) ? -1 : INT32_MIN);
        const int64_t room = std::min(capacity, rows);
        Array<int32_t> unique(room), places(capacity);
        Team<Threads> team(pool, capacity);
        const int64_t found = find_distinct(team, {batch.ids.data(), capacity, rows, unique.data(), places.data()});
        std::map<int64_t, int64_t> rank;
        for (int32_t id : batch.ids) {
          if (id >= 0 && id < rows) rank[id] = 0;
        }
        int64_t next = 0;
        for (auto& [row, place] : rank) {
          EMBAX_CHECK(unique[next] == row, "distinct row %ld", static_cast<long>(next));
          place = next++;
        }
        EMBAX_CHECK(found == next, "%ld distinct rows, not %ld", static_cast<long>(found), static_cast<long>(next));
        for (; next < room; ++next) EMBAX_CHECK(unique[next] == rows, "filled up at %ld", static_cast<long>(next));
        for (int64_t j = 0; j < capacity; ++j) {
          const auto at = rank.find(batch.ids[j]);
          EMBAX_CHECK(places[j] == (at == rank.end() ? room : at->second), "place of id %ld", static_cast<long>(j));
        }
      }
    }
  }
}

// A table with its slots, and copies of them.
struct State {
  State(Array<char> numbers, int64_t rows) : table(std::move(numbers)), touched(rows) {}
  Array<char> table;
  Array<uint8_t> touched;
  Array<float> slots[kMaxSlots] = {Array<float>(), Array<float>()};
};

Blocks gradients_of(Dtype dtype, int64_t samples, int64_t dim, int count) {
  Blocks blocks;
  for (int64_t left = samples; left > 0;) {
    const int64_t size = static_cast<int>(blocks.data.size()) + 1 == count ? left : 1 + below(left);
    blocks.add(numbers(dtype, size * dim), size);
    left -= size;
  }
  return blocks;
}

struct Case {
  int optimizer;
  Dtype dtype, gradient_dtype;
  int64_t dim, rows, capacity, samples;
  Form form;
  bool gained, modified, stochastic;
  int blocks;
};

void test_update(Threads& pool, const Kernels& copy, const Case& c, Threads& alone) {
  const plain::Known& known = plain::kKnown[c.optimizer];
  const Batch batch = batch_of(c.form, c.capacity, c.samples, c.rows, c.gained);
  if (batch.view.samples == 0) return;
  Blocks blocks = gradients_of(c.gradient_dtype, batch.view.samples, c.dim, c.blocks);
  State state(numbers(c.dtype, c.rows * c.dim), c.rows);
  for (int s = 0; s < known.element_slots + known.row_slot; ++s) {
    state.slots[s] = floats(c.rows * (s < known.element_slots ? c.dim : 1), true);
  }
  const float hyper[] = {0.1f, 0.9f, 0.99f, 0.5f, 0.25f, below(2) ? 0.5f : 0.4f};
  State got = state, other = state;
  const auto step_on = [&](State& on) {
    Step step{};
    step.gradients = blocks.finish(c.gradient_dtype);
    step.table = on.table.data();
    step.dtype = c.dtype;
    step.dim = c.dim;
    for (int s = 0; s < kMaxSlots; ++s) step.slots[s] = on.slots[s].data();
    step.touched = on.touched.data();
    step.hyper = hyper;
    step.clip_norm = c.modified ? 1.0f : INFINITY;
    step.l2 = c.modified ? 0.01f : 0.0f;
    step.decay = c.modified ? 0.02f : 0.0f;
    step.stochastic = c.stochastic;
    step.seed = 7;
    return step;
  };
  update(pool, copy, c.optimizer, batch.view, c.rows, step_on(got));
  update(alone, portable::kKernels, c.optimizer, batch.view, c.rows, step_on(other));
  check_same(got.table, other.table, c.dtype, "other copy, other threads", copy.name, c.dim);

  const Step plainly = step_on(state);
  const plain::Places places = plain::places_of(batch.view, {nullptr, c.dtype, c.rows, c.dim});
  int64_t at = 0;
  Array<int32_t> rows(c.capacity);
  Array<char> values(c.capacity * c.dim * 4), sums(c.capacity * c.dim * 4);
  for (const auto& [row, where] : places) {
    const std::vector<float> sum = plain::summed(plainly, batch.view.gains, where);
    for (int64_t d = 0; d < c.dim; ++d)
      plain::put(sums.data(), Dtype::kFloat32, at * c.dim + d, sum[static_cast<size_t>(d)]);
    ++at;
    known.step(plainly, row, sum);
    state.touched[row] = 1;
  }
  for (int64_t row = 0; row < c.rows; ++row) {
    EMBAX_CHECK(got.touched[row] == state.touched[row] && other.touched[row] == state.touched[row], "%s, mark of row %ld",
                copy.name, static_cast<long>(row));
  }
  if (!c.stochastic) check_same(got.table, state.table, c.dtype, known.name, copy.name, c.dim);
  for (int s = 0; s < kMaxSlots; ++s) {
    for (int64_t i = 0; i < state.slots[s].size(); ++i)
      EMBAX_CHECK(same(got.slots[s][i], state.slots[s][i]), "%s, %s, slot %d", known.name, copy.name, s);
  }
  Step summing = step_on(got);
  summing.out_rows = rows.data();
  summing.out_values = values.data();
  summing.out_dtype = Dtype::kFloat32;
  const int64_t found = row_gradients(pool, copy, batch.view, c.rows, summing);
  EMBAX_CHECK(found == static_cast<int64_t>(places.size()), "%ld rows", static_cast<long>(found));
  int64_t rank = 0;
  for (const auto& [row, where] : places) EMBAX_CHECK(rows[rank++] == row, "%s, row gradients", copy.name);
  check_same(values, sums, Dtype::kFloat32, "row gradients", copy.name, c.dim);
}

void test_updates(const Kernels& copy, Threads& pool, Threads& alone) {
  for (int optimizer = 0; optimizer < kOptimizers; ++optimizer) {
    for (Dtype dtype : kDtypes) {
      for (int64_t dim : dims()) {
        const Form form = static_cast<Form>(below(3));
        test_update(pool, copy,
                    {optimizer, dtype, kDtypes[below(3)], dim, 1 + below(50), 1 + below(150), 1 + below(20), form,
                     below(2) == 0, below(2) == 0, below(4) == 0, 1 + static_cast<int>(below(4))},
                    alone);
      }
      // Hot rows: few rows, many occurrences; enough ids that threads share the work.
      test_update(pool, copy,
                  {optimizer, dtype, kDtypes[below(3)], 1 + below(20), 5, 33000, 900, Form::kOffsets, below(2) == 0,
                   false, false, 3},
                  alone);
      test_update(
          pool, copy,
          {optimizer, dtype, Dtype::kFloat32, 1 + below(20), 3000, 17000, 0, Form::kOwn, below(2) == 0, true, true, 1},
          alone);
    }
  }
}

}  // namespace
}  // namespace embax::test

int main() {
  using namespace embax::test;
  Threads alone(1);
  for (int threads = 1; threads <= 4; ++threads) {
    Threads pool(threads);
    test_occurrences(pool);
    test_distinct(pool);
    for (const embax::Kernels* copy : copies()) {
      if (threads == 1) test_conversions(*copy);
      if (threads == 1) test_lookups(*copy);
      test_updates(*copy, pool, alone);
      std::printf("%s, %d threads: good\n", copy->name, threads);
      std::fflush(stdout);
    }
  }
}
