// A kernel of a training step with all settled but its tensors' addresses and the threads.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <functional>

namespace emo_kernels::python {

struct Launch {
  size_t places = 0;  // how many addresses it takes
  std::function<void(void* const* addresses, int threads)> run;
};

// Adds Launch and the functions that give one to the module.
void add_launches(pybind11::module_& m);

}  // namespace emo_kernels::python
