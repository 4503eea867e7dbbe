// Tuples of integers, in the order emo_kernels/cpu and csrc/emo_kernels.h give them.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace emo_kernels::python {

// `what` names the tuple in an error.
template <size_t kCount>
std::array<int64_t, kCount> integers(const char* what, const pybind11::tuple& values) {
  if (values.size() != kCount) {
    throw std::invalid_argument(std::string(what) + ": expected " + std::to_string(kCount) +
                                " entries, got " + std::to_string(values.size()));
  }
  std::array<int64_t, kCount> result;
  for (size_t i = 0; i < kCount; ++i) {
    result[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i)));
  }
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  return result;
}

template <class... I>
void read_integers(const char* what, const pybind11::tuple& values, I&... targets) {
  const auto value = integers<sizeof...(I)>(what, values);
  size_t i = 0;
  ((targets = static_cast<I>(value[i++])), ...);
}

template <class... P>
void read_addresses(const char* what, const pybind11::tuple& values, P*&... targets) {
  const auto value = integers<sizeof...(P)>(what, values);
  size_t i = 0;
  ((targets = reinterpret_cast<P*>(static_cast<uintptr_t>(value[i++]))), ...);
}

}  // namespace emo_kernels::python
