# Toolchain: the C++ compiler of the PyPI package ziglang, which brings the headers and stubs of every glibc, so that a
# wheel for another processor, or for an older system, can be built anywhere. scripts/zig_wheels.sh sets two variables:
#
#   EMBAX_ZIG         the program zig
#   EMBAX_ZIG_TARGET  processor, system and oldest glibc, as zig writes them: aarch64-linux-gnu.2.28
#
# Read from the environment, for CMake reads this file again in projects of its own, which see no cache variables.

string(REGEX MATCH "^[^-]+" CMAKE_SYSTEM_PROCESSOR "$ENV{EMBAX_ZIG_TARGET}")
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_CXX_COMPILER "$ENV{EMBAX_ZIG}" c++ -target $ENV{EMBAX_ZIG_TARGET})

# Nothing of the build machine's belongs into what is built for another.
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
