#include "cuda_modules.h"

#include <atomic>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "cuda_sources.h"

namespace embax::cuda {
namespace {

// Makes the image of a program for an architecture (90: compute capability 9.0) and hands it to embax_cuda_add;
// returns 0 if it did.
using Compiler = int (*)(const char* program, int architecture);

// Never destroyed: a thread of XLA's may launch while the process ends.
std::mutex& mutex = *new std::mutex;
auto& images = *new std::map<std::pair<std::string, int>, std::vector<char>>;
auto& kernels = *new std::map<std::pair<Context, std::string>, Kernel>;
std::atomic<Compiler> compiler = nullptr;

std::string architecture_of(Device device, int& architecture, int& multiprocessors) {
  int major = 0, minor = 0;
  for (auto [which, to] : {std::pair{kMajor, &major}, {kMinor, &minor}, {kMultiprocessors, &multiprocessors}}) {
    if (const Status status = driver().attribute(to, which, device))
      return failure("asking for the card's kind", status);
  }
  architecture = 10 * major + minor;
  return {};
}

bool compiled(const std::string& program, int architecture) {
  {
    const std::lock_guard lock(mutex);
    if (images.count({program, architecture})) return true;
  }
  // Without the lock: the compiler comes back with the image.
  const Compiler compile = compiler;
  return compile != nullptr && compile(program.c_str(), architecture) == 1;
}

// Texts of images stay where they are once they are there.
const char* image_of(const std::string& program, int architecture) {
  const std::lock_guard lock(mutex);
  const auto found = images.find({program, architecture});
  return found == images.end() ? nullptr : found->second.data();
}

std::string load(const std::string& program, int architecture, Kernel& kernel) {
  const char* const image = image_of(program, architecture);
  if (image == nullptr) return "there is no image of " + program + " for sm_" + std::to_string(architecture);
  Module module = nullptr;
  if (const Status status = driver().load(&module, image)) return failure("loading kernels", status);
  if (const Status status = driver().function(&kernel.function, module, "embax_kernel")) {
    return failure("finding a kernel in its module", status);
  }
  return {};
}

}  // namespace

std::string failure(const char* what, Status status) {
  const char* name = nullptr;
  if (driver().error_name == nullptr || driver().error_name(status, &name) || name == nullptr)
    name = "an unknown error";
  return std::string(what) + ": " + name + " (" + std::to_string(status) + ")";
}

std::string find_kernel(const std::string& program, Kernel& kernel) {
  if (driver().why_not != nullptr) return driver().why_not;
  Context context = nullptr;
  if (const Status status = driver().current_context(&context))
    return failure("asking for the current context", status);
  {
    const std::lock_guard lock(mutex);
    if (const auto found = kernels.find({context, program}); found != kernels.end()) {
      kernel = found->second;
      return {};
    }
  }
  Device device = 0;
  if (const Status status = driver().context_device(&device)) return failure("asking for the current card", status);
  int architecture = 0;
  if (auto wrong = architecture_of(device, architecture, kernel.multiprocessors); !wrong.empty()) return wrong;
  if (!compiled(program, architecture)) return "compiling " + program + " failed; set EMBAX_BACKEND=reference to go on";
  // Without the lock: loading may wait for what runs on the card, and that for a launch of another thread. Two that
  // load the same at once have it twice, which costs memory only.
  if (auto wrong = load(program, architecture, kernel); !wrong.empty()) return wrong;
  const std::lock_guard lock(mutex);
  kernel = kernels.emplace(std::pair{context, program}, kernel).first->second;
  return {};
}

}  // namespace embax::cuda

// By ctypes, from embax/kernels/cuda_library.py.

extern "C" const char* embax_cuda_why_not() { return embax::cuda::driver().why_not; }

extern "C" const char* embax_cuda_platform() { return embax::cuda::platform(); }

// The architectures of the cards at hand, at most `room`, each as often as there are such cards; returns their
// number, or minus the driver's error.
extern "C" int embax_cuda_architectures(int* architectures, int room) {
  const auto& driver = embax::cuda::driver();
  int count = 0;
  if (const int status = driver.init(0)) return -status;
  if (const int status = driver.device_count(&count)) return -status;
  for (int i = 0; i < count && i < room; ++i) {
    int device = 0, major = 0, minor = 0;
    if (const int status = driver.device(&device, i)) return -status;
    if (const int status = driver.attribute(&major, embax::cuda::kMajor, device)) return -status;
    if (const int status = driver.attribute(&minor, embax::cuda::kMinor, device)) return -status;
    architectures[i] = 10 * major + minor;
  }
  return count < room ? count : room;
}

extern "C" void embax_cuda_set_compiler(embax::cuda::Compiler compiler) { embax::cuda::compiler = compiler; }

extern "C" void embax_cuda_add(const char* program, int architecture, const void* image, size_t bytes) {
  const char* begin = static_cast<const char*>(image);
  const std::lock_guard lock(embax::cuda::mutex);
  embax::cuda::images.try_emplace({program, architecture}, begin, begin + bytes);
}

// The kernels' source, file by file, in the version of this library: names by which they include each other, and
// texts.
extern "C" int embax_cuda_sources() { return embax::cuda::kSources; }
extern "C" const char* embax_cuda_source_name(int i) { return embax::cuda::kSourceNames[i]; }
extern "C" const char* embax_cuda_source_text(int i) { return embax::cuda::kSourceTexts[i]; }
