// Runs CUDA kernels on the host, in place of cuda_driver.cc: programs that a host compiler has made (see emulated.h), which
// load() opens from an image that is the text "embax-emulated " and the library's path.
//
// A launch runs on the caller's thread, block by block. Each thread of a block has a stack of its own and runs until it waits for
// others (a barrier, a shuffle, a ballot) or ends; threads that wait go on once all who belong to the call have come to it. One
// warp runs as far as it gets before the next does. That is CUDA's law since Volta, a little stricter: threads meet in one line
// of the sources, and nobody takes a number from a thread that has ended or is not in the mask. Where none can go on the launch
// fails, and stderr says who waits where.
// What a block shares is filled with rubbish before it begins. Float32 subnormals are kept, whatever the caller's thread does.
//
// Read from the environment at each launch:
//
//   EMBAX_EMULATED_ORDER            forward (blocks and threads by their numbers), backward, or a number: shuffled by it.
//                                   Kernels without races give the same bits in every order.
// and whenever a caller asks for it:
//   EMBAX_EMULATED_MULTIPROCESSORS  2 unless it says something else

#include <dlfcn.h>

#include <cfenv>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda_driver.h"
#include "test/emulated_machine.h"

namespace embax::cuda {
namespace {

using namespace emulated;

Status load(Module* module, const void* image) {
  constexpr char kMark[] = "embax-emulated ";
  if (std::strncmp(static_cast<const char*>(image), kMark, sizeof kMark - 1) != 0) return kInvalidImage;
  const char* const path = static_cast<const char*>(image) + sizeof kMark - 1;
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) say("%s", dlerror());
  *module = static_cast<Module>(library);
  return library == nullptr ? kFileNotFound : kSuccess;
}

Status function(Function* function, Module module, const char* name) {
  auto* const program = static_cast<Program*>(dlsym(module, name));
  if (program == nullptr) return kNotFound;
  *function = reinterpret_cast<Function>(program);
  return program->size == sizeof(Program) ? kSuccess : kInvalidImage;
}

Status launch(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
              unsigned block_z, unsigned, Stream, void** parameters, void** extra) {
  const auto& program = *reinterpret_cast<const Program*>(function);
  constexpr unsigned kMostBlocks = 0x7fffffff;
  if (grid_x == 0 || grid_x > kMostBlocks || grid_y != 1 || grid_z != 1 || block_x == 0 || block_y != 1 || block_z != 1 ||
      extra != nullptr) {
    return kInvalidValue;
  }
  if (block_x > program.most_threads) return kTooManyResources;
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  struct alignas(16) Word {
    char bytes[16];
  };
  std::vector<Word> work((program.work_bytes + sizeof(Word) - 1) / sizeof(Word));
  std::memcpy(work.data(), parameters[0], program.work_bytes);
  fenv_t callers;
  std::fegetenv(&callers);
  std::fesetenv(FE_DFL_ENV);
  const Status status = Machine::only().launch(program, work.data(), grid_x, block_x);
  std::fesetenv(&callers);
  return status;
}

Status attribute(int* value, int which, Device) {
  const char* const asked = std::getenv("EMBAX_EMULATED_MULTIPROCESSORS");
  if (which == kMultiprocessors) *value = asked == nullptr ? 2 : std::atoi(asked);
  if (which == kMajor) *value = 9;
  if (which == kMinor) *value = 0;
  return which == kMultiprocessors || which == kMajor || which == kMinor ? kSuccess : kInvalidValue;
}

Status error_name(Status status, const char** name) {
  constexpr std::pair<Status, const char*> kNames[] = {{kSuccess, "CUDA_SUCCESS"},
                                                       {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
                                                       {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE"},
                                                       {kFileNotFound, "CUDA_ERROR_FILE_NOT_FOUND"},
                                                       {kNotFound, "CUDA_ERROR_NOT_FOUND"},
                                                       {kTooManyResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
                                                       {kTimeout, "CUDA_ERROR_LAUNCH_TIMEOUT"},
                                                       {kFailed, "CUDA_ERROR_LAUNCH_FAILED"}};
  for (const auto& [number, its_name] : kNames) {
    if (number == status) return *name = its_name, kSuccess;
  }
  return kInvalidValue;
}

Driver emulator() {
  Driver d{};
  d.init = [](unsigned) { return kSuccess; };
  d.device_count = [](int* count) { return *count = 1, kSuccess; };
  d.device = [](Device* device, int ordinal) { return *device = ordinal, ordinal == 0 ? kSuccess : kInvalidValue; };
  d.attribute = attribute;
  d.current_context = [](Context* context) {
    static char place;
    return *context = reinterpret_cast<Context>(&place), kSuccess;
  };
  d.context_device = [](Device* device) { return *device = 0, kSuccess; };
  d.load = load;
  d.function = function;
  d.launch = launch;
  d.copy = [](void* to, const void* from, size_t bytes, Stream) {
    if (bytes > 0) std::memcpy(to, from, bytes);
    return kSuccess;
  };
  d.error_name = error_name;
  return d;
}

}  // namespace

const Driver& driver() {
  static const Driver only = emulator();
  return only;
}

const char* platform() { return "cpu"; }

}  // namespace embax::cuda
