// Fuzzing of the kernels: bytes become shapes, ids, offsets, gains and numbers of every kind, in heap blocks of exactly
// their size. AddressSanitizer sees what lies outside; asserted here is that no row moves that no id names, and, where
// the batch is regular, that every bit is that of plain loops.

#include <algorithm>

#include "batch.h"
#include "distinct.h"
#include "plain.h"

namespace embax::test {
namespace {

// The bytes of one input, in order; zeros when they run out.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  template <typename T>
  T take() {
    T value{};
    const size_t size = std::min(left_, sizeof(T));
    if (size > 0) std::memcpy(&value, data_, size);
    data_ += size;
    left_ -= size;
    return value;
  }
  int64_t below(int64_t bound) { return bound <= 256 ? take<uint8_t>() % bound : take<uint16_t>() % bound; }
  bool flip() { return take<uint8_t>() & 1; }
  size_t left() const { return left_; }

  // A short cycle of the input's bytes fills arrays, however long.
  template <typename T>
  Array<T> array(int64_t count) {
    Array<T> values(count);
    const size_t wanted = 1 + static_cast<size_t>(below(64)), period = std::min(left_, wanted);
    char* to = reinterpret_cast<char*>(values.data());
    for (size_t i = 0; i < static_cast<size_t>(count) * sizeof(T) && period > 0; ++i) {
      to[i] = static_cast<char>(data_[i % period]);
    }
    data_ += period;
    left_ -= period;
    return values;
  }

  // Numbers that mostly name something: small ones, their neighbours, and anything at all.
  Array<int32_t> integers(int64_t count, int64_t bound) {
    Array<int32_t> values(count);
    for (int32_t& value : values) {
      const uint8_t kind = take<uint8_t>();
      if (left_ == 0) break;
      value = kind < 224   ? static_cast<int32_t>(kind % (bound + 1))
              : kind < 240 ? take<int32_t>()
                           : static_cast<int32_t>(bound - kind + 232);
    }
    return values;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

struct Batch {
  Array<int32_t> ids, offsets, sample_of;
  Array<float> gains;
  Ids view{};
  bool regular = true;
};

Batch batch_from(Bytes& bytes, int64_t capacity, int64_t rows) {
  Batch batch;
  const int64_t form = bytes.below(3), samples = form == 2 ? capacity : bytes.below(40);
  const bool gained = bytes.flip();
  batch.ids = bytes.integers(capacity, rows);
  if (form == 0) {
    batch.offsets = bytes.integers(samples + 1, capacity);
    if (bytes.flip()) {
      for (int32_t& offset : batch.offsets) offset = static_cast<int32_t>(std::clamp<int64_t>(offset, 0, capacity));
      std::sort(batch.offsets.begin(), batch.offsets.end());
    }
    batch.regular = std::is_sorted(batch.offsets.begin(), batch.offsets.end()) && batch.offsets[0] >= 0;
  } else if (form == 1) {
    batch.sample_of = bytes.integers(capacity, samples);
  }
  if (gained) batch.gains = bytes.array<float>(capacity);
  batch.view = {
      batch.ids.data(), form == 0 ? batch.offsets.data() : nullptr,  gained ? batch.gains.data() : nullptr, capacity,
      samples,          form == 1 ? batch.sample_of.data() : nullptr};
  return batch;
}

void check_same(float got, float want, const char* what) {
  EMBAX_CHECK(plain::to_bits(got) == plain::to_bits(want) || (std::isnan(got) && std::isnan(want)), "%s", what);
}

void look_up(Bytes& bytes, const Kernels& copy, const Rows& table, const Batch& batch) {
  const Dtype out_dtype = static_cast<Dtype>(bytes.below(3));
  const float levels[] = {-1, 1, 0.25f};
  const float* asked = bytes.flip() ? levels : nullptr;
  const bool streams = table.dim % 16 == 0 && bytes.flip();
  const int64_t samples = batch.view.samples, capacity = batch.view.capacity;
  Array<char> copied(capacity * table.dim * size_of(table.dtype));
  copy.gather_rows({table, batch.ids.data(), capacity, copied.data(), streams && table.dtype == Dtype::kFloat32}, 0,
                   capacity);
  if (batch.view.offsets == nullptr) return;

  Array<char> out(samples * table.dim * size_of(out_dtype));
  const GatherPool work{table, batch.view, out.data(), out_dtype, streams, asked};
  copy.gather_pool(work, 0, samples);
  float want;
  for (int64_t i = 0; i < samples * table.dim; ++i) {
    plain::put(&want, out_dtype, 0, plain::pooled(work, i / table.dim, i % table.dim));
    check_same(plain::get(out.data(), out_dtype, i), plain::get(&want, out_dtype, 0), "pooled");
  }
  Array<int32_t> sample_of(capacity);
  std::fill(sample_of.begin(), sample_of.end(), -1);
  visit_present(batch.view, table.rows,
                [&](int64_t place, int64_t sample, int64_t) { sample_of[place] = static_cast<int32_t>(sample); });
  Array<float> products(capacity);
  copy.row_products({table, batch.view, sample_of.data(), out.data(), out_dtype, asked, products.data()}, 0, capacity);
}

void distinct(Threads& pool, const Batch& batch, int64_t rows) {
  const int64_t capacity = batch.view.capacity, room = std::min(capacity, rows);
  Array<int32_t> unique(room), places(capacity);
  Team<Threads> team(pool, capacity);
  const int64_t found = find_distinct(team, {batch.ids.data(), capacity, rows, unique.data(), places.data()});
  for (int64_t i = 0; i < room; ++i) {
    EMBAX_CHECK(i < found ? unique[i] < rows && (i == 0 || unique[i - 1] < unique[i]) : unique[i] == rows, "distinct");
  }
  for (int64_t i = 0; i < capacity; ++i) {
    const int64_t id = batch.ids[i];
    const bool present = id >= 0 && id < rows;
    EMBAX_CHECK(present ? places[i] < found && unique[places[i]] == id : places[i] == room, "place of an id");
  }
}

void step(Bytes& bytes, Threads& pool, const Kernels& copy, Array<char>& table, const Rows& shape, const Batch& batch) {
  const int64_t samples = batch.view.samples, dim = shape.dim;
  if (samples == 0 || batch.view.capacity == 0 || shape.rows == 0 || dim == 0) return;  // the bindings return early
  const int optimizer = static_cast<int>(bytes.below(kOptimizers));
  const plain::Known& known = plain::kKnown[optimizer];
  const Dtype dtype = static_cast<Dtype>(bytes.below(3));
  Blocks blocks;
  for (int64_t left = samples; left > 0; left = samples - blocks.first.back()) {
    const int64_t size = blocks.data.size() == 5 ? left : 1 + bytes.below(left);
    blocks.add(bytes.array<char>(size * dim * size_of(dtype)), size);
  }
  Array<float> slots[kMaxSlots] = {Array<float>(), Array<float>()};
  const int count = known.element_slots + known.row_slot;
  for (int s = 0; s < count; ++s) slots[s] = bytes.array<float>(shape.rows * (s < known.element_slots ? dim : 1));
  const Array<float> hyper = bytes.array<float>(6);
  Step work{};
  work.gradients = blocks.finish(dtype);
  work.table = table.data();
  work.dtype = shape.dtype;
  work.dim = dim;
  for (int s = 0; s < kMaxSlots; ++s) work.slots[s] = slots[s].data();
  work.hyper = hyper.data();
  work.clip_norm = bytes.flip() ? bytes.take<float>() : INFINITY;
  work.l2 = bytes.flip() ? bytes.take<float>() : 0;
  work.decay = bytes.flip() ? bytes.take<float>() : 0;
  work.stochastic = bytes.flip();
  work.seed = bytes.take<uint32_t>();

  Array<int32_t> rows(std::min(batch.view.capacity, shape.rows));
  Array<char> sums(rows.size() * dim * 4);
  work.out_rows = rows.data();
  work.out_values = sums.data();
  work.out_dtype = Dtype::kFloat32;
  EMBAX_CHECK(row_gradients(pool, copy, batch.view, shape.rows, work) <= rows.size(), "too many rows");

  Array<char> before = table;
  Array<float> before_slots[kMaxSlots] = {slots[0], slots[1]};
  update(pool, copy, optimizer, batch.view, shape.rows, work);
  const auto named = [&](int64_t row) {
    return std::find(batch.view.ids, batch.view.ids + batch.view.capacity, row) != batch.view.ids + batch.view.capacity;
  };
  const int64_t bytes_of_row = dim * size_of(shape.dtype);
  for (int64_t row = 0; row < shape.rows; ++row) {
    if (named(row)) continue;
    EMBAX_CHECK(std::memcmp(table.data() + row * bytes_of_row, before.data() + row * bytes_of_row,
                            static_cast<size_t>(bytes_of_row)) == 0,
                "a row moved");
  }
  if (!batch.regular || work.stochastic) return;
  work.table = before.data();
  for (int s = 0; s < kMaxSlots; ++s) work.slots[s] = before_slots[s].data();
  for (const auto& [row, places] : plain::places_of(batch.view, shape))
    known.step(work, row, plain::summed(work, batch.view.gains, places));
  for (int64_t i = 0; i < shape.rows * dim; ++i)
    check_same(plain::get(table.data(), shape.dtype, i), plain::get(before.data(), shape.dtype, i), known.name);
  for (int s = 0; s < count; ++s) {
    for (int64_t i = 0; i < slots[s].size(); ++i) check_same(slots[s][i], before_slots[s][i], "slot");
  }
}

}  // namespace
}  // namespace embax::test

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace embax;
  static test::Threads pool(1);
  static const std::vector<const Kernels*> copies = test::copies();
  test::Bytes bytes(data, size);
  const Kernels& copy = *copies[static_cast<size_t>(bytes.below(static_cast<int64_t>(copies.size())))];
  const Dtype dtype = static_cast<Dtype>(bytes.below(3));
  const int64_t rows = bytes.below(40), dim = bytes.below(8) == 0 ? bytes.below(140) : bytes.below(34);
  // Now and then a row is hot: ids beyond kHot, all from a short cycle.
  const bool many = bytes.below(64) == 63;
  const int64_t capacity = many ? 4000 + bytes.below(3000) : bytes.below(300);
  test::Batch batch = test::batch_from(bytes, capacity, rows);
  test::Array<char> table = bytes.array<char>(rows * dim * test::size_of(dtype));
  const Rows shape{table.data(), dtype, rows, dim};
  test::look_up(bytes, copy, shape, batch);
  test::distinct(pool, batch, rows);
  test::step(bytes, pool, copy, table, shape, batch);
  return 0;
}
