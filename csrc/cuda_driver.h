// The few functions of the CUDA driver that embax calls, by names of its own: nothing of CUDA is needed to build or
// to load this. cuda_driver.cc opens the driver that is there; a test gives functions that run kernels on the host.

#ifndef EMBAX_CSRC_CUDA_DRIVER_H_
#define EMBAX_CSRC_CUDA_DRIVER_H_

#include <cstddef>

namespace embax::cuda {

struct ContextTag;
struct ModuleTag;
struct FunctionTag;
struct StreamTag;
using Context = ContextTag*;
using Module = ModuleTag*;
using Function = FunctionTag*;
using Stream = StreamTag*;
using Device = int;
using Status = int;  // CUresult; 0 is success

// Of CUdevice_attribute.
constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;

struct Driver {
  const char* why_not;  // why it cannot be used, or nullptr
  Status (*init)(unsigned flags);
  Status (*device_count)(int*);
  Status (*device)(Device*, int ordinal);
  Status (*attribute)(int*, int which, Device);
  Status (*current_context)(Context*);
  Status (*context_device)(Device*);  // of the current context
  Status (*load)(Module*, const void* image);
  Status (*function)(Function*, Module, const char* name);
  Status (*launch)(Function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared_bytes, Stream, void** parameters, void** extra);
  Status (*copy)(void* to, const void* from, size_t bytes, Stream);  // between places on the device
  Status (*error_name)(Status, const char** name);
};

// Opens the driver at the first call; never throws.
const Driver& driver();

// The JAX platform whose memory and streams these functions take: "CUDA".
const char* platform();

}  // namespace embax::cuda

#endif  // EMBAX_CSRC_CUDA_DRIVER_H_
