// What the XLA FFI bindings share: buffers into work orders, with every shape and dtype checked.
//
// A binding fails for what is known when a program is compiled (shapes, dtypes, names), never for data: an error in a
// donated call would take the tables with it.

#ifndef EMBAX_CSRC_FFI_COMMON_H_
#define EMBAX_CSRC_FFI_COMMON_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace embax {

namespace ffi = xla::ffi;

using FloatVector = ffi::Buffer<ffi::F32, 1>;
using IntVector = ffi::Buffer<ffi::S32, 1>;
using LevelsAttribute = ffi::Span<const float>;

inline ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("embax: " + what); }

inline Dtype dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return Dtype::kFloat32;
    case ffi::BF16: return Dtype::kBFloat16;
    case ffi::F16: return Dtype::kFloat16;
    default: return Dtype::kInvalid;
  }
}

// The array of a [rows, dim] buffer of one of the dtypes; rows is -1 if it is something else.
inline Rows rows_of(const ffi::AnyBuffer& buffer) {
  const auto shape = buffer.dimensions();
  const Dtype dtype = dtype_of(buffer.element_type());
  if (shape.size() != 2 || dtype == Dtype::kInvalid) return {nullptr, dtype, -1, 0};
  return {buffer.untyped_data(), dtype, shape[0], shape[1]};
}

// The ids of a batch.
inline Ids ids_of(const IntVector& ids, const IntVector& offsets, const FloatVector& gains) {
  return {ids.typed_data(), offsets.typed_data(), gains.dimensions()[0] == 0 ? nullptr : gains.typed_data(),
          ids.dimensions()[0], offsets.dimensions()[0] - 1, nullptr};
}

inline bool gains_fit(const IntVector& ids, const FloatVector& gains) {
  const int64_t count = gains.dimensions()[0];
  return count == 0 || count == ids.dimensions()[0];
}

// Buffers this large do not stay in any cache until they are read again. (Those of 54 MB did, in part: written around the
// caches they were slower.)
constexpr int64_t kStreamBytes = int64_t{128} << 20;

// Whether a result of that many bytes should be written around the caches; streams need rows of whole lines.
inline bool streams(int64_t bytes, int64_t dim, Dtype dtype) {
  return bytes >= kStreamBytes && dim % 16 == 0 && dtype == Dtype::kFloat32;
}

}  // namespace embax

#endif  // EMBAX_CSRC_FFI_COMMON_H_
