// What Python asks before it makes a program: which kernels a call launches, a line each, the scratch it takes, and
// which optimizers there are.

#include <mutex>
#include <set>

#include "cuda_programs.h"
#include "optimizers.h"

namespace embax::cuda {

#define EMBAX_FORMULA_OF(name, ...) \
  {name, #__VA_ARGS__, EMBAX_ISA::__VA_ARGS__::kElementSlots, EMBAX_ISA::__VA_ARGS__::kRowSlot},
constexpr Formula kFormulas[] = {EMBAX_OPTIMIZERS(EMBAX_FORMULA_OF)};

const Formula* formula_named(const std::string& name) {
  for (const Formula& formula : kFormulas) {
    if (name == formula.name) return &formula;
  }
  return nullptr;
}

}  // namespace embax::cuda

namespace {

// Texts that were asked for are kept: there are as many as kinds of calls.
const char* lines(const embax::cuda::Programs& programs) {
  static std::mutex mutex;
  static std::set<std::string> kept;
  std::string text;
  for (const std::string& program : programs) text += program + "\n";
  const std::lock_guard lock(mutex);
  return kept.insert(text).first->c_str();
}

embax::Dtype dtype(int number) { return static_cast<embax::Dtype>(number); }

}  // namespace

extern "C" const char* embax_cuda_gather_programs(int table, int out, int64_t dim, int one, int gained, int levelled) {
  return lines(embax::cuda::gather_programs(dtype(table), dtype(out), dim, one != 0, gained != 0, levelled != 0));
}
extern "C" const char* embax_cuda_product_programs(int table, int gradients, int64_t dim, int levelled) {
  return lines(embax::cuda::product_programs(dtype(table), dtype(gradients), dim, levelled != 0));
}
extern "C" const char* embax_cuda_samples_programs() { return lines(embax::cuda::samples_programs()); }
extern "C" const char* embax_cuda_runs_programs() { return lines(embax::cuda::runs_programs()); }
extern "C" const char* embax_cuda_row_gradient_programs(int gradients, int64_t dim, int64_t count, int gained) {
  return lines(embax::cuda::row_gradient_programs(dtype(gradients), dim, count, gained != 0));
}
extern "C" const char* embax_cuda_update_programs(const char* optimizer, int table, int gradients, int64_t dim,
                                                  int64_t count, int gained, int apart) {
  const embax::cuda::Formula* formula = embax::cuda::formula_named(optimizer);
  if (formula == nullptr) return "";
  return lines(
      embax::cuda::update_programs(formula->text, dtype(table), dtype(gradients), dim, count, gained != 0, apart != 0));
}
extern "C" int64_t embax_cuda_scratch_numbers(int64_t count) { return embax::cuda::scratch_numbers(count); }
extern "C" int64_t embax_cuda_scratch_rows(int64_t count) { return embax::cuda::scratch_rows(count); }
extern "C" int embax_cuda_most_blocks() { return embax::cuda::kMaxBlocks; }
extern "C" const char* embax_cuda_optimizers() {
#define EMBAX_NAME(name, ...) name "\n"
  return EMBAX_OPTIMIZERS(EMBAX_NAME);
}
