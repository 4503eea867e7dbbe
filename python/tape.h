// The launches of one pass through a block, made again for other tensors of the same layouts.
#pragma once

#include <pybind11/pybind11.h>

namespace emo_kernels::python {

// Adds Tape to the module.
void add_tape(pybind11::module_& m);

}  // namespace emo_kernels::python
