// The kernels for one vector width. CMake compiles this file once for each: EMBAX_ISA names the copy.

#include "gather_present.h"
#include "kernels.h"
#include "quantized.h"
#include "step.h"

#define EMBAX_QUOTED(x) #x
#define EMBAX_NAME(x) EMBAX_QUOTED(x)

namespace embax::EMBAX_ISA {

#define EMBAX_STEPS(name, ...) \
  {step_rows<__VA_ARGS__, float>, step_rows<__VA_ARGS__, BFloat16>, step_rows<__VA_ARGS__, Float16>},

extern const Kernels kKernels;
const Kernels kKernels{EMBAX_NAME(EMBAX_ISA), gather_pool, gather_rows, row_products, quantized_pool,
                       sum_hot_block, sum_rows, {EMBAX_OPTIMIZERS(EMBAX_STEPS)}};

}  // namespace embax::EMBAX_ISA
