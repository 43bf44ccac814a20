# The CUDA kernels' source as C++ text, so that the library carries what it launches: cuda_sources.h in the build folder.
# Included by CMakeLists.txt; sets embax_cuda_sources_folder.
set(embax_cuda_files portable.h numbers.h optimizers.h cuda/work.h cuda/device.h cuda/gather.h cuda/runs.h cuda/step.h
  cuda/kernels.h)
set(embax_cuda_sources_folder "${CMAKE_CURRENT_BINARY_DIR}/cuda_sources")
set(embax_cuda_names "")
set(embax_cuda_texts "")
foreach(file IN LISTS embax_cuda_files)
  set(path "${CMAKE_CURRENT_SOURCE_DIR}/csrc/${file}")
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${path}")
  file(READ "${path}" text)
  string(APPEND embax_cuda_names "    \"${file}\",\n")
  string(APPEND embax_cuda_texts "    R\"embax(${text})embax\",\n")
endforeach()
list(LENGTH embax_cuda_files embax_cuda_count)
file(CONFIGURE OUTPUT "${embax_cuda_sources_folder}/cuda_sources.h" @ONLY CONTENT "\
// Made by cmake/cuda_sources.cmake: the files of csrc that NVRTC compiles.
#pragma once

namespace embax::cuda {

constexpr int kSources = @embax_cuda_count@;
constexpr const char* kSourceNames[] = {
@embax_cuda_names@};
constexpr const char* kSourceTexts[] = {
@embax_cuda_texts@};

}  // namespace embax::cuda
")
