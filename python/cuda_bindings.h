#pragma once

#include <pybind11/pybind11.h>

namespace emo_kernels::cuda {

// Adds the CUDA kernels to the module.
void bind(pybind11::module_& m);

}  // namespace emo_kernels::cuda
