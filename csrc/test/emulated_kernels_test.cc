// The CUDA kernels as they are, run on the host (emulated_driver.cc), against plain loops: the same bits in every order of blocks
// and threads, not a byte written but results, and not a byte read outside of the arrays.
//
//   c++ -std=c++17 -O1 -ffp-contract=off -DEMBAX_ISA=plain -I csrc csrc/test/emulated_kernels_test.cc
//       csrc/test/emulated_driver.cc -o emulated_kernels_test -ldl -pthread
//   ./emulated_kernels_test csrc
//
// It compiles the kernels for a dozen dimensions itself, by $CXX (c++) with $EMBAX_EMULATED_FLAGS besides: with
// -fsanitize=address,undefined in them and in the line above, misaligned words are found too.

#include <thread>

#include "numbers.h"
#include "test/emulated_entries.h"

namespace embax::test {
namespace {

constexpr int kDims[] = {1, 3, 4, 7, 16, 30, 64, 100, 128, 130, 516, 1030};
constexpr float kLevels[] = {-1, 1, 0.125f};
struct Batch {
  Batch(int64_t capacity, int64_t samples, int64_t rows, bool wild)
      : capacity(capacity), samples(samples), ids(capacity), offsets(samples + 1), gains(capacity) {
    for (int64_t j = 0; j < capacity; ++j) {
      const bool there = rows > 0 && below(6) > 0;
      ids[j] = static_cast<int32_t>(there ? below(rows) : below(2) ? rows : garbage());
      gains[j] = number();
    }
    for (int64_t s = 0; s <= samples; ++s) offsets[s] = static_cast<int32_t>(below(capacity + 1));
    std::sort(offsets.data(), offsets.data() + samples + 1);
    for (int64_t s = 0; wild && s <= samples; ++s) {
      if (below(4) == 0) offsets[s] = static_cast<int32_t>(below(2) ? garbage() : below(capacity + 1));
    }
  }
  int64_t capacity, samples;
  Field<int32_t> ids, offsets;
  Field<float> gains;
};

void test_pool(const Library& k, Batch& batch, Numbers& table, int64_t rows, cuda::GatherWork work) {
  Split out(k.other, batch.samples, k.dim, false);
  work.gains = k.gained ? batch.gains.data() : nullptr;
  work.samples = static_cast<int32_t>(batch.samples), work.out = out.blocks;
  run(k.module, "pool", blocks_for(batch.samples, cuda::groups_of(k.dim)), work, of(out));
  const Ids ids{batch.ids.data(), batch.offsets.data(), work.gains, batch.capacity, batch.samples, nullptr};
  const GatherPool plainly{{table.data(), k.table, rows, k.dim}, ids, nullptr, k.other, false, k.levelled ? kLevels : nullptr};
  for (int64_t i = 0; i < batch.samples * k.dim; ++i) {
    const float want = held(plain::pooled(plainly, i / k.dim, i % k.dim), k.other);
    EMBAX_CHECK(same(out.at(i / k.dim, i % k.dim), want), "pool, dim %ld, number %ld", long{k.dim}, long{i});
  }
}

void test_one(const Library& k, Batch& batch, Numbers& table, int64_t rows, cuda::GatherWork work) {
  if (below(2)) work.offsets = nullptr, work.fill = 0x7fc00000;
  const int64_t samples = batch.samples, last = batch.offsets[samples];
  const int64_t used = work.offsets == nullptr || last > batch.capacity ? batch.capacity : last;
  Split out(k.other, samples, k.dim, false);
  work.samples = static_cast<int32_t>(samples), work.out = out.blocks;
  run(k.module, "one", blocks_for(samples, cuda::groups_of(k.dim) * cuda::together_of(k.dim)), work, of(out));
  for (int64_t i = 0; i < samples * k.dim; ++i) {
    const int64_t s = i / k.dim, d = i % k.dim, id = s < used ? batch.ids[s] : -1;
    const bool there = id >= 0 && id < rows;
    const float want =
        there ? plain::leveled(k.levelled ? kLevels : nullptr, table.at(id * k.dim + d)) : plain::from_bits(work.fill);
    EMBAX_CHECK(same(out.at(s, d), held(want, k.other)), "one, dim %ld, sample %ld", long{k.dim}, long{s});
  }
}

void test_products(const Library& k, Batch& batch, Numbers& table, int64_t rows) {
  Numbers gradients(k.other, batch.samples * k.dim);
  Field<float> out(batch.capacity);
  const cuda::ProductWork work{table.data(),
                               rows,
                               batch.ids.data(),
                               batch.offsets.data(),
                               gradients.data(),
                               static_cast<int32_t>(batch.capacity),
                               static_cast<int32_t>(batch.samples),
                               kLevels[0],
                               kLevels[1],
                               kLevels[2],
                               out.data()};
  run(k.module, "products", blocks_for(batch.capacity, cuda::groups_of(k.dim)), work, {&out});
  for (int64_t j = 0; j < batch.capacity && std::is_sorted(batch.offsets.data(), batch.offsets.data() + batch.samples + 1); ++j) {
    int64_t sample = 0, id = batch.ids[j];
    while (sample < batch.samples && !(batch.offsets[sample] <= j && j < batch.offsets[sample + 1])) ++sample;
    const bool there = sample < batch.samples && id >= 0 && id < rows;
    const float want = !there ? 0 : sum_in_group(k.dim, k.dim, [&](int64_t d) {
      return plain::leveled(k.levelled ? kLevels : nullptr, table.at(id * k.dim + d)) * gradients.at(sample * k.dim + d);
    });
    EMBAX_CHECK(same(out[j], want), "products, dim %ld, id %ld: %g, not %g", long{k.dim}, long{j}, double{out[j]}, double{want});
  }
}

void test_lookups(const Library& k, cuda::Module runs) {
  for (int round = 0; round < 6; ++round) {
    const int64_t rows = round == 0 ? 0 : 1 + below(40), capacity = round == 1 ? 1 : below(400), samples = 1 + below(150);
    Batch batch(capacity, samples, rows, round % 2 == 1);
    Numbers table(k.table, rows * k.dim);
    cuda::GatherWork work{};
    work.table = table.data(), work.rows = rows, work.ids = batch.ids.data(), work.offsets = batch.offsets.data();
    work.capacity = static_cast<int32_t>(capacity), work.streams = round % 2;
    work.low = kLevels[0], work.high = kLevels[1], work.width = kLevels[2];
    test_pool(k, batch, table, rows, work);
    if (capacity > samples) batch.offsets[samples] = static_cast<int32_t>(below(samples + 1));
    if (capacity >= samples) test_one(k, batch, table, rows, work);
    test_products(k, batch, table, rows);
    Field<int32_t> out(capacity);
    const cuda::SamplesWork places{batch.offsets.data(), static_cast<int32_t>(samples), static_cast<int32_t>(capacity),
                                   out.data()};
    run(runs, "samples", blocks_for(capacity, cuda::kThreads), places, {&out});
    const int32_t* const offsets = batch.offsets.data();
    for (int64_t j = 0; j < capacity; ++j) {
      EMBAX_CHECK(out[j] >= 0 && out[j] < samples, "place %ld", long{j});
      if (!std::is_sorted(offsets, offsets + samples + 1) || j < offsets[0] || j >= offsets[samples]) continue;
      EMBAX_CHECK(offsets[out[j]] <= j && j < offsets[out[j] + 1], "place %ld is not sample %d's", long{j}, out[j]);
    }
  }
}

// begins and their number, as write_runs leaves them.
struct Found {
  explicit Found(int64_t count) : begins(count + 1), runs(1) {}
  Field<int32_t> begins, runs;
};

void test_runs(cuda::Module module, Entries& entries, Found& found) {
  const int64_t count = entries.count, room = std::min(count, entries.rows), tiles = blocks_for(count, cuda::kRunTile);
  const int64_t runs = static_cast<int64_t>(entries.begins.size()) - 1;
  Field<int32_t> counts(tiles), unique(room), places(count);
  cuda::RunsWork work{};
  work.keys = entries.keys.data(), work.count = static_cast<int32_t>(count), work.rows = static_cast<int32_t>(entries.rows);
  work.counts = counts.data(), work.begins = found.begins.data(), work.runs = found.runs.data();
  run(module, "count", tiles, work, {&counts});
  if (below(2)) work.unique = unique.data(), work.room = static_cast<int32_t>(room);
  if (below(2)) work.places = places.data(), work.order = entries.order.data(), work.room = static_cast<int32_t>(room);
  run(module, "write", tiles, work, {&found.begins, &found.runs, &unique, &places});
  EMBAX_CHECK(found.runs[0] == runs, "%d runs, not %ld", found.runs[0], long{runs});
  for (int64_t r = 0; r <= runs; ++r) {
    const int begin = entries.begins[static_cast<size_t>(r)];
    EMBAX_CHECK(found.begins[r] == begin, "run %ld begins at %d, not %d", long{r}, found.begins[r], begin);
    for (int64_t i = begin; work.places && i < (r < runs ? entries.begins[static_cast<size_t>(r) + 1] : count); ++i)
      EMBAX_CHECK(places[entries.order[i]] == (r < runs ? r : room), "place of entry %ld", long{i});
  }
  for (int64_t r = 0; work.unique && r < room; ++r) {
    EMBAX_CHECK(unique[r] == (r < runs ? entries.keys[found.begins[r]] : entries.rows), "row %ld", long{r});
  }
}

// The state of an update, and the same as float32.
struct State {
  State(Dtype dtype, int64_t rows, int64_t dim, const plain::Known& known)
      : table(dtype, rows * dim),
        slots{Field<float>(rows * (known.element_slots > 0 ? dim : 1)), Field<float>(rows * (known.element_slots > 1 ? dim : 1))},
        touched(rows),
        marks(rows) {
    for (auto& slot : slots) {
      for (int64_t i = 0; i < slot.count; ++i) slot[i] = std::fabs(number());
    }
    for (int64_t i = 0; i < rows; ++i) touched[i] = 0;
    for (int64_t i = 0; i < rows * dim; ++i) wide.push_back(table.at(i));
    for (size_t s = 0; s < 2; ++s) plain_slots[s].assign(slots[s].data(), slots[s].data() + slots[s].count);
  }
  Numbers table;
  Field<float> slots[2];
  Field<uint8_t> touched;
  std::vector<uint8_t> marks;
  std::vector<float> wide, plain_slots[2];
};

float rounded(float value, Dtype dtype, bool stochastic, uint32_t seed, int64_t row, int64_t column) {
  if (!stochastic || dtype == Dtype::kFloat32) return held(value, dtype);
  const uint32_t random = plain::random_bits(plain::row_seed(seed, row), column);
  return dtype == Dtype::kBFloat16 ? plain::widened(plain::rounded_at_random(value, random, plain::BFloat16{}))
                                   : plain::widened(plain::rounded_at_random(value, random, plain::Float16{}));
}

bool close(float a, float b, float tolerance) { return same(a, b) || std::fabs(a - b) <= tolerance * (std::fabs(b) + 1); }

// To a norm of 1 at most.
std::vector<float> clipped(std::vector<float> sum) {
  const int64_t dim = static_cast<int64_t>(sum.size()), pass = cuda::kMostStrips * cuda::lanes_of(dim) * cuda::vector_of(dim);
  const auto square = [&](int64_t d) { return sum[static_cast<size_t>(d)] * sum[static_cast<size_t>(d)]; };
  const float norm = std::sqrt(sum_in_group(dim, pass, square));
  const float scale = norm > 1 ? 1 / norm : 1;
  for (float& value : sum) value *= scale;
  return sum;
}

void test_step(const Library& k, bool apart, Entries& entries, const std::vector<std::vector<float>>& sums, cuda::StepWork work) {
  const int optimizer = apart ? k.apart : k.stepped;
  const plain::Known& known = plain::kKnown[optimizer];
  State state(k.table, entries.rows, k.dim, known);
  Field<float> hyper(8), modifiers(3);
  Field<uint32_t> seed(1);
  const float some[] = {0.1f, 0.9f, 0.99f, 0.5f, 0.25f, below(2) ? 0.5f : 0.4f, 0, 0};
  const bool clips = below(3) == 0;
  std::copy(some, some + 8, hyper.data());
  modifiers[0] = clips ? 1.0f : INFINITY, modifiers[1] = below(2) ? 0.01f : 0, modifiers[2] = below(2) ? 0.02f : 0;
  seed[0] = 7;
  work.table = state.table.data(), work.slots[0] = state.slots[0].data(), work.slots[1] = state.slots[1].data();
  work.touched = state.touched.data(), work.hyper = hyper.data(), work.modifiers = modifiers.data(), work.seed = seed.data();
  work.stochastic = below(2);
  run(k.module, apart ? "apart" : "step", 1 + below(3), work, {&state.table, &state.slots[0], &state.slots[1], &state.touched});
  Step step{};
  step.dim = k.dim, step.table = state.wide.data(), step.hyper = hyper.data();
  for (size_t s = 0; s < 2; ++s) step.slots[s] = state.plain_slots[s].data();
  step.clip_norm = INFINITY, step.l2 = modifiers[1], step.decay = modifiers[2];
  for (size_t r = 0; r < sums.size(); ++r) {
    const int32_t row = entries.keys[entries.begins[r]];
    known.step(step, row, clips ? clipped(sums[r]) : sums[r]);
    state.marks[static_cast<size_t>(row)] = 1;
  }
  // The squares of a row are added up in another order than the CPU's.
  const bool other = known.step == plain::step_row<plain::RowwiseAdagrad>;
  for (int64_t i = 0; i < entries.rows * k.dim; ++i) {
    const int64_t row = i / k.dim;
    const float value = state.wide[static_cast<size_t>(i)];
    const float want =
        state.marks[static_cast<size_t>(row)] ? rounded(value, k.table, work.stochastic, 7, row, i % k.dim) : value;
    EMBAX_CHECK(close(state.table.at(i), want,
                      !other                       ? 0
                      : k.table == Dtype::kFloat32 ? 1e-5f
                                                   : 1e-2f),
                "%s, dim %ld: number %ld of row %ld is %.9g, not %.9g", known.name, long{k.dim}, long{i % k.dim}, long{row},
                double{state.table.at(i)}, double{want});
  }
  for (int64_t row = 0; row < entries.rows; ++row)
    EMBAX_CHECK(state.touched[row] == state.marks[static_cast<size_t>(row)], "%ld", long{row});
  for (int s = 0; s < known.element_slots + known.row_slot; ++s) {
    for (int64_t i = 0; i < state.slots[s].count; ++i)
      EMBAX_CHECK(close(state.slots[s][i], state.plain_slots[s][static_cast<size_t>(i)], other ? 1e-5f : 0),
                  "%s, slot %d, number %ld is %.9g, not %.9g", known.name, s, long{i}, double{state.slots[s][i]},
                  double{state.plain_slots[s][static_cast<size_t>(i)]});
  }
}

void test_sums(const Library& k, Entries& entries, Found& found) {
  Split gradients(k.other, Entries::kSamples, k.dim, true);
  const int64_t tiles = entries.count / cuda::kPiece, fields = entries.count / kField, groups = cuda::groups_of(k.dim);
  const int64_t room = std::min(entries.count, entries.rows);
  Field<float> tile_sums(tiles * k.dim), field_sums(fields * k.dim), values(room * k.dim);
  cuda::StepWork work{};
  work.keys = entries.keys.data();
  work.samples = entries.sampled ? entries.samples.data() : nullptr;
  work.gains = k.gained ? entries.gains.data() : nullptr;
  work.count = static_cast<int32_t>(entries.count), work.sample_count = Entries::kSamples, work.rows = entries.rows;
  work.begins = found.begins.data(), work.runs = found.runs.data();
  work.tiles = tile_sums.data(), work.fields = field_sums.data(), work.gradients = gradients.blocks;
  work.room = static_cast<int32_t>(room), work.out_values = values.data();
  run(k.module, "tiles", blocks_for(tiles, groups), work, {&tile_sums});
  run(k.module, "fields", blocks_for(fields, groups), work, {&field_sums});
  if (room > 0) run(k.module, "sums", 1 + below(3), work, {&values});
  const std::vector<std::vector<float>> sums = Summer{k, entries, gradients}.sums();
  for (int64_t i = 0; i < room * k.dim; ++i) {
    const size_t rank = static_cast<size_t>(i / k.dim);
    const float want = rank < sums.size() ? sums[rank][static_cast<size_t>(i % k.dim)] : 0;
    EMBAX_CHECK(same(values[i], want), "sums, dim %ld: number %ld of run %ld is %.9g, not %.9g", long{k.dim}, long{i % k.dim},
                static_cast<long>(rank), double{values[i]}, double{want});
  }
  test_step(k, false, entries, sums, work);
  if (entries.begins.back() != static_cast<int>(sums.size())) return;
  work.begins = work.runs = nullptr, work.tiles = work.fields = nullptr;  // every entry is a run
  test_step(k, true, entries, sums, work);
}

// Runs that end at, just before and just behind tiles and fields and lie over several of them; short ones; none.
void test_entries(const std::vector<Library>& all, cuda::Module runs) {
  std::vector<int> single, few;
  for (int i = 1; i <= 40; ++i) single.push_back(i);
  for (int end = 0; end < 3000;) few.push_back(end += 1 + static_cast<int>(below(below(9) ? 7 : 400)));
  const std::vector<std::vector<int>> cases = {{},
                                               {1},
                                               single,
                                               few,
                                               {127, 128, 129, 257, 384, 385, 512, 1024},
                                               {16384, 33000, 33001, 33129},
                                               {16383, 32769, 34000},
                                               {16385, 33024, 36000},
                                               {5, 20005, 20006},
                                               {49152},
                                               {255},
                                               {383},
                                               {128},
                                               {1023, 1024, 1025, 2048}};
  for (const auto& ends : cases) {
    for (int absent : {0, 1, 2500}) {
      if (ends.empty() && absent == 0) continue;
      Entries entries(ends, absent);
      Found found(entries.count);
      test_runs(runs, entries, found);
      if (absent == 1 && entries.count > 2) continue;
      for (const Library& k : all) {
        if (entries.count < 4000 || k.dim < 20 || (k.dim == 130 && absent == 0)) test_sums(k, entries, found);
      }
    }
  }
}

// Waiting for who does not come, and taking what nobody gives, is an error; what comes next is none the worse.
void test_faults(cuda::Module module) {
  std::fprintf(stderr, "two launches that must fail:\n");
  struct {
    int* at;
  } work;
  Field<int> out(3);
  work.at = out.data();
  cuda::Function function;
  for (int turn = 0; turn < 2; ++turn) {
    for (const auto& [name, status] : {std::pair{"stuck", 702}, {"gone", 719}, {"fine", 0}}) {
      EMBAX_CHECK(cuda::driver().function(&function, module, name) == 0, "%s", name);
      EMBAX_CHECK(launch_once(function, 3, work) == status, "%s", name);
    }
  }
  for (int block = 0; block < 3; ++block) EMBAX_CHECK(out[block] == 96 + (1 << 30), "block %d: %d", block, out[block]);
  EMBAX_CHECK(launch_once(function, 0, work) == 1, "no blocks");
}

void test(const std::string& sources, const std::string& folder) {
  std::vector<Library> all;
  int i = 0;
  for (const int dim : kDims) {
    all.push_back({dim, kDtypes[i % 3], kDtypes[i / 3 % 3], i % 2 == 1, i % 4 > 1, i % kOptimizers, (i + 5) % kOptimizers,
                   folder + "/" + std::to_string(dim)});
    ++i;
  }
  const std::string runs = folder + "/runs", faults = folder + "/faults";
  std::thread half([&] {
    for (size_t at = 0; at < all.size(); at += 2) compile(sources, all[at].path, source_of(all[at]));
  });
  for (size_t at = 1; at < all.size(); at += 2) compile(sources, all[at].path, source_of(all[at]));
  compile(sources, runs, line("count", "CountRuns") + line("write", "WriteRuns") + line("samples", "SamplesOf"));
  compile(sources, faults, kFaults + line("stuck", "Stuck") + line("gone", "Gone") + line("fine", "Fine"));
  half.join();
  for (Library& k : all) k.module = load(k.path + ".so");
  const cuda::Module without_rows = load(runs + ".so");
  for (const Library& k : all) test_lookups(k, without_rows);
  test_entries(all, without_rows);
  test_faults(load(faults + ".so"));
}

}  // namespace
}  // namespace embax::test

int main(int count, char** arguments) {
  if (count != 2) return std::fprintf(stderr, "usage: emulated_kernels_test FOLDER, that of cuda/\n"), 2;
  char folder[] = "/tmp/embax_emulated_XXXXXX";
  EMBAX_CHECK(mkdtemp(folder) != nullptr, "no folder");
  embax::test::test(arguments[1], folder);
  EMBAX_CHECK(std::system((std::string("rm -r ") + folder).c_str()) == 0, "%s", folder);
  std::puts("the CUDA kernels, emulated: the same as plain loops");
}
