// The repeated call of a kernel. Per call it looks at every place in a dict that the call depends
// on, at every flag of torch, and at where each weight's memory lies; where all is as it was, it
// runs the kernel on the map. Else it returns None, and Python calls the operator and binds anew.
// What the weights contain is the kernel's to read, at every call.
#include "bound_call.h"

#include <pybind11/stl.h>
#include <structmember.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "conditions.h"
#include "dlpack.h"
#include "map_memory.h"
#include "new_map.h"
#include "tensor_memory.h"

namespace py = pybind11;

namespace emo_kernels::python {
namespace {

// Borrowed pointers: BoundCall::held keeps the objects alive.
struct State {
  const dlpack::ExchangeApi* api;
  PyTypeObject* tensor_type;
  Conditions conditions;
  PyObject *is_negative, *num_threads, *to_layout, *layout_names, *layout;
  TensorMemory map, result;
  Prepared kernel;
};

struct BoundCall {
  PyObject_HEAD vectorcallfunc call;
  PyObject* held;  // null once the garbage collector has cleared it
  State* state;
};

// The map as the kernel reads it, a new reference; null where the call is another one.
PyObject* readable_map(const State& s, PyObject* x, dlpack::Tensor* found) {
  if (Py_TYPE(x) != s.tensor_type || !look_at(*s.api, x, found)) return nullptr;
  if (found->dims != s.map.dims) return nullptr;
  const Flag negative{s.is_negative, x, Py_False};
  if (!negative.holds()) return nullptr;
  if (same_layout(*found, s.map, false)) return Py_NewRef(x);
  for (int32_t d = 0; d < found->dims; ++d) {
    if (found->shape[d] != s.map.shape[d]) return nullptr;
  }
  if (s.layout == Py_None) return nullptr;
  PyObject* const arguments[] = {x, s.layout};
  PyObject* const dense = PyObject_Vectorcall(s.to_layout, arguments, 1, s.layout_names);
  if (dense != nullptr && look_at(*s.api, dense, found) && same_layout(*found, s.map, false)) {
    return dense;
  }
  Py_XDECREF(dense);
  return nullptr;
}

void run_unlocked(const State& s, const void* x, void* out, int threads) {
  const py::gil_scoped_release unlocked;
  s.kernel.run(x, out, threads);
}

PyObject* run(const State& s, const void* x) {
  PyObject* const threads = PyObject_CallNoArgs(s.num_threads);
  if (threads == nullptr) return nullptr;
  const int count = static_cast<int>(PyLong_AsLong(threads));
  Py_DECREF(threads);
  dlpack::ManagedTensor* result = nullptr;
  try {
    result = new_result(s.result.dims, s.result.shape, s.result.strides, s.result.dtype);
    run_unlocked(s, x, result->tensor.data, count);
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  void* out = nullptr;
  if (PyErr_Occurred() || s.api->import_tensor(result, &out) != 0) {
    if (result != nullptr) release_result(result);
    return nullptr;
  }
  return static_cast<PyObject*>(out);
}

PyObject* call_bound(PyObject* self, PyObject* const* args, size_t nargsf, PyObject* names) {
  auto* const bound = reinterpret_cast<BoundCall*>(self);
  if (bound->held == nullptr || PyVectorcall_NARGS(nargsf) != 1 || names != nullptr) {
    Py_RETURN_NONE;
  }
  const State& s = *bound->state;
  dlpack::Tensor map;
  PyObject* const x = s.conditions.hold(*s.api) ? readable_map(s, args[0], &map) : nullptr;
  if (x == nullptr) {
    PyErr_Clear();
    Py_RETURN_NONE;
  }
  // Another thread may put other weights in their places while the kernel reads these.
  PyObject* const held = Py_NewRef(bound->held);
  PyObject* const out = run(s, map.data);
  Py_DECREF(held);
  Py_DECREF(x);
  return out;
}

int traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  Py_VISIT(reinterpret_cast<BoundCall*>(self)->held);
  return 0;
}

int clear(PyObject* self) {
  Py_CLEAR(reinterpret_cast<BoundCall*>(self)->held);
  return 0;
}

void dealloc(PyObject* self) {
  PyTypeObject* const type = Py_TYPE(self);
  PyObject_GC_UnTrack(self);
  clear(self);
  delete reinterpret_cast<BoundCall*>(self)->state;
  type->tp_free(self);
  Py_DECREF(type);
}

PyTypeObject* g_type = nullptr;

py::object new_bound_call(State s, const py::tuple& held) {
  auto* const bound = PyObject_GC_New(BoundCall, g_type);
  if (bound == nullptr) throw py::error_already_set();
  bound->call = call_bound;
  bound->held = py::object(held).release().ptr();
  bound->state = new State(std::move(s));
  PyObject_GC_Track(bound);
  return py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(bound));
}

// See _C.pyi for the arguments.
py::object bind_call(const Prepared& kernel, const py::object& api, const py::object& x,
                     const std::vector<int64_t>& map_strides, const py::object& layout,
                     const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                     const py::list& places, const py::list& sized, const py::list& weights,
                     const py::list& flags, const py::tuple& tools) {
  State s{};
  s.api = exchange_api(api);
  s.tensor_type = Py_TYPE(x.ptr());
  s.kernel = kernel;
  s.map = memory_of(*s.api, x.ptr());
  const auto dims = static_cast<int32_t>(shape.size());
  if (dims > TensorMemory::kMostDims || strides.size() != shape.size() ||
      map_strides.size() != static_cast<size_t>(s.map.dims)) {
    throw std::invalid_argument("bind_call: shapes and strides do not match");
  }
  std::copy(map_strides.begin(), map_strides.end(), s.map.strides);
  s.result = {nullptr, s.map.dtype, dims, {}, {}};
  std::copy(shape.begin(), shape.end(), s.result.shape);
  std::copy(strides.begin(), strides.end(), s.result.strides);
  const py::tuple names = py::make_tuple("memory_format");
  s.conditions.add_places(places);
  s.conditions.add_sized(sized);
  s.conditions.add_weights(*s.api, weights);
  s.conditions.add_flags(flags);
  s.is_negative = tools[0].ptr();
  s.num_threads = tools[1].ptr();
  s.to_layout = tools[2].ptr();
  s.layout_names = names.ptr();
  s.layout = layout.ptr();
  // Copies: the caller may change its lists, the objects in them stay.
  py::tuple held =
      py::make_tuple(api, py::type::of(x), layout, names, tools, s.conditions.values(),
                     py::tuple(places), py::tuple(sized), py::tuple(weights), py::tuple(flags));
  return new_bound_call(std::move(s), held);
}

// The kernels one after the other, by way of two maps that take turns and that nobody else sees.
Prepared in_turn(std::vector<Prepared> kernels, int64_t even_bytes, int64_t odd_bytes) {
  return {
      [kernels = std::move(kernels), even_bytes, odd_bytes](const void* x, void* out, int threads) {
        const HeldMap even(even_bytes), odd(odd_bytes);
        const size_t last = kernels.size() - 1;
        for (size_t i = 0; i <= last; ++i) {
          void* const behind = i == last ? out : (i % 2 == 0 ? even : odd).data();
          kernels[i].run(x, behind, threads);
          x = behind;
        }
      }};
}

bool same_map(const TensorMemory& a, const TensorMemory& b) {
  return a.dims == b.dims && std::equal(a.shape, a.shape + a.dims, b.shape) &&
         std::equal(a.strides, a.strides + a.dims, b.strides) && a.dtype.code == b.dtype.code &&
         a.dtype.bits == b.dtype.bits;
}

// See _C.pyi.
py::object followed_by(const BoundCall& first, const py::tuple& calls, const py::list& places,
                       const py::list& sized) {
  std::vector<const BoundCall*> all{&first};
  for (const py::handle call : calls) {
    if (Py_TYPE(call.ptr()) != g_type) return py::none();
    all.push_back(reinterpret_cast<const BoundCall*>(call.ptr()));
  }
  State s = *first.state;
  std::vector<Prepared> kernels;
  int64_t most_bytes[] = {0, 0};  // of the maps behind kernels 0, 2, ... and 1, 3, ...
  py::list held;
  for (const BoundCall* const call : all) {
    const State& other = *call->state;
    if (call->held == nullptr) return py::none();
    held.append(py::handle(call->held));
    kernels.push_back(other.kernel);
    if (kernels.size() == 1) continue;
    if (!same_map(s.result, other.map)) return py::none();
    int64_t& most = most_bytes[kernels.size() % 2];
    most = std::max(most, s.result.bytes());
    s.result = other.result;
    s.conditions.add(other.conditions);
  }
  Conditions besides;
  besides.add_places(places);
  besides.add_sized(sized);
  s.conditions.add(besides);
  held.append(besides.values());
  s.kernel = in_turn(std::move(kernels), most_bytes[0], most_bytes[1]);
  return new_bound_call(std::move(s), py::make_tuple(held, py::tuple(places), py::tuple(sized)));
}

PyObject* call_followed_by(PyObject* self, PyObject* args) {
  try {
    const auto given = py::reinterpret_borrow<py::tuple>(args);
    if (given.size() != 3) throw std::invalid_argument("followed_by: takes calls, places, sized");
    return followed_by(*reinterpret_cast<BoundCall*>(self), given[0].cast<py::tuple>(),
                       given[1].cast<py::list>(), given[2].cast<py::list>())
        .release()
        .ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  return nullptr;
}

PyMemberDef kMembers[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(BoundCall, call), READONLY, nullptr}, {}};
PyMethodDef kMethods[] = {{"followed_by", call_followed_by, METH_VARARGS, nullptr}, {}};
PyType_Slot kSlots[] = {{Py_tp_traverse, reinterpret_cast<void*>(traverse)},
                        {Py_tp_clear, reinterpret_cast<void*>(clear)},
                        {Py_tp_dealloc, reinterpret_cast<void*>(dealloc)},
                        {Py_tp_call, reinterpret_cast<void*>(PyVectorcall_Call)},
                        {Py_tp_members, kMembers},
                        {Py_tp_methods, kMethods},
                        {0, nullptr}};
PyType_Spec kType = {"emo_kernels._C.BoundCall", sizeof(BoundCall), 0,
                     Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_HAVE_VECTORCALL, kSlots};

}  // namespace

void add_bound_call(py::module_& m) {
  g_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&kType));
  if (g_type == nullptr) throw py::error_already_set();
  py::class_<Prepared>(m, "Prepared")
      .def(py::init([] { return Prepared{[](const void*, void*, int) {}}; }))
      .def("__call__", [](const Prepared& kernel, uintptr_t x, uintptr_t out, int threads) {
        const py::gil_scoped_release unlocked;
        kernel.run(reinterpret_cast<const void*>(x), reinterpret_cast<void*>(out), threads);
      });
  m.def("bind_call", &bind_call, py::arg("kernel"), py::arg("api"), py::arg("x"),
        py::arg("map_strides"), py::arg("layout"), py::arg("shape"), py::arg("strides"),
        py::arg("places"), py::arg("sized"), py::arg("weights"), py::arg("flags"),
        py::arg("tools"));
}

}  // namespace emo_kernels::python
