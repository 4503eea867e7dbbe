// Tensors whose memory is map_memory's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "dlpack.h"

namespace emo_kernels::python {

// torch's interface from its capsule; throws where this torch has not all of it.
const dlpack::ExchangeApi* exchange_api(const pybind11::object& capsule);

// An uninitialised tensor of up to four dimensions, to be imported or released.
dlpack::ManagedTensor* new_result(int32_t dims, const int64_t* shape, const int64_t* strides,
                                  dlpack::DataType dtype);
void release_result(dlpack::ManagedTensor* result);

// Adds new_map to the module.
void add_new_map(pybind11::module_& m);

}  // namespace emo_kernels::python
