// Where a tensor lies, and in which layout.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "dlpack.h"

namespace emo_kernels::python {

struct TensorMemory {
  void* data;
  dlpack::DataType dtype;
  std::vector<int64_t> shape, strides;
};

// Throws what torch says of a tensor without memory.
inline TensorMemory memory_of(const dlpack::ExchangeApi& api, PyObject* tensor) {
  dlpack::Tensor t;
  if (api.look_at(tensor, &t) != 0) throw pybind11::error_already_set();
  return {t.data, t.dtype, {t.shape, t.shape + t.dims}, {t.strides, t.strides + t.dims}};
}

// strides_of_ones: whether those of sides of one element count.
inline bool same_layout(const dlpack::Tensor& t, const TensorMemory& m, bool strides_of_ones) {
  if (t.device.type != dlpack::kCpu || t.dims != static_cast<int32_t>(m.shape.size()) ||
      t.dtype.code != m.dtype.code || t.dtype.bits != m.dtype.bits || t.byte_offset != 0) {
    return false;
  }
  for (int32_t d = 0; d < t.dims; ++d) {
    if (t.shape[d] != m.shape[d]) return false;
    if (t.strides[d] != m.strides[d] && (strides_of_ones || m.shape[d] != 1)) return false;
  }
  return true;
}

}  // namespace emo_kernels::python
