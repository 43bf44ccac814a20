// XLA FFI bindings of the CPU kernels: check shapes, fill the work order, divide it among threads.

#include <cstdint>
#include <string>

#include "gather_pool.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Names without commas: the handler macro below takes the binding as one argument, which a comma would split.
using FloatMatrix = ffi::Buffer<ffi::F32, 2>;
using FloatVector = ffi::Buffer<ffi::F32, 1>;
using IntVector = ffi::Buffer<ffi::S32, 1>;

// Below this many ids waking a second thread costs more than it saves.
constexpr int64_t kParallelIds = 16384;

ffi::Error invalid(const char* argument, const std::string& rule) {
  return ffi::Error::InvalidArgument("embax_gather_pool_f32: " + std::string(argument) + " " + rule);
}

ffi::Error gather_pool_f32(ffi::ThreadPool pool, FloatMatrix table, IntVector ids, IntVector offsets,
                           FloatVector gains, ffi::Result<FloatMatrix> out) {
  const int64_t rows = table.dimensions()[0], dim = table.dimensions()[1];
  const int64_t capacity = ids.dimensions()[0], gain_count = gains.dimensions()[0];
  const int64_t samples = offsets.dimensions()[0] - 1;
  if (samples < 0) return invalid("offsets", "must hold samples + 1 numbers, not 0");
  if (gain_count != 0 && gain_count != capacity) {
    return invalid("gains", "must be empty or hold " + std::to_string(capacity) + " numbers, one an id, not " +
                                std::to_string(gain_count));
  }
  if (out->dimensions()[0] != samples || out->dimensions()[1] != dim) {
    return invalid("out", "must be [" + std::to_string(samples) + ", " + std::to_string(dim) + "]");
  }
  const embax::GatherPool work{table.typed_data(),
                               rows,
                               dim,
                               ids.typed_data(),
                               gain_count == 0 ? nullptr : gains.typed_data(),
                               capacity,
                               offsets.typed_data(),
                               samples,
                               out->typed_data()};
  const auto pool_samples = [&work](int64_t first, int64_t last) { embax::gather_pool(work, first, last); };
  if (embax::clamped_offset(work, samples) < kParallelIds) {
    pool_samples(0, samples);
  } else {
    embax::parallel_for(pool, samples, pool_samples);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(embax_gather_pool_f32, gather_pool_f32,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<FloatMatrix>()
                                  .Arg<IntVector>()
                                  .Arg<IntVector>()
                                  .Arg<FloatVector>()
                                  .Ret<FloatMatrix>());

// The FFI version this library was built for. Python compares it with the running jaxlib's before it registers
// anything: a handler newer than jaxlib would keep JAX from starting its CPU backend.
extern "C" int embax_ffi_api_major() { return XLA_FFI_API_MAJOR; }
extern "C" int embax_ffi_api_minor() { return XLA_FFI_API_MINOR; }
