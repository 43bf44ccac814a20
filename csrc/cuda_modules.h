// Compiled programs: from images of machine code to kernels of the card at hand. Who compiles is told from outside
// (Python, which finds NVRTC); here images are kept by program and architecture, and loaded once for each context.

#ifndef EMBAX_CSRC_CUDA_MODULES_H_
#define EMBAX_CSRC_CUDA_MODULES_H_

#include <string>

#include "cuda_driver.h"

namespace embax::cuda {

struct Kernel {
  Function function;
  int multiprocessors;  // of its card
};

// Finds a program's kernel for the current context, compiling and loading it where that was not done before. Returns
// what is wrong, or an empty text.
std::string find_kernel(const std::string& program, Kernel& kernel);

// "what: the driver's name of the error".
std::string failure(const char* what, Status status);

}  // namespace embax::cuda

#endif  // EMBAX_CSRC_CUDA_MODULES_H_
