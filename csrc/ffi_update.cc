// XLA FFI bindings of the updates: one optimizer step in place, row gradients, and one write of given rows.

#include <cstring>
#include <limits>
#include <optional>
#include <string_view>

#include "ffi_common.h"
#include "huge_pages.h"
#include "occurrences.h"
#include "optimizers.h"

namespace embax {
namespace {

using HyperVector = ffi::Buffer<ffi::F32, 1>;
using Seed = ffi::Buffer<ffi::U32, 0>;

struct Known {
  const char* name;
  int element_slots;
  bool row_slot;
};

#define EMBAX_KNOWN(name, ...) \
  {name, EMBAX_ISA::__VA_ARGS__::kElementSlots, EMBAX_ISA::__VA_ARGS__::kRowSlot},
constexpr Known kKnown[] = {EMBAX_OPTIMIZERS(EMBAX_KNOWN)};
static_assert(sizeof(kKnown) / sizeof(kKnown[0]) == kOptimizers, "kOptimizers must count EMBAX_OPTIMIZERS");

// The gradients of activations, a block for each feature, as one sequence of samples.
struct GradientBlocks {
  std::vector<const void*> blocks;
  std::vector<int64_t> first{0};
  std::vector<int32_t> guess;
  Gradients view{};

  // Returns what is wrong, or nothing.
  std::optional<std::string> read(const ffi::RemainingArgs& args, size_t begin, int64_t dim) {
    for (size_t i = begin; i < args.size(); ++i) {
      const auto buffer = args.get<ffi::AnyBuffer>(i);
      const Rows rows = buffer.has_value() ? rows_of(*buffer) : Rows{nullptr, Dtype::kInvalid, -1, 0};
      if (rows.rows < 0 || rows.dim != dim || (i > begin && rows.dtype != view.dtype)) {
        return "gradients must be [samples, dim] of one floating point dtype";
      }
      view.dtype = rows.dtype;
      if (rows.rows == 0) continue;  // a block without samples would be nobody's
      blocks.push_back(rows.data);
      first.push_back(first.back() + rows.rows);
    }
    view.blocks = blocks.data();
    view.first = first.data();
    view.count = static_cast<int64_t>(blocks.size());
    view.far = samples() * dim * kDtypeSize[static_cast<int>(view.dtype)] > kNearBytes;
    if (blocks.size() > 1) make_guesses();
    return std::nullopt;
  }

  int64_t samples() const { return first.back(); }

 private:
  static constexpr int64_t kNearBytes = int64_t{512} << 10;

  void make_guesses() {
    while ((samples() >> view.shift) > 4 * view.count) ++view.shift;
    for (int64_t sample = 0, block = 0; sample < samples(); sample += int64_t{1} << view.shift) {
      while (sample >= first[static_cast<size_t>(block) + 1]) ++block;
      guess.push_back(static_cast<int32_t>(block));
    }
    view.guess = guess.data();
  }
};

// The ids of a batch, in one of three forms, told by what is empty: CSR (offsets), the sample of each id (samples), or
// neither, where every id is a sample of its own. Absent where they do not fit each other.
std::optional<Ids> ids_of(const IntVector& ids, const IntVector& offsets, const IntVector& samples,
                          const FloatVector& gains, int64_t sample_count) {
  const int64_t capacity = ids.dimensions()[0], bounds = offsets.dimensions()[0], given = samples.dimensions()[0];
  const bool fits = bounds > 0 ? bounds - 1 == sample_count : given > 0 ? given == capacity : capacity == sample_count;
  if (!fits || !gains_fit(ids, gains) || capacity > std::numeric_limits<int32_t>::max()) return std::nullopt;
  return Ids{ids.typed_data(), bounds > 0 ? offsets.typed_data() : nullptr,
             gains.dimensions()[0] == 0 ? nullptr : gains.typed_data(), capacity, sample_count,
             bounds == 0 && given > 0 ? samples.typed_data() : nullptr};
}

// Sorts, sums what is hot, and hands ranges of entries to `use(step, first, last, sum, team)`.
template <typename Use>
void for_runs(ffi::ThreadPool& pool, const Ids& ids, int64_t rows, Step& step, const Use& use) {
  Team<ffi::ThreadPool> team(pool, ids.capacity);
  const Occurrences occurrences(team, ids, rows, ids.gains != nullptr);
  step.entries = occurrences.entries();
  step.count = occurrences.count();
  step.sample_of = occurrences.sample_of();
  step.gains = ids.gains;
  const std::vector<HotRun> hot = occurrences.hot_runs();
  step.hot = hot.data();
  step.hot_count = static_cast<int64_t>(hot.size());
  std::unique_ptr<float[]> hot_sums;
  if (!hot.empty()) {
    const int64_t blocks = hot.back().first_block + (hot.back().end - hot.back().begin + kBlock - 1) / kBlock;
    hot_sums.reset(new float[static_cast<size_t>(blocks * step.dim)]);
    step.hot_sums = hot_sums.get();
    team.run(blocks, [&](int64_t block) {
      size_t run = hot.size() - 1;
      while (hot[run].first_block > block) --run;
      kernels().sum_hot_block(step, static_cast<int64_t>(run), block - hot[run].first_block);
    });
  }
  use(team);
}

// A sum of one row for whoever asks; rows of usual width take no allocation.
class Sum {
 public:
  explicit Sum(int64_t dim) {
    if (dim > kInline) large_.reset(new float[static_cast<size_t>(dim)]);
  }
  float* data() { return large_ ? large_.get() : small_; }

 private:
  static constexpr int64_t kInline = 1024;
  float small_[kInline];
  std::unique_ptr<float[]> large_;
};

constexpr int64_t kSmallestRange = 128;

// The marks of touched rows, behind table and slots.
std::optional<std::string> place_touched(const ffi::RemainingArgs& args, ffi::RemainingRets& rets, size_t at,
                                         int64_t rows, Step& step) {
  const auto from = args.get<ffi::AnyBuffer>(at);
  auto to = rets.get<ffi::AnyBuffer>(at);
  if (!from.has_value() || !to.has_value()) return "the marks of touched rows must be an array";
  const auto fits = [&](const ffi::AnyBuffer& buffer) {
    const auto shape = buffer.dimensions();
    return buffer.element_type() == ffi::U8 && shape.size() == 1 && shape[0] == rows;
  };
  if (!fits(*from) || !fits(**to)) return "the marks of touched rows must be uint8 [rows]";
  step.touched = static_cast<uint8_t*>((*to)->untyped_data());
  const void* given = from->untyped_data();
  if (step.touched != given) std::memcpy(step.touched, given, static_cast<size_t>(rows));
  advise_table(step.touched, static_cast<size_t>(rows));
  return std::nullopt;
}

// Where table and slots are; the results lie where the arguments did, or else are made so.
std::optional<std::string> place(const ffi::RemainingArgs& args, ffi::RemainingRets& rets, const Known& known,
                                 Step& step, int64_t& rows) {
  const int slots = known.element_slots + known.row_slot;
  const size_t state = static_cast<size_t>(1 + slots);
  if (rets.size() < state || rets.size() > state + 1 || args.size() < rets.size()) {
    return std::string(known.name) + " takes a table and " + std::to_string(slots) + " slots";
  }
  for (int i = 0; i <= slots; ++i) {
    const auto from = args.get<ffi::AnyBuffer>(static_cast<size_t>(i));
    auto to = rets.get<ffi::AnyBuffer>(static_cast<size_t>(i));
    if (!from.has_value() || !to.has_value()) return "table and slots must be arrays";
    const Rows given = rows_of(*from), result = rows_of(**to);
    if (i == 0) rows = given.rows, step.dim = given.dim, step.dtype = given.dtype;
    const int64_t dim = i > known.element_slots ? 1 : step.dim;
    if (given.rows < 0 || given.rows != rows || given.dim != dim || (i > 0 && given.dtype != Dtype::kFloat32) ||
        result.rows != rows || result.dim != dim || result.dtype != given.dtype) {
      return "table must be [rows, dim], slots float32 [rows, dim] or [rows, 1]";
    }
    void* data = const_cast<void*>(result.data);
    const size_t bytes = static_cast<size_t>(rows * dim * kDtypeSize[static_cast<int>(given.dtype)]);
    if (data != given.data) std::memcpy(data, given.data, bytes);  // never so under input_output_aliases; right all the same
    advise_table(data, bytes);
    if (i == 0) {
      step.table = data;
    } else {
      step.slots[i - 1] = static_cast<float*>(data);
    }
  }
  if (rets.size() > state) return place_touched(args, rets, state, rows, step);
  return std::nullopt;
}

// Operands: the batch, an activation that is not read (the update comes after the lookup for its sake), scalars, then
// table and slots and the marks of touched rows if there are any, which are the results too, then the gradients of each
// feature.
ffi::Error update(ffi::ThreadPool pool, IntVector ids_buffer, IntVector offsets, IntVector samples, FloatVector gains,
                  ffi::AnyBuffer, HyperVector hyper, HyperVector modifiers, Seed seed, ffi::RemainingArgs args,
                  ffi::RemainingRets rets, std::string_view optimizer, bool stochastic) {
  int which = 0;
  while (which < kOptimizers && optimizer != kKnown[which].name) ++which;
  if (which == kOptimizers) return invalid("update: there is no kernel named " + std::string(optimizer));
  Step step{};
  int64_t rows = 0;
  if (const auto wrong = place(args, rets, kKnown[which], step, rows)) return invalid("update: " + *wrong);
  GradientBlocks blocks;
  if (const auto wrong = blocks.read(args, rets.size(), step.dim)) return invalid("update: " + *wrong);
  const std::optional<Ids> given = ids_of(ids_buffer, offsets, samples, gains, blocks.samples());
  if (!given || modifiers.dimensions()[0] != 3 || hyper.dimensions()[0] != kHyper) {
    return invalid("update: offsets, samples, gains, hyperparameters or gradients do not fit the batch");
  }
  const Ids& ids = *given;
  if (ids.capacity == 0 || blocks.samples() == 0 || rows == 0 || step.dim == 0) return ffi::Error::Success();
  step.gradients = blocks.view;
  step.hyper = hyper.typed_data();
  step.clip_norm = modifiers.typed_data()[0];
  step.l2 = modifiers.typed_data()[1];
  step.decay = modifiers.typed_data()[2];
  step.stochastic = stochastic;
  step.seed = seed.typed_data()[0];
  const StepFunction take_steps = kernels().step[which][static_cast<int>(step.dtype)];
  for_runs(pool, ids, rows, step, [&](auto& team) {
    team.run_ranges(step.count, kSmallestRange, [&](int64_t first, int64_t last) {
      Sum sum(step.dim);
      take_steps(step, first, last, sum.data(), 0);
    });
  });
  return ffi::Error::Success();
}

ffi::Error row_gradients(ffi::ThreadPool pool, IntVector ids_buffer, IntVector offsets, IntVector samples,
                         FloatVector gains, ffi::AnyBuffer, ffi::RemainingArgs args, ffi::Result<IntVector> out_rows,
                         ffi::Result<ffi::AnyBuffer> out_values, int64_t rows) {
  const Rows out = rows_of(*out_values);
  const int64_t room = out_rows->dimensions()[0];
  GradientBlocks blocks;
  if (const auto wrong = blocks.read(args, 0, out.dim)) return invalid("row_gradients: " + *wrong);
  const std::optional<Ids> given = ids_of(ids_buffer, offsets, samples, gains, blocks.samples());
  if (!given || rows > std::numeric_limits<int32_t>::max() || out.rows != room || room < std::min(given->capacity, rows)) {
    return invalid("row_gradients: the batch must fit the gradients, the results hold min(ids, rows) rows");
  }
  const Ids& ids = *given;
  Step step{};
  step.dim = out.dim;
  step.gradients = blocks.view;
  step.out_rows = out_rows->typed_data();
  step.out_values = const_cast<void*>(out.data);
  step.out_dtype = out.dtype;
  int64_t found = 0;
  if (ids.capacity > 0 && blocks.samples() > 0) {
    for_runs(pool, ids, rows, step, [&](auto& team) {
      const std::vector<int64_t> ranks = ranks_of_ranges(team, step.entries, step.count);
      found = ranks.back();
      team.run(static_cast<int64_t>(ranks.size()) - 1, [&](int64_t range) {
        Sum sum(step.dim);
        kernels().sum_rows(step, range * kRankedRange, std::min(step.count, (range + 1) * kRankedRange), sum.data(),
                           ranks[static_cast<size_t>(range)]);
      });
    });
  }
  std::fill(step.out_rows + found, step.out_rows + room, static_cast<int32_t>(rows));
  const int64_t row_bytes = out.dim * kDtypeSize[static_cast<int>(out.dtype)];
  std::memset(static_cast<char*>(step.out_values) + found * row_bytes, 0, static_cast<size_t>((room - found) * row_bytes));
  return ffi::Error::Success();
}

// table[rows[i]] = values[i] for distinct rows; those outside the table are skipped.
ffi::Error write_rows(ffi::ThreadPool pool, IntVector rows_buffer, ffi::AnyBuffer values_buffer, ffi::AnyBuffer from,
                      ffi::Result<ffi::AnyBuffer> to) {
  const Rows given = rows_of(from), table = rows_of(*to), values = rows_of(values_buffer);
  const int64_t count = rows_buffer.dimensions()[0];
  if (given.rows < 0 || table.rows != given.rows || table.dim != given.dim || table.dtype != given.dtype ||
      values.rows != count || values.dim != table.dim || values.dtype != table.dtype) {
    return invalid("write_rows: the table must be [rows, dim] and the values [n, dim], of one dtype");
  }
  const size_t bytes = static_cast<size_t>(table.dim * kDtypeSize[static_cast<int>(table.dtype)]);
  char* out = static_cast<char*>(const_cast<void*>(table.data));
  if (table.data != given.data) std::memcpy(out, given.data, bytes * static_cast<size_t>(table.rows));
  const int32_t* rows = rows_buffer.typed_data();
  const char* in = static_cast<const char*>(values.data);
  Team<ffi::ThreadPool> team(pool, count);
  team.run_ranges(count, 256, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      if (static_cast<uint64_t>(int64_t{rows[i]}) >= static_cast<uint64_t>(table.rows)) continue;
      std::memcpy(out + static_cast<size_t>(rows[i]) * bytes, in + static_cast<size_t>(i) * bytes, bytes);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace embax

XLA_FFI_DEFINE_HANDLER_SYMBOL(embax_update, embax::update,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<embax::IntVector>()
                                  .Arg<embax::IntVector>()
                                  .Arg<embax::IntVector>()
                                  .Arg<embax::FloatVector>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<embax::HyperVector>()
                                  .Arg<embax::HyperVector>()
                                  .Arg<embax::Seed>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("optimizer")
                                  .Attr<bool>("stochastic"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(embax_row_gradients, embax::row_gradients,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<embax::IntVector>()
                                  .Arg<embax::IntVector>()
                                  .Arg<embax::IntVector>()
                                  .Arg<embax::FloatVector>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<embax::IntVector>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("rows"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(embax_write_rows, embax::write_rows,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<embax::IntVector>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());

// The names of the optimizers there are kernels for, each followed by a comma.
extern "C" const char* embax_optimizers() {
#define EMBAX_NAMED(name, ...) name ","
  return EMBAX_OPTIMIZERS(EMBAX_NAMED);
}
