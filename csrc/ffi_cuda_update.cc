// XLA FFI bindings of the CUDA updates: a step in place, row gradients, distinct rows.

#include <algorithm>
#include <string_view>

#include "ffi_cuda_common.h"

namespace embax::cuda {

using Seed = ffi::Buffer<ffi::U32, 0>;

namespace {

// Sorted occurrences as operands: keys, each one's sample and gain; no samples: entry i is sample i.
std::string read_entries(const IntVector& keys, const IntVector& samples, const FloatVector& gains,
                         const BlocksMaker& gradients, StepWork& work) {
  const int64_t count = keys.dimensions()[0], given = samples.dimensions()[0];
  if (given != 0 && given != count) return "samples must be as many as keys, or none";
  if (given == 0 && gradients.samples() != count) return "without samples there must be a gradient for each key";
  if (!gains_fit(keys, gains)) return "gains must be as many as keys, or none";
  if (count > kMostIds) return "there are too many keys: " + std::to_string(kMostIds) + " at most";
  work.keys = keys.typed_data();
  work.samples = given == 0 ? nullptr : samples.typed_data();
  work.gains = gains.dimensions()[0] == 0 ? nullptr : gains.typed_data();
  work.count = static_cast<int32_t>(count);
  work.sample_count = static_cast<int32_t>(gradients.samples());
  work.gradients = gradients.blocks();
  return {};
}

std::string read_gradients(const ffi::RemainingArgs& args, size_t begin, int64_t dim, BlocksMaker& blocks) {
  for (size_t i = begin; i < args.size(); ++i) {
    const auto buffer = args.get<ffi::AnyBuffer>(i);
    if (!buffer.has_value()) return "gradients must be arrays";
    if (auto wrong = blocks.add(rows_of(*buffer), dim); !wrong.empty()) return "gradients " + wrong;
  }
  return {};
}

// Lays the runs out in scratch numbers; see scratch_numbers.
RunsWork runs_in(int32_t* numbers, const int32_t* keys, int64_t count, int64_t rows) {
  RunsWork work{};
  work.keys = keys;
  work.count = static_cast<int32_t>(count);
  work.rows = static_cast<int32_t>(rows);
  work.counts = numbers;
  work.runs = numbers + run_tiles_of(count);
  work.begins = work.runs + 1;
  return work;
}

void add_runs(const RunsWork& work, Plan& plan) {
  for (const std::string& program : runs_programs()) plan.add(program, run_tiles_of(work.count), work);
}

// Runs, and the sums of the long ones; `programs` are those of sum_programs, to begin with.
void add_sums(const Programs& programs, RunsWork& runs, float* sums, int64_t dim, StepWork& work, Plan& plan) {
  add_runs(runs, plan);
  work.begins = runs.begins, work.runs = runs.runs;
  work.tiles = sums;
  work.fields = sums + tiles_of(work.count) * dim;
  if (tiles_of(work.count) > 0) plan.add(programs[2], blocks_for(tiles_of(work.count), groups_of(dim)), work);
  if (fields_of(work.count) > 0) plan.add(programs[3], blocks_for(fields_of(work.count), groups_of(dim)), work);
}

// A result in place of an operand of the same shape; where XLA gave it memory of its own, a copy goes first.
void* in_place(const ffi::AnyBuffer& from, const ffi::AnyBuffer& to, Plan& plan) {
  if (to.untyped_data() != from.untyped_data())
    plan.copies.push_back({to.untyped_data(), from.untyped_data(), from.size_bytes()});
  return to.untyped_data();
}

constexpr const char* kState = "table must be [rows, dim], slots float32 [rows, dim] or [rows, 1], marks uint8 [rows]";

// Table, slots and marks: operands and results of one shape each.
std::string place(const ffi::RemainingArgs& args, ffi::RemainingRets& rets, size_t parts, const Formula& formula,
                  StepWork& work, Rows& table, Plan& plan) {
  const size_t slots = static_cast<size_t>(formula.element_slots + formula.row_slot);
  if (parts < 1 + slots || parts > 2 + slots || args.size() < parts) {
    return std::string(formula.name) + " takes a table and " + std::to_string(slots) + " slots";
  }
  for (size_t i = 0; i < parts; ++i) {
    const auto from = args.get<ffi::AnyBuffer>(i);
    auto to = rets.get<ffi::AnyBuffer>(i);
    if (!from.has_value() || !to.has_value() || from->element_type() != (*to)->element_type()) return kState;
    const auto given = from->dimensions(), result = (*to)->dimensions();
    if (given.size() != result.size() || !std::equal(given.begin(), given.end(), result.begin())) return kState;
    void* const data = in_place(*from, **to, plan);
    if (i == slots + 1) {
      if (from->element_type() != ffi::U8 || given.size() != 1 || given[0] != table.rows) return kState;
      work.touched = static_cast<uint8_t*>(data);
      continue;
    }
    const Rows rows = rows_of(*from);
    if (i == 0) table = rows;
    const int64_t dim = i == 0 || i <= static_cast<size_t>(formula.element_slots) ? table.dim : 1;
    if (rows.rows < 0 || rows.rows != table.rows || rows.dim != dim || !aligned(data)) return kState;
    if (i > 0 && rows.dtype != Dtype::kFloat32) return kState;
    if (i == 0) {
      work.table = data;
    } else {
      work.slots[i - 1] = static_cast<float*>(data);
    }
  }
  if (table.rows > std::numeric_limits<int32_t>::max()) return "a table has fewer than 2^31 rows";
  work.rows = table.rows;
  return {};
}

// The last two results are scratch: numbers and rows of sums.
struct Scratch {
  int32_t* numbers;
  float* sums;
};

std::string scratch_of(ffi::RemainingRets& rets, int64_t count, int64_t dim, Scratch& scratch) {
  if (rets.size() < 2) return "there must be scratch results";
  auto numbers = rets.get<ffi::Buffer<ffi::S32, 1>>(rets.size() - 2);
  auto sums = rets.get<ffi::Buffer<ffi::F32, 2>>(rets.size() - 1);
  if (!numbers.has_value() || !sums.has_value()) return "scratch must be int32 [n] and float32 [m, dim]";
  const bool enough = (*numbers)->dimensions()[0] >= scratch_numbers(count) &&
                      (*sums)->dimensions()[0] >= scratch_rows(count) && (*sums)->dimensions()[1] == dim;
  if (!enough || !aligned((*sums)->typed_data())) return "scratch is too small";
  scratch = {(*numbers)->typed_data(), (*sums)->typed_data()};
  return {};
}

// Operands: sorted keys, samples and gains; an activation that is not read (the update comes after the lookup for its
// sake); scalars; then table, slots and marks, which are the results too, then the gradients of each feature. Behind
// those results is scratch.
Plan plan_update(IntVector keys, IntVector samples, FloatVector gains, ffi::AnyBuffer, FloatVector hyper,
                 FloatVector modifiers, Seed seed, ffi::RemainingArgs args, ffi::RemainingRets rets,
                 std::string_view optimizer, bool stochastic, bool apart) {
  const Formula* formula = formula_named(std::string(optimizer));
  if (formula == nullptr) return refused("update: there is no kernel named " + std::string(optimizer));
  Plan plan;
  StepWork work{};
  Rows table{};
  const size_t scratch_results = apart ? 0 : 2;
  if (rets.size() < 1 + scratch_results) return refused("update: results are missing");
  const size_t parts = rets.size() - scratch_results;
  if (auto wrong = place(args, rets, parts, *formula, work, table, plan); !wrong.empty())
    return refused("update: " + wrong);
  BlocksMaker gradients;
  if (auto wrong = read_gradients(args, parts, table.dim, gradients); !wrong.empty())
    return refused("update: " + wrong);
  if (auto wrong = read_entries(keys, samples, gains, gradients, work); !wrong.empty())
    return refused("update: " + wrong);
  if (hyper.dimensions()[0] != kHyper || modifiers.dimensions()[0] != 3)
    return refused("update: hyperparameters do not fit");
  if (work.count == 0 || gradients.samples() == 0 || table.rows == 0 || table.dim == 0) return plan;
  work.hyper = hyper.typed_data();
  work.modifiers = modifiers.typed_data();
  work.seed = seed.typed_data();
  work.stochastic = stochastic;
  const bool gained = work.gains != nullptr;
  const Programs programs =
      update_programs(formula->text, table.dtype, gradients.dtype(), table.dim, work.count, gained, apart);
  if (!apart) {
    Scratch scratch{};
    if (auto wrong = scratch_of(rets, work.count, table.dim, scratch); !wrong.empty())
      return refused("update: " + wrong);
    RunsWork runs = runs_in(scratch.numbers, work.keys, work.count, table.rows);
    add_sums(programs, runs, scratch.sums, table.dim, work, plan);
  }
  plan.add(programs.back(), blocks_for(std::min<int64_t>(work.count, table.rows), groups_of(table.dim)), work, true);
  return plan;
}

// Results: rows, sums, scratch.
Plan plan_row_gradients(IntVector keys, IntVector samples, FloatVector gains, ffi::AnyBuffer, ffi::RemainingArgs args,
                        ffi::RemainingRets rets, int64_t rows) {
  if (rets.size() != 4) return refused("row_gradients: there must be rows, sums and two scratch results");
  auto unique = rets.get<ffi::Buffer<ffi::S32, 1>>(0);
  auto values = rets.get<ffi::Buffer<ffi::F32, 2>>(1);
  if (!unique.has_value() || !values.has_value())
    return refused("row_gradients: rows must be int32 [n], sums float32 [n, dim]");
  const int64_t room = (*unique)->dimensions()[0], dim = (*values)->dimensions()[1];
  StepWork work{};
  BlocksMaker gradients;
  if (auto wrong = read_gradients(args, 0, dim, gradients); !wrong.empty()) return refused("row_gradients: " + wrong);
  if (auto wrong = read_entries(keys, samples, gains, gradients, work); !wrong.empty())
    return refused("row_gradients: " + wrong);
  if (rows < 0 || rows > std::numeric_limits<int32_t>::max() || (*values)->dimensions()[0] != room ||
      room != std::min<int64_t>(work.count, rows) || room == 0 || dim == 0 || !aligned((*values)->typed_data())) {
    return refused("row_gradients: the results must hold min(keys, rows) rows, one at least");
  }
  Scratch scratch{};
  if (auto wrong = scratch_of(rets, work.count, dim, scratch); !wrong.empty())
    return refused("row_gradients: " + wrong);
  work.rows = rows;
  work.room = static_cast<int32_t>(room);
  work.out_values = (*values)->typed_data();
  RunsWork runs = runs_in(scratch.numbers, work.keys, work.count, rows);
  runs.unique = (*unique)->typed_data();
  runs.room = work.room;
  Plan plan;
  const Programs programs = row_gradient_programs(gradients.dtype(), dim, work.count, work.gains != nullptr);
  add_sums(programs, runs, scratch.sums, dim, work, plan);
  plan.add(programs.back(), blocks_for(room, groups_of(dim)), work, true);
  return plan;
}

// The distinct ones among sorted keys, and the place among them of each key where it came from.
Plan plan_distinct_rows(IntVector keys, IntVector order, ffi::Result<IntVector> unique, ffi::Result<IntVector> places,
                        ffi::Result<IntVector> numbers, int64_t rows) {
  const int64_t count = keys.dimensions()[0], room = unique->dimensions()[0];
  if (count > kMostIds || rows < 0 || rows > std::numeric_limits<int32_t>::max() || room != std::min(count, rows) ||
      order.dimensions()[0] != count || places->dimensions()[0] != count ||
      numbers->dimensions()[0] < scratch_numbers(count)) {
    return refused("distinct_rows: keys, order and results do not fit each other");
  }
  Plan plan;
  if (count == 0) return plan;
  RunsWork work = runs_in(numbers->typed_data(), keys.typed_data(), count, rows);
  work.unique = unique->typed_data(), work.room = static_cast<int32_t>(room);
  work.order = order.typed_data(), work.places = places->typed_data();
  add_runs(work, plan);
  return plan;
}

}  // namespace
}  // namespace embax::cuda

#define EMBAX_UPDATE                       \
  .Arg<embax::IntVector>()                 \
      .Arg<embax::IntVector>()             \
      .Arg<embax::FloatVector>()           \
      .Arg<xla::ffi::AnyBuffer>()          \
      .Arg<embax::FloatVector>()           \
      .Arg<embax::FloatVector>()           \
      .Arg<embax::cuda::Seed>()            \
      .RemainingArgs()                     \
      .RemainingRets()                     \
      .Attr<std::string_view>("optimizer") \
      .Attr<bool>("stochastic")            \
      .Attr<bool>("apart")
EMBAX_CUDA_HANDLERS(embax_cuda_update, embax::cuda::plan_update, EMBAX_UPDATE);

#define EMBAX_ROW_GRADIENTS       \
  .Arg<embax::IntVector>()        \
      .Arg<embax::IntVector>()    \
      .Arg<embax::FloatVector>()  \
      .Arg<xla::ffi::AnyBuffer>() \
      .RemainingArgs()            \
      .RemainingRets()            \
      .Attr<int64_t>("rows")
EMBAX_CUDA_HANDLERS(embax_cuda_row_gradients, embax::cuda::plan_row_gradients, EMBAX_ROW_GRADIENTS);

#define EMBAX_DISTINCT_ROWS    \
  .Arg<embax::IntVector>()     \
      .Arg<embax::IntVector>() \
      .Ret<embax::IntVector>() \
      .Ret<embax::IntVector>() \
      .Ret<embax::IntVector>() \
      .Attr<int64_t>("rows")
EMBAX_CUDA_HANDLERS(embax_cuda_distinct_rows, embax::cuda::plan_distinct_rows, EMBAX_DISTINCT_ROWS);
