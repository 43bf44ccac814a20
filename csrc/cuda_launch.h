// What a call launches, planned without touching a card: programs, grids and work orders, one after another. The
// bindings plan in the initialize stage, to have the kernels loaded, and again to launch; a test plans and looks.

#ifndef EMBAX_CSRC_CUDA_LAUNCH_H_
#define EMBAX_CSRC_CUDA_LAUNCH_H_

#include <cstring>
#include <string>
#include <vector>

#include "cuda_modules.h"
#include "cuda_programs.h"

namespace embax::cuda {

// Blocks for each multiprocessor where blocks walk over rows: eight are at work at a time, the others even out their
// ends.
constexpr int64_t kBlocksPerMultiprocessor = 32;

struct Launch {
  std::string program;
  int64_t blocks;
  bool strides;  // any number of blocks does the work: as many as keep the card busy, `blocks` at most
  std::vector<char> work;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Plan {
  std::string wrong;  // why there is no plan
  std::vector<Copy> copies;
  std::vector<Launch> launches;

  template <typename Work>
  void add(const std::string& program, int64_t blocks, const Work& work, bool strides = false) {
    static_assert(sizeof(Work) <= 4000, "the parameters of a kernel");
    if (blocks <= 0) return;
    launches.push_back({program, blocks, strides, std::vector<char>(sizeof(Work))});
    std::memcpy(launches.back().work.data(), &work, sizeof(Work));
  }
};

inline Plan refused(const std::string& why) {
  Plan plan;
  plan.wrong = why;
  return plan;
}

inline int64_t blocks_for(int64_t things, int64_t in_block) { return (things + in_block - 1) / in_block; }

// Loads the kernels of a plan; returns what is wrong, or an empty text.
inline std::string prepare(const Plan& plan) {
  if (!plan.wrong.empty()) return plan.wrong;
  Kernel kernel;
  for (const Launch& launch : plan.launches) {
    if (auto wrong = find_kernel(launch.program, kernel); !wrong.empty()) return wrong;
  }
  return {};
}

// Puts copies and kernels on the stream, in order; waits for nothing.
inline std::string launch(const Plan& plan, Stream stream) {
  if (!plan.wrong.empty()) return plan.wrong;
  for (const Copy& copy : plan.copies) {
    if (const Status status = driver().copy(copy.to, copy.from, copy.bytes, stream))
      return failure("copying a table", status);
  }
  for (const Launch& each : plan.launches) {
    Kernel kernel;
    if (auto wrong = find_kernel(each.program, kernel); !wrong.empty()) return wrong;
    const int64_t most = kernel.multiprocessors * kBlocksPerMultiprocessor;
    const int64_t blocks = each.strides && each.blocks > most ? most : each.blocks;
    void* parameters[] = {const_cast<char*>(each.work.data())};
    const Status status = driver().launch(kernel.function, static_cast<unsigned>(blocks), 1, 1, kThreads, 1, 1, 0,
                                          stream, parameters, nullptr);
    if (status) return failure(("launching " + each.program).c_str(), status);
  }
  return {};
}

}  // namespace embax::cuda

#endif  // EMBAX_CSRC_CUDA_LAUNCH_H_
