// Watches a model's dicts and tensors for emo_kernels/watch.py.
#pragma once

#include <pybind11/pybind11.h>

namespace emo_kernels::python {

// Adds Watch to the module.
void add_watch(pybind11::module_& m);

}  // namespace emo_kernels::python
