// A kernel call that eager inference repeats: checked in C++, made again for another map.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>

namespace emo_kernels::python {

// A kernel with all settled but the map, its result and the number of threads.
struct Prepared {
  std::function<void(const void* x, void* out, int threads)> run;
};

// Adds Prepared and bind_call to the module.
void add_bound_call(pybind11::module_& m);

}  // namespace emo_kernels::python
