// XLA FFI bindings of the lookups: gather and pool, rows one by one, the derivative of gains, the distinct rows.

#include <limits>

#include "distinct.h"
#include "ffi_common.h"
#include "huge_pages.h"
#include "occurrences.h"

namespace embax {
namespace {

// One result for each feature: they hold the samples one after another.
ffi::Error gather_pool(ffi::ThreadPool pool, ffi::AnyBuffer table_buffer, IntVector ids_buffer, IntVector offsets,
                       FloatVector gains, ffi::RemainingRets outs, LevelsAttribute levels) {
  const Rows table = rows_of(table_buffer);
  if (table.rows < 0) return invalid("gather_pool: the table must be [rows, dim] of float32, bfloat16 or float16");
  if (offsets.dimensions()[0] == 0) return invalid("gather_pool: offsets must hold samples + 1 numbers, not 0");
  if (!gains_fit(ids_buffer, gains)) return invalid("gather_pool: gains must be empty or hold one number an id");
  const Ids ids = ids_of(ids_buffer, offsets, gains);

  std::vector<GatherPool> works;
  std::vector<int64_t> first{0};
  for (size_t i = 0; i < outs.size(); ++i) {
    auto out = outs.get<ffi::AnyBuffer>(i);
    if (!out.has_value()) return invalid("gather_pool: result " + std::to_string(i) + " is no array");
    const Rows rows = rows_of(**out);
    if (rows.rows < 0 || rows.dim != table.dim || first.back() + rows.rows > ids.samples) {
      return invalid("gather_pool: result " + std::to_string(i) + " must be [its samples, dim]");
    }
    Ids part = ids;
    part.offsets += first.back();
    part.samples = rows.rows;
    works.push_back({table, part, const_cast<void*>(rows.data), rows.dtype, false,
                     levels.size() == 3 ? levels.begin() : nullptr});
    first.push_back(first.back() + rows.rows);
  }
  if (first.back() != ids.samples) return invalid("gather_pool: the results must hold all samples");
  const int64_t total = ids.samples * table.dim * 4;
  for (GatherPool& work : works) work.streams = streams(total, table.dim, work.out_dtype);

  advise_table(table.data, static_cast<size_t>(table.rows * table.dim * kDtypeSize[static_cast<int>(table.dtype)]));
  Team<ffi::ThreadPool> team(pool, std::max(ids.capacity, ids.samples));
  team.run_ranges(ids.samples, 1, [&](int64_t begin, int64_t end) {
    size_t work = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (; begin < end; ++work) {
      const int64_t until = std::min(end, first[work + 1]);
      if (begin < until) kernels().gather_pool(works[work], begin - first[work], until - first[work]);
      begin = std::max(begin, until);
    }
  });
  return ffi::Error::Success();
}

ffi::Error gather_rows(ffi::ThreadPool pool, ffi::AnyBuffer table_buffer, IntVector ids,
                       ffi::Result<ffi::AnyBuffer> out_buffer) {
  const Rows table = rows_of(table_buffer), out = rows_of(*out_buffer);
  const int64_t count = ids.dimensions()[0];
  if (table.rows < 0 || out.dtype != table.dtype || out.rows != count || out.dim != table.dim) {
    return invalid("gather_rows: the table must be [rows, dim] and the result [ids, dim], of one dtype");
  }
  const GatherRows work{table, ids.typed_data(), count, const_cast<void*>(out.data),
                        streams(count * table.dim * 4, table.dim, table.dtype)};
  Team<ffi::ThreadPool> team(pool, count);
  team.run_ranges(count, 256, [&](int64_t begin, int64_t end) { kernels().gather_rows(work, begin, end); });
  return ffi::Error::Success();
}

ffi::Error row_products(ffi::ThreadPool pool, ffi::AnyBuffer table_buffer, IntVector ids_buffer, IntVector offsets,
                        ffi::AnyBuffer gradient_buffer, ffi::Result<FloatVector> out, LevelsAttribute levels) {
  const Rows table = rows_of(table_buffer), gradients = rows_of(gradient_buffer);
  const int64_t capacity = ids_buffer.dimensions()[0], samples = offsets.dimensions()[0] - 1;
  if (table.rows < 0 || gradients.rows != samples || gradients.dim != table.dim || out->dimensions()[0] != capacity) {
    return invalid("row_products: gradients must be [samples, dim] and the result [ids]");
  }
  const Ids ids{ids_buffer.typed_data(), offsets.typed_data(), nullptr, capacity, samples, nullptr};
  std::unique_ptr<int32_t[]> sample_of(new int32_t[capacity]);
  std::fill(sample_of.get(), sample_of.get() + capacity, -1);
  visit_present(ids, table.rows,
                [&](int64_t place, int64_t sample, int64_t) { sample_of[place] = static_cast<int32_t>(sample); });
  const RowProducts work{table,           ids,  sample_of.get(), gradients.data,
                         gradients.dtype, levels.size() == 3 ? levels.begin() : nullptr, out->typed_data()};
  Team<ffi::ThreadPool> team(pool, capacity);
  team.run_ranges(capacity, 256, [&](int64_t begin, int64_t end) { kernels().row_products(work, begin, end); });
  return ffi::Error::Success();
}

ffi::Error distinct_rows(ffi::ThreadPool pool, IntVector ids, ffi::Result<IntVector> unique,
                         ffi::Result<IntVector> places, int64_t rows) {
  const int64_t count = ids.dimensions()[0];
  if (rows < 0 || std::max(rows, count) > std::numeric_limits<int32_t>::max() || places->dimensions()[0] != count ||
      unique->dimensions()[0] != std::min(count, rows)) {
    return invalid("distinct_rows: the results must hold min(ids, rows) rows and one place an id");
  }
  Team<ffi::ThreadPool> team(pool, count);
  find_distinct(team, {ids.typed_data(), count, rows, unique->typed_data(), places->typed_data()});
  return ffi::Error::Success();
}

}  // namespace
}  // namespace embax

XLA_FFI_DEFINE_HANDLER_SYMBOL(embax_gather_pool, embax::gather_pool,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<embax::IntVector>()
                                  .Arg<embax::IntVector>()
                                  .Arg<embax::FloatVector>()
                                  .RemainingRets()
                                  .Attr<embax::LevelsAttribute>("levels"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(embax_gather_rows, embax::gather_rows,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<embax::IntVector>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(embax_row_products, embax::row_products,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<embax::IntVector>()
                                  .Arg<embax::IntVector>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<embax::FloatVector>()
                                  .Attr<embax::LevelsAttribute>("levels"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(embax_distinct_rows, embax::distinct_rows,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<embax::IntVector>()
                                  .Ret<embax::IntVector>()
                                  .Ret<embax::IntVector>()
                                  .Attr<int64_t>("rows"));

// The FFI version this library was built for. Python compares it with the running jaxlib's before it registers
// anything: a handler newer than jaxlib would keep JAX from starting its CPU backend.
extern "C" int embax_ffi_api_major() { return XLA_FFI_API_MAJOR; }
extern "C" int embax_ffi_api_minor() { return XLA_FFI_API_MINOR; }
