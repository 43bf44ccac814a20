// All CUDA kernels: a program is this file and one line, EMBAX_CUDA_KERNEL(which).

#ifndef EMBAX_CSRC_CUDA_KERNELS_H_
#define EMBAX_CSRC_CUDA_KERNELS_H_

#include "cuda/gather.h"
#include "cuda/runs.h"
#include "cuda/step.h"

#endif  // EMBAX_CSRC_CUDA_KERNELS_H_
