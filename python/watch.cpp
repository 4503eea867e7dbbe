// Whether dicts hold what they held, and tensors lie where they lay: one pass, without a call of
// Python unless an object was exchanged for an equal one.
#include "watch.h"

#include <stdexcept>
#include <utility>
#include <vector>

#include "dlpack.h"

namespace py = pybind11;

namespace emo_kernels::python {
namespace {

// Borrowed pointers: the caller of the constructor keeps the objects alive.
struct Items {
  PyObject* dict;
  std::vector<std::pair<PyObject*, PyObject*>> items;
};

struct Memory {
  PyObject* tensor;
  void* data;
  uint64_t byte_offset;
  dlpack::DataType dtype;
  std::vector<int64_t> shape_and_strides;
};

bool equal(PyObject* now, PyObject* then) {
  if (now == then) return true;
  Py_INCREF(now);
  const int answer = PyObject_RichCompareBool(now, then, Py_EQ);
  Py_DECREF(now);
  if (answer < 0) PyErr_Clear();  // objects that do not compare, as tensors: others
  return answer == 1;
}

Items items_of(PyObject* dict) {
  if (!PyDict_Check(dict)) throw std::invalid_argument("watch: dicts must be dicts");
  Items found{dict, {}};
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
    found.items.emplace_back(key, value);
  }
  return found;
}

// exact: the very objects, else they or equal ones.
bool holds(const Items& then, bool exact) {
  if (PyDict_GET_SIZE(then.dict) != static_cast<Py_ssize_t>(then.items.size())) return false;
  PyObject *key = nullptr, *value = nullptr;
  size_t i = 0;
  for (Py_ssize_t at = 0; PyDict_Next(then.dict, &at, &key, &value); ++i) {
    if (i == then.items.size()) return false;
    const auto& [old_key, old_value] = then.items[i];
    if (value != old_value && (exact || !equal(value, old_value))) return false;
    if (!equal(key, old_key)) return false;
  }
  return i == then.items.size();
}

class Watch {
 public:
  Watch(const py::capsule& api, const py::list& empty, const py::list& switches,
        const py::list& holders, const py::list& tensors)
      : api_(static_cast<const dlpack::ExchangeApi*>(
            PyCapsule_GetPointer(api.ptr(), dlpack::kCapsule))) {
    if (api_ == nullptr) throw py::error_already_set();
    if (api_->look_at == nullptr) throw std::invalid_argument("watch: this torch cannot look");
    for (const py::handle& dict : empty) empty_.push_back(dict.ptr());
    for (const py::handle& dict : switches) switches_.push_back(items_of(dict.ptr()));
    for (const py::handle& dict : holders) holders_.push_back(items_of(dict.ptr()));
    for (const py::handle& tensor : tensors) {
      dlpack::Tensor found;
      if (api_->look_at(tensor.ptr(), &found) != 0) {
        PyErr_Clear();
        throw std::invalid_argument("watch: a tensor has no memory to look at");
      }
      Memory memory{tensor.ptr(), found.data, found.byte_offset, found.dtype, {}};
      for (const int64_t* const of : {found.shape, found.strides}) {
        memory.shape_and_strides.insert(memory.shape_and_strides.end(), of, of + found.dims);
      }
      memory_.push_back(std::move(memory));
    }
  }

  bool holds() const {
    for (PyObject* const dict : empty_) {
      if (PyDict_GET_SIZE(dict) != 0) return false;
    }
    for (const Items& items : holders_) {
      if (!python::holds(items, true)) return false;
    }
    for (const Memory& memory : memory_) {
      if (!lies(memory)) return false;
    }
    for (const Items& items : switches_) {
      if (!python::holds(items, false)) return false;
    }
    return true;
  }

 private:
  bool lies(const Memory& then) const {
    dlpack::Tensor now;
    if (api_->look_at(then.tensor, &now) != 0) {
      PyErr_Clear();
      return false;
    }
    const auto dims = static_cast<size_t>(now.dims);
    if (now.data != then.data || now.byte_offset != then.byte_offset ||
        now.dtype.code != then.dtype.code || now.dtype.bits != then.dtype.bits ||
        2 * dims != then.shape_and_strides.size()) {
      return false;
    }
    for (size_t d = 0; d < dims; ++d) {
      if (now.shape[d] != then.shape_and_strides[d]) return false;
      if (now.strides[d] != then.shape_and_strides[dims + d]) return false;
    }
    return true;
  }

  const dlpack::ExchangeApi* api_;
  std::vector<PyObject*> empty_;
  std::vector<Items> switches_, holders_;
  std::vector<Memory> memory_;
};

}  // namespace

void add_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch")
      .def(py::init<const py::capsule&, const py::list&, const py::list&, const py::list&,
                    const py::list&>(),
           py::kw_only(), py::arg("api"), py::arg("empty"), py::arg("switches"), py::arg("holders"),
           py::arg("tensors"))
      .def("holds", &Watch::holds);
}

}  // namespace emo_kernels::python
