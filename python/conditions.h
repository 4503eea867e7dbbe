// On what it depends that a call checked once may be made again unchecked.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "dlpack.h"
#include "tensor_memory.h"

namespace emo_kernels::python {

// Borrowed pointers here and below: whoever has the conditions keeps the objects alive.
struct Place {
  PyObject *dict, *key, *expected;  // expected: null where the dict must lack the key

  bool holds() const { return PyDict_GetItemWithError(dict, key) == expected; }
};

struct Length {
  PyObject* dict;
  Py_ssize_t expected;

  bool holds() const { return PyDict_GET_SIZE(dict) == expected; }
};

struct Flag {
  PyObject *function, *argument, *expected;  // argument: null for none

  bool holds() const {
    PyObject* const found =
        PyObject_Vectorcall(function, &argument, argument == nullptr ? 0 : 1, nullptr);
    Py_XDECREF(found);
    return found == expected;  // a singleton: alive without our reference
  }
};

struct Weight {
  Place place;
  TensorMemory memory;
  const char* shape;  // where torch keeps it, beside all else that is looked at
};

// Whether the tensor has memory to look at; an error is a no.
inline bool look_at(const dlpack::ExchangeApi& api, PyObject* tensor, dlpack::Tensor* found) {
  if (api.look_at(tensor, found) == 0) return true;
  PyErr_Clear();
  return false;
}

class Conditions {
 public:
  // As of _C.bind_call; each throws std::invalid_argument on what is no such list.
  void add_places(const pybind11::list& pairs);
  void add_sized(const pybind11::list& dicts);
  void add_weights(const dlpack::ExchangeApi& api, const pybind11::list& pairs);
  void add_flags(const pybind11::list& rows);
  // Those of another call besides; flags are the same for all calls.
  void add(const Conditions& other);

  bool hold(const dlpack::ExchangeApi& api) const;
  // What the places hold, and the weights.
  pybind11::list values() const;

 private:
  std::vector<Place> places_;
  std::vector<Length> lengths_;
  std::vector<Weight> weights_;
  std::vector<Flag> flags_;
};

}  // namespace emo_kernels::python
