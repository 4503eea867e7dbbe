#include "new_map.h"

#include <stdexcept>

#include "map_memory.h"

namespace py = pybind11;

namespace emo_kernels::python {
namespace {

struct Result {
  dlpack::ManagedTensor managed;
  int64_t shape[4], strides[4];
  int64_t bytes;
};

// (N, C, H, W) with dense pixels, in the dtype of `like`.
py::object new_map(const py::object& capsule, const py::object& like, int64_t n, int64_t c,
                   int64_t h, int64_t w) {
  const dlpack::ExchangeApi* const api = exchange_api(capsule);
  dlpack::Tensor found;
  if (api->look_at(like.ptr(), &found) != 0) throw py::error_already_set();
  const int64_t shape[] = {n, c, h, w}, strides[] = {h * w * c, 1, w * c, c};
  dlpack::ManagedTensor* const result = new_result(4, shape, strides, found.dtype);
  void* out = nullptr;
  if (api->import_tensor(result, &out) != 0) {
    release_result(result);
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(out));
}

}  // namespace

const dlpack::ExchangeApi* exchange_api(const py::object& capsule) {
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
  if (api == nullptr) throw py::error_already_set();
  if (api->version.major != 1 || api->look_at == nullptr || api->import_tensor == nullptr) {
    throw std::invalid_argument("this torch does not show its tensors' memory");
  }
  return api;
}

dlpack::ManagedTensor* new_result(int32_t dims, const int64_t* shape, const int64_t* strides,
                                  dlpack::DataType dtype) {
  auto* const result = new Result;
  result->bytes = dtype.bits / 8;
  for (int32_t d = 0; d < dims; ++d) {
    result->shape[d] = shape[d];
    result->strides[d] = strides[d];
    result->bytes *= shape[d];
  }
  result->managed.version = {1, 0};
  result->managed.context = result;
  result->managed.deleter = release_result;
  result->managed.flags = 0;
  result->managed.tensor = {map_memory().take(result->bytes),
                            {dlpack::kCpu, 0},
                            dims,
                            dtype,
                            result->shape,
                            result->strides,
                            0};
  return &result->managed;
}

void release_result(dlpack::ManagedTensor* result) {
  auto* const made = static_cast<Result*>(result->context);
  map_memory().give(result->tensor.data, made->bytes);
  delete made;
}

void add_new_map(py::module_& m) { m.def("new_map", &new_map); }

}  // namespace emo_kernels::python
