// Which kernels a call launches: the names of their programs, in the order of launches. One place says so, for the
// bindings, which launch them, and for Python, which has them compiled before a program that calls them is made.

#ifndef EMBAX_CSRC_CUDA_PROGRAMS_H_
#define EMBAX_CSRC_CUDA_PROGRAMS_H_

#include <string>
#include <vector>

#include "cuda/work.h"
#include "kernels.h"

namespace embax::cuda {

using Programs = std::vector<std::string>;

inline std::string type_name(Dtype dtype) {
  if (dtype == Dtype::kFloat32) return "float";
  return dtype == Dtype::kBFloat16 ? "embax::cuda::BFloat16" : "embax::cuda::Float16";
}

// The formula of an optimizer, by the name that Python has for it.
struct Formula {
  const char* name;
  const char* text;  // its struct, for a program
  int element_slots;
  bool row_slot;
};

const Formula* formula_named(const std::string& name);

// A C++ type: embax::cuda::Kernel<arguments ...>.
inline std::string program(const std::string& kernel, const std::vector<std::string>& arguments) {
  std::string text = "embax::cuda::" + kernel + "<";
  for (size_t i = 0; i < arguments.size(); ++i) text += (i ? ", " : "") + arguments[i];
  return text + ">";
}

inline std::string yes_or_no(bool value) { return value ? "true" : "false"; }

// `one`: every sample has one id, and there are no gains.
inline Programs gather_programs(Dtype table, Dtype out, int64_t dim, bool one, bool gained, bool levelled) {
  if (one) return {program("GatherOne", {type_name(table), type_name(out), std::to_string(dim), yes_or_no(levelled)})};
  return {program("GatherPool",
                  {type_name(table), type_name(out), std::to_string(dim), yes_or_no(gained), yes_or_no(levelled)})};
}

inline Programs product_programs(Dtype table, Dtype gradients, int64_t dim, bool levelled) {
  return {program("RowProducts", {type_name(table), type_name(gradients), std::to_string(dim), yes_or_no(levelled)})};
}

inline Programs samples_programs() { return {"embax::cuda::SamplesOf"}; }

inline Programs runs_programs() { return {"embax::cuda::CountRuns", "embax::cuda::WriteRuns"}; }

inline int64_t tiles_of(int64_t count) { return count / kPiece; }
inline int64_t fields_of(int64_t count) { return count / kPiece / kPiece; }

// Runs, and sums of the long ones among `count` entries.
inline Programs sum_programs(Dtype gradients, int64_t dim, int64_t count, bool gained) {
  Programs all = runs_programs();
  const std::string of_dim = std::to_string(dim);
  if (tiles_of(count) > 0) all.push_back(program("TileSums", {type_name(gradients), of_dim, yes_or_no(gained)}));
  if (fields_of(count) > 0) all.push_back(program("FieldSums", {of_dim}));
  return all;
}

inline Programs row_gradient_programs(Dtype gradients, int64_t dim, int64_t count, bool gained) {
  Programs all = sum_programs(gradients, dim, count, gained);
  all.push_back(program("SumRows", {type_name(gradients), std::to_string(dim), yes_or_no(gained)}));
  return all;
}

// `formula`: the optimizer's struct; `apart`: every entry has a row of its own.
inline Programs update_programs(const std::string& formula, Dtype table, Dtype gradients, int64_t dim, int64_t count,
                                bool gained, bool apart) {
  Programs all = apart ? Programs{} : sum_programs(gradients, dim, count, gained);
  all.push_back(program("Step", {"embax::cuda::" + formula, type_name(table), type_name(gradients), std::to_string(dim),
                                 yes_or_no(gained), yes_or_no(apart)}));
  return all;
}

// Memory that the runs and the sums of `count` entries take: int32 numbers, and float32 rows.
inline int64_t run_tiles_of(int64_t count) { return (count + kRunTile - 1) / kRunTile; }
inline int64_t scratch_numbers(int64_t count) { return run_tiles_of(count) + 1 + count + 1; }
inline int64_t scratch_rows(int64_t count) { return tiles_of(count) + fields_of(count); }

}  // namespace embax::cuda

#endif  // EMBAX_CSRC_CUDA_PROGRAMS_H_
