// Where a tensor lies, and in which layout.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "dlpack.h"

namespace emo_kernels::python {

// In one piece: what is compared at every call lies side by side.
struct TensorMemory {
  static constexpr int32_t kMostDims = 4;
  void* data;
  dlpack::DataType dtype;
  int32_t dims;
  int64_t shape[kMostDims], strides[kMostDims];

  int64_t bytes() const {
    int64_t found = dtype.bits / 8;
    for (int32_t d = 0; d < dims; ++d) found *= shape[d];
    return found;
  }
};

// Throws what torch says of a tensor without memory.
inline TensorMemory memory_of(const dlpack::ExchangeApi& api, PyObject* tensor) {
  dlpack::Tensor t;
  if (api.look_at(tensor, &t) != 0) throw pybind11::error_already_set();
  if (t.dims > TensorMemory::kMostDims) throw std::invalid_argument("more than four dimensions");
  TensorMemory found{t.data, t.dtype, t.dims, {}, {}};
  std::copy_n(t.shape, t.dims, found.shape);
  std::copy_n(t.strides, t.dims, found.strides);
  return found;
}

// strides_of_ones: whether those of sides of one element count.
inline bool same_layout(const dlpack::Tensor& t, const TensorMemory& m, bool strides_of_ones) {
  if (t.device.type != dlpack::kCpu || t.dims != m.dims || t.dtype.code != m.dtype.code ||
      t.dtype.bits != m.dtype.bits || t.byte_offset != 0) {
    return false;
  }
  for (int32_t d = 0; d < t.dims; ++d) {
    if (t.shape[d] != m.shape[d]) return false;
    if (t.strides[d] != m.strides[d] && (strides_of_ones || m.shape[d] != 1)) return false;
  }
  return true;
}

}  // namespace emo_kernels::python
