// XLA FFI binding of the lookups in quantized rows: gather and pool, and rows one by one.

#include "ffi_common.h"
#include "huge_pages.h"

namespace embax {
namespace {

using ByteMatrix = ffi::Buffer<ffi::U8, 2>;

// Bytes of a row: scale, bias and codes (see quantized.h).
int64_t width_of(int64_t dim, int64_t bits) { return 8 + (bits == 8 ? dim : (dim + 1) / 2); }

// Streams need lines of a whole row and, for codes of 4 bits, of each of its halves.
bool streams_quantized(int64_t bytes, int64_t dim, int64_t bits, Dtype dtype) {
  return streams(bytes, bits == 8 || dim % 2 ? dim : dim / 2, dtype);
}

// One result for each feature: they hold the samples one after another. Without offsets every id is a sample of its own.
ffi::Error quantized_pool(ffi::ThreadPool pool, ByteMatrix data, IntVector ids_buffer, IntVector offsets,
                          FloatVector gains, ffi::RemainingRets outs, int64_t bits) {
  if (bits != 8 && bits != 4) return invalid("quantized_pool: bits must be 8 or 4, not " + std::to_string(bits));
  if (!gains_fit(ids_buffer, gains)) return invalid("quantized_pool: gains must be empty or hold one number an id");
  Ids ids = ids_of(ids_buffer, offsets, gains);
  if (offsets.dimensions()[0] == 0) {
    ids.offsets = nullptr;
    ids.samples = ids.capacity;
  }
  const int64_t width = data.dimensions()[1];
  std::vector<QuantizedPool> works;
  std::vector<int64_t> first{0};
  int64_t bytes = 0;
  for (size_t i = 0; i < outs.size(); ++i) {
    auto out = outs.get<ffi::AnyBuffer>(i);
    const std::string name = "quantized_pool: result " + std::to_string(i);
    if (!out.has_value()) return invalid(name + " is no array");
    const Rows rows = rows_of(**out);
    if (rows.rows < 0 || first.back() + rows.rows > ids.samples) return invalid(name + " must be [its samples, dim]");
    if (width != width_of(rows.dim, bits)) {
      return invalid(name + " has " + std::to_string(rows.dim) + " columns, which do not fit rows of " +
                     std::to_string(width) + " bytes");
    }
    Ids part = ids;
    if (ids.offsets != nullptr) {
      part.offsets += first.back();
    } else {
      part.ids += first.back();
      part.capacity = rows.rows;
      if (ids.gains != nullptr) part.gains += first.back();
    }
    part.samples = rows.rows;
    works.push_back({data.typed_data(), data.dimensions()[0], width, rows.dim, static_cast<int>(bits), part,
                     const_cast<void*>(rows.data), rows.dtype, false});
    first.push_back(first.back() + rows.rows);
    bytes += rows.rows * rows.dim * 4;
  }
  if (first.back() != ids.samples) return invalid("quantized_pool: the results must hold all samples");
  for (QuantizedPool& work : works) work.streams = streams_quantized(bytes, work.dim, bits, work.out_dtype);

  advise_table(data.typed_data(), static_cast<size_t>(data.dimensions()[0] * width));
  Team<ffi::ThreadPool> team(pool, std::max(ids.capacity, ids.samples));
  team.run_ranges(ids.samples, 1, [&](int64_t begin, int64_t end) {
    size_t work = static_cast<size_t>(std::upper_bound(first.begin(), first.end(), begin) - first.begin()) - 1;
    for (; begin < end; ++work) {
      const int64_t until = std::min(end, first[work + 1]);
      if (begin < until) kernels().quantized_pool(works[work], begin - first[work], until - first[work]);
      begin = std::max(begin, until);
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace embax

XLA_FFI_DEFINE_HANDLER_SYMBOL(embax_quantized_pool, embax::quantized_pool,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<embax::ByteMatrix>()
                                  .Arg<embax::IntVector>()
                                  .Arg<embax::IntVector>()
                                  .Arg<embax::FloatVector>()
                                  .RemainingRets()
                                  .Attr<int64_t>("bits"));
