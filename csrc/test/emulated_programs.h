// Programs of the kernels under test, a library for each dimension.

#ifndef EMBAX_CSRC_TEST_EMULATED_PROGRAMS_H_
#define EMBAX_CSRC_TEST_EMULATED_PROGRAMS_H_

#include <cstdlib>
#include <fstream>
#include <string>

#include "cuda_driver.h"
#include "test/batch.h"
#include "test/plain.h"

namespace embax::test {

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
constexpr const char* kTypes[] = {"float", "BFloat16", "Float16"};
#define EMBAX_NAME(name, ...) #__VA_ARGS__,
constexpr const char* kFormulas[] = {EMBAX_OPTIMIZERS(EMBAX_NAME)};

struct Library {
  int64_t dim;
  Dtype table, other;  // of activations and of gradients
  bool gained, levelled;
  int stepped, apart;  // optimizers
  std::string path;
  cuda::Module module = nullptr;
};

inline std::string line(const char* name, const std::string& type) {
  return "EMBAX_EMULATED_KERNEL(" + std::string(name) + ", " + type + ")\n";
}

inline std::string source_of(const Library& k) {
  const auto yes = [](bool value) { return value ? "true" : "false"; };
  const std::string table = kTypes[static_cast<int>(k.table)], other = kTypes[static_cast<int>(k.other)];
  const std::string dim = std::to_string(k.dim), gained = yes(k.gained), levelled = yes(k.levelled),
                    both = table + ", " + other + ", " + dim;
  return line("one", "GatherOne<" + both + ", " + levelled + ">") +
         line("pool", "GatherPool<" + both + ", " + gained + ", " + levelled + ">") +
         line("products", "RowProducts<" + both + ", " + levelled + ">") +
         line("tiles", "TileSums<" + other + ", " + dim + ", " + gained + ">") + line("fields", "FieldSums<" + dim + ">") +
         line("sums", "SumRows<" + other + ", " + dim + ", " + gained + ">") +
         line("step", "Step<" + std::string(kFormulas[k.stepped]) + ", " + both + ", " + gained + ", false>") +
         line("apart", "Step<" + std::string(kFormulas[k.apart]) + ", " + both + ", " + gained + ", true>");
}

inline void compile(const std::string& sources, const std::string& path, const std::string& text) {
  std::ofstream(path + ".cu") << "#include \"cuda/kernels.h\"\nusing namespace embax::cuda;\n" << text;
  const auto named = [](const char* variable, const char* otherwise) {
    const char* const value = std::getenv(variable);
    return std::string(value == nullptr ? otherwise : value);
  };
  const std::string command = named("CXX", "c++") + " -std=c++17 -O1 -ffp-contract=off -fPIC -shared -w -D__CUDACC__ -include " +
                              sources + "/test/emulated.h -I " + sources + " " + named("EMBAX_EMULATED_FLAGS", "") + " -x c++ " +
                              path + ".cu -o " + path + ".so";
  EMBAX_CHECK(std::system(command.c_str()) == 0, "%s", command.c_str());
}

// Kernels that must fail, and one that must not.
constexpr char kFaults[] = R"(
struct Work { int* at; };
struct Stuck { using Work = ::Work; static void run(const Work&) {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0xffffffffu, 1, 1); else __syncthreads(); } };
struct Gone { using Work = ::Work; static void run(const Work& work) {
  if (threadIdx.x % 2 == 0) work.at[0] = __shfl_xor_sync(0xffffffffu, 1, 1); } };
struct Fine { using Work = ::Work; static void run(const Work& work) {
  if (threadIdx.x >= 192) return;
  const int count = __syncthreads_count(threadIdx.x % 2);
  const unsigned even = __ballot_sync(0xffffffffu, threadIdx.x % 2 == 0);
  work.at[blockIdx.x] = count + static_cast<int>(__shfl_sync(0xffffffffu, even, 7) & 1u) * (1 << 30); } };
)";

}  // namespace embax::test

#endif  // EMBAX_CSRC_TEST_EMULATED_PROGRAMS_H_
