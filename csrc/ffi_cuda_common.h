// What the FFI bindings of the CUDA kernels share: buffers into work orders, with every shape, dtype and address
// checked.

#ifndef EMBAX_CSRC_FFI_CUDA_COMMON_H_
#define EMBAX_CSRC_FFI_CUDA_COMMON_H_

#include <cstdint>
#include <limits>
#include <string>

#include "cuda_launch.h"
#include "ffi_common.h"

namespace embax::cuda {

// Vectors are loaded whole; XLA's buffers begin at multiples of 16 and more.
constexpr uintptr_t kAlignment = 16;

// Positions are counted in 32 bits, with room for a piece beyond the last.
constexpr int64_t kMostIds = std::numeric_limits<int32_t>::max() - 2 * kPiece * kPiece;

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kAlignment == 0; }

// Neighbouring results or gradients of features, as blocks; at most kMaxBlocks of them.
class BlocksMaker {
 public:
  // Returns what is wrong, or an empty text.
  std::string add(const Rows& rows, int64_t dim) {
    if (rows.rows < 0 || rows.dim != dim || (seen_ && rows.dtype != dtype_))
      return "must be [samples, dim] of one dtype";
    if (!aligned(rows.data)) return "must begin at a multiple of 16 bytes";
    dtype_ = rows.dtype, seen_ = true;
    if (rows.rows == 0) return {};  // a block without samples would be nobody's
    if (made_.count == kMaxBlocks) return "are in too many blocks: " + std::to_string(kMaxBlocks) + " at most";
    made_.each = made_.count == 0 || made_.each == rows.rows ? static_cast<int32_t>(rows.rows) : 0;
    made_.at[made_.count] = const_cast<void*>(rows.data);
    samples_ += rows.rows;
    if (samples_ > kMostIds) return "have too many samples: " + std::to_string(kMostIds) + " at most";
    made_.first[++made_.count] = static_cast<int32_t>(samples_);
    return {};
  }

  const Blocks& blocks() const { return made_; }
  int64_t samples() const { return samples_; }
  Dtype dtype() const { return dtype_; }

 private:
  Blocks made_{};
  int64_t samples_ = 0;
  Dtype dtype_ = Dtype::kFloat32;
  bool seen_ = false;
};

inline ffi::Error result_of(const std::string& wrong) {
  return wrong.empty() ? ffi::Error::Success() : ffi::Error::Internal("embax: " + wrong);
}

// The stream of a call; platforms without streams, which a test makes do with, have another.
#if defined(EMBAX_EMULATED)
struct NoStream {};
using NativeStream = NoStream;
using StreamOf = NoStream;
inline Stream stream_of(NoStream) { return nullptr; }
#else
using NativeStream = Stream;
using StreamOf = ffi::PlatformStream<Stream>;
inline Stream stream_of(Stream stream) { return stream; }
#endif

// The two handlers of a call that `plan` plans: one has its kernels loaded, the other launches them. What they launch
// may be captured into a graph: nothing in it waits, allocates, or depends on when it runs.
template <auto plan>
struct Call;
template <typename... Operands, Plan (*plan)(Operands...)>
struct Call<plan> {
  static ffi::Error initialize(Operands... operands) { return result_of(prepare(plan(operands...))); }
  static ffi::Error execute(NativeStream stream, Operands... operands) {
    return result_of(launch(plan(operands...), stream_of(stream)));
  }
};

}  // namespace embax::cuda

#if defined(EMBAX_EMULATED)
template <>
struct xla::ffi::CtxDecoding<embax::cuda::NoStream> {
  using Type = embax::cuda::NoStream;
  static std::optional<Type> Decode(const XLA_FFI_Api*, XLA_FFI_ExecutionContext*, DiagnosticEngine&) { return Type{}; }
};
#endif

// Defines NAME and NAME_initialize, by what PLAN plans of the operands that BINDING binds.
#define EMBAX_CUDA_HANDLERS(NAME, PLAN, BINDING)                                                       \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME##_initialize, embax::cuda::Call<PLAN>::initialize,                \
                                xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::kInitialize>() BINDING); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(NAME, embax::cuda::Call<PLAN>::execute,                                \
                                xla::ffi::Ffi::Bind().Ctx<embax::cuda::StreamOf>() BINDING,            \
                                {xla::ffi::Traits::kCmdBufferCompatible})

#endif  // EMBAX_CSRC_FFI_CUDA_COMMON_H_
