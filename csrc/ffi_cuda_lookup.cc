// XLA FFI bindings of the CUDA lookups: gather and pool, rows one by one, samples of places, derivatives of gains.

#include <cmath>

#include "ffi_cuda_common.h"

namespace embax::cuda {
namespace {

// What is larger than this does not stay in a card's second cache (40 to 50 MB) until it is read again.
constexpr int64_t kCacheBytes = int64_t{32} << 20;

bool fits(const Rows& table) {
  return table.rows >= 0 && table.rows <= std::numeric_limits<int32_t>::max() && aligned(table.data);
}

// Levels are low, high and width, or none.
template <typename Work>
bool set_levels(LevelsAttribute levels, Work& work) {
  if (levels.size() == 0) return true;
  if (levels.size() != 3) return false;
  work.low = levels[0], work.high = levels[1], work.width = levels[2];
  return true;
}

// The part of a lookup whose samples are in the blocks [first, last).
struct Part {
  int64_t first_sample;
  BlocksMaker blocks;
};

// Results in parts that one launch has room for.
std::string parts_of(ffi::RemainingRets& rets, int64_t dim, std::vector<Part>& parts) {
  parts.push_back({0, {}});
  for (size_t i = 0; i < rets.size(); ++i) {
    auto out = rets.get<ffi::AnyBuffer>(i);
    if (!out.has_value()) return "gather_pool: results must be arrays";
    if (parts.back().blocks.blocks().count == kMaxBlocks) {
      parts.push_back({parts.back().first_sample + parts.back().blocks.samples(), {}});
    }
    if (const auto wrong = parts.back().blocks.add(rows_of(**out), dim); !wrong.empty())
      return "gather_pool: results " + wrong;
  }
  return {};
}

Plan plan_gather_pool(ffi::AnyBuffer table_buffer, IntVector ids, IntVector offsets, FloatVector gains,
                      ffi::RemainingRets rets, LevelsAttribute levels, bool one) {
  const Rows table = rows_of(table_buffer);
  GatherWork work{};
  if (!fits(table) || !set_levels(levels, work))
    return refused("gather_pool: the table must be [rows, dim], levels 3 numbers");
  std::vector<Part> parts;
  if (const auto wrong = parts_of(rets, table.dim, parts); !wrong.empty()) return refused(wrong);
  const int64_t samples = parts.back().first_sample + parts.back().blocks.samples();
  const int64_t capacity = ids.dimensions()[0];
  if (offsets.dimensions()[0] != samples + 1 || !gains_fit(ids, gains) || capacity > kMostIds || samples > kMostIds) {
    return refused("gather_pool: ids, offsets, gains and results do not fit each other");
  }
  const bool gained = gains.dimensions()[0] > 0, levelled = levels.size() > 0;
  one = one && !gained && parts.size() == 1;
  Plan plan;
  if (samples == 0 || table.dim == 0) return plan;
  work.table = table.data, work.rows = table.rows;
  work.ids = ids.typed_data(), work.gains = gained ? gains.typed_data() : nullptr;
  work.capacity = static_cast<int32_t>(capacity);
  for (const Part& part : parts) {
    const Dtype dtype = part.blocks.dtype();
    work.offsets = offsets.typed_data() + part.first_sample;
    work.samples = static_cast<int32_t>(part.blocks.samples());
    work.out = part.blocks.blocks();
    work.streams = samples * table.dim * kDtypeSize[static_cast<int>(dtype)] > kCacheBytes;
    const int64_t in_block = groups_of(table.dim) * (one ? together_of(table.dim) : 1);
    plan.add(gather_programs(table.dtype, dtype, table.dim, one, gained, levelled)[0],
             blocks_for(work.samples, in_block), work);
  }
  return plan;
}

Plan plan_gather_rows(ffi::AnyBuffer table_buffer, IntVector ids, ffi::Result<ffi::AnyBuffer> out_buffer) {
  const Rows table = rows_of(table_buffer), out = rows_of(*out_buffer);
  const int64_t count = ids.dimensions()[0];
  BlocksMaker blocks;
  if (!fits(table) || out.rows != count || out.dtype != table.dtype || count > kMostIds ||
      !blocks.add(out, table.dim).empty()) {
    return refused("gather_rows: the result must be [ids, dim] of the table's dtype");
  }
  Plan plan;
  if (count == 0 || table.dim == 0) return plan;
  GatherWork work{};
  work.table = table.data, work.rows = table.rows;
  work.ids = ids.typed_data();
  work.capacity = work.samples = static_cast<int32_t>(count);
  work.fill = 0x7fc00000;  // NaN
  work.out = blocks.blocks();
  work.streams = count * table.dim * kDtypeSize[static_cast<int>(table.dtype)] > kCacheBytes;
  const int64_t in_block = groups_of(table.dim) * together_of(table.dim);
  plan.add(gather_programs(table.dtype, table.dtype, table.dim, true, false, false)[0], blocks_for(count, in_block),
           work);
  return plan;
}

Plan plan_row_products(ffi::AnyBuffer table_buffer, IntVector ids, IntVector offsets, ffi::AnyBuffer gradient_buffer,
                       ffi::Result<FloatVector> out, LevelsAttribute levels) {
  const Rows table = rows_of(table_buffer), gradients = rows_of(gradient_buffer);
  const int64_t count = ids.dimensions()[0], samples = offsets.dimensions()[0] - 1;
  ProductWork work{};
  if (!fits(table) || gradients.rows != samples || gradients.dim != table.dim || !aligned(gradients.data) ||
      out->dimensions()[0] != count || count > kMostIds || samples > kMostIds || !set_levels(levels, work)) {
    return refused("row_products: ids, offsets, gradients and the result do not fit each other");
  }
  Plan plan;
  if (count == 0 || samples <= 0 || table.dim == 0)
    return refused("row_products: there must be ids, samples and columns");
  work.table = table.data, work.rows = table.rows;
  work.ids = ids.typed_data(), work.offsets = offsets.typed_data();
  work.gradients = gradients.data;
  work.count = static_cast<int32_t>(count), work.samples = static_cast<int32_t>(samples);
  work.out = out->typed_data();
  plan.add(product_programs(table.dtype, gradients.dtype, table.dim, levels.size() > 0)[0],
           blocks_for(count, groups_of(table.dim)), work);
  return plan;
}

Plan plan_samples_of(IntVector offsets, ffi::Result<IntVector> out) {
  const int64_t samples = offsets.dimensions()[0] - 1, count = out->dimensions()[0];
  if (samples < 1 || samples > kMostIds || count > kMostIds)
    return refused("samples_of: there must be samples, 2^31 at most");
  Plan plan;
  const SamplesWork work{offsets.typed_data(), static_cast<int32_t>(samples), static_cast<int32_t>(count),
                         out->typed_data()};
  plan.add(samples_programs()[0], blocks_for(count, kThreads), work);
  return plan;
}

}  // namespace
}  // namespace embax::cuda

#define EMBAX_GATHER_POOL                     \
  .Arg<xla::ffi::AnyBuffer>()                 \
      .Arg<embax::IntVector>()                \
      .Arg<embax::IntVector>()                \
      .Arg<embax::FloatVector>()              \
      .RemainingRets()                        \
      .Attr<embax::LevelsAttribute>("levels") \
      .Attr<bool>("one")
EMBAX_CUDA_HANDLERS(embax_cuda_gather_pool, embax::cuda::plan_gather_pool, EMBAX_GATHER_POOL);

#define EMBAX_GATHER_ROWS .Arg<xla::ffi::AnyBuffer>().Arg<embax::IntVector>().Ret<xla::ffi::AnyBuffer>()
EMBAX_CUDA_HANDLERS(embax_cuda_gather_rows, embax::cuda::plan_gather_rows, EMBAX_GATHER_ROWS);

#define EMBAX_ROW_PRODUCTS        \
  .Arg<xla::ffi::AnyBuffer>()     \
      .Arg<embax::IntVector>()    \
      .Arg<embax::IntVector>()    \
      .Arg<xla::ffi::AnyBuffer>() \
      .Ret<embax::FloatVector>()  \
      .Attr<embax::LevelsAttribute>("levels")
EMBAX_CUDA_HANDLERS(embax_cuda_row_products, embax::cuda::plan_row_products, EMBAX_ROW_PRODUCTS);

#define EMBAX_SAMPLES_OF .Arg<embax::IntVector>().Ret<embax::IntVector>()
EMBAX_CUDA_HANDLERS(embax_cuda_samples_of, embax::cuda::plan_samples_of, EMBAX_SAMPLES_OF);

// The FFI version this library was built for; see ffi_lookup.cc.
extern "C" int embax_cuda_ffi_api_major() { return XLA_FFI_API_MAJOR; }
extern "C" int embax_cuda_ffi_api_minor() { return XLA_FFI_API_MINOR; }
