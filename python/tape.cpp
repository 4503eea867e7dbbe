// A tape knows the layouts of the tensors that a pass was given, and for every launch of it whose
// memory its addresses were in: a given tensor's, a result's or that of a map between two launches.
// Run on other tensors of those layouts, it makes new results, gives the maps between from their
// first launch to their last, and launches. Nothing of it depends on what the tensors hold.
#include "tape.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"
#include "map_memory.h"
#include "new_map.h"
#include "tensor_memory.h"

namespace py = pybind11;

namespace emo_kernels::python {
namespace {

using Place = std::pair<int64_t, int64_t>;  // (slot, bytes from its start); slot -1: null

class Tape {
 public:
  // See _C.pyi for the arguments. Slots count the inputs, then the results, then the maps between.
  Tape(py::object api, const py::tuple& inputs, const py::tuple& results,
       const std::vector<int64_t>& between, const std::vector<int64_t>& outputs,
       const std::vector<std::pair<Launch, std::vector<Place>>>& launches)
      : api_object_(std::move(api)), api_(*exchange_api(api_object_)), outputs_(outputs) {
    for (const py::handle tensor : inputs) {
      inputs_.emplace_back();
      if (!tensor.is_none()) inputs_.back() = memory_of(api_, tensor.ptr());
    }
    for (const py::handle tensor : results) results_.push_back(memory_of(api_, tensor.ptr()));
    for (const int64_t bytes : between) between_.push_back({bytes, launches.size(), 0});
    for (const auto& [launch, places] : launches) add(launch, places);
  }

  // The outputs, or None, and then nothing has happened, where an input has another layout.
  py::object run(const py::tuple& inputs, int threads) const {
    std::vector<char*> slots(inputs_.size() + results_.size() + between_.size());
    if (!look_at(inputs, slots)) return py::none();
    std::vector<Result> results;
    for (size_t i = 0; i < results_.size(); ++i) {
      const TensorMemory& m = results_[i];
      results.emplace_back(new_result(m.dims, m.shape, m.strides, m.dtype));
      slots[inputs_.size() + i] = static_cast<char*>(results.back()->tensor.data);
    }
    {
      const py::gil_scoped_release unlocked;
      launch_all(slots, threads);
    }
    return imported(results);
  }

 private:
  struct Release {
    void operator()(dlpack::ManagedTensor* result) const { release_result(result); }
  };
  using Result = std::unique_ptr<dlpack::ManagedTensor, Release>;

  struct Between {
    int64_t bytes;
    size_t first, last;  // launches
  };
  struct Step {
    Launch launch;
    std::vector<Place> places;
  };

  void add(const Launch& launch, const std::vector<Place>& places) {
    const auto slots = static_cast<int64_t>(inputs_.size() + results_.size() + between_.size());
    if (places.size() != launch.places) {
      throw std::invalid_argument("tape: a launch takes " + std::to_string(launch.places) +
                                  " addresses, got " + std::to_string(places.size()));
    }
    for (const auto& [slot, offset] : places) {
      if (slot < -1 || slot >= slots || offset < 0)
        throw std::invalid_argument("tape: no such slot");
      const int64_t at = slot - static_cast<int64_t>(inputs_.size() + results_.size());
      if (at < 0) continue;
      Between& map = between_[static_cast<size_t>(at)];
      map.first = std::min(map.first, steps_.size());
      map.last = steps_.size();
    }
    steps_.push_back({launch, places});
  }

  bool look_at(const py::tuple& inputs, std::vector<char*>& slots) const {
    if (inputs.size() != inputs_.size()) return false;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      PyObject* const tensor = PyTuple_GET_ITEM(inputs.ptr(), static_cast<Py_ssize_t>(i));
      if ((tensor == Py_None) == inputs_[i].has_value()) return false;
      if (tensor == Py_None) continue;
      dlpack::Tensor found;
      if (api_.look_at(tensor, &found) != 0) {
        PyErr_Clear();
        return false;
      }
      if (!same_layout(found, *inputs_[i], true)) return false;
      slots[i] = static_cast<char*>(found.data);
    }
    return true;
  }

  void launch_all(std::vector<char*>& slots, int threads) const {
    std::vector<std::optional<HeldMap>> held(between_.size());
    std::vector<void*> addresses;
    for (size_t at = 0; at < steps_.size(); ++at) {
      for (size_t i = 0; i < between_.size(); ++i) {
        if (between_[i].first != at) continue;
        held[i].emplace(between_[i].bytes);
        slots[inputs_.size() + results_.size() + i] = static_cast<char*>(held[i]->data());
      }
      addresses.clear();
      for (const auto& [slot, offset] : steps_[at].places) {
        addresses.push_back(slot < 0 ? nullptr : slots[static_cast<size_t>(slot)] + offset);
      }
      steps_[at].launch.run(addresses.data(), threads);
      for (size_t i = 0; i < between_.size(); ++i) {
        if (between_[i].last == at) held[i].reset();
      }
    }
  }

  py::object imported(std::vector<Result>& results) const {
    py::list tensors;
    for (Result& result : results) {
      void* tensor = nullptr;
      if (api_.import_tensor(result.get(), &tensor) != 0) throw py::error_already_set();
      (void)result.release();
      tensors.append(py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor)));
    }
    py::tuple outputs(outputs_.size());
    for (size_t i = 0; i < outputs_.size(); ++i) {
      outputs[i] = outputs_[i] < 0 ? py::object(py::none())
                                   : py::object(tensors[static_cast<size_t>(outputs_[i])]);
    }
    return std::move(outputs);
  }

  py::object api_object_;
  const dlpack::ExchangeApi& api_;
  std::vector<std::optional<TensorMemory>> inputs_;  // none: no tensor
  std::vector<TensorMemory> results_;
  std::vector<Between> between_;
  std::vector<int64_t> outputs_;  // of them results; -1: None
  std::vector<Step> steps_;
};

}  // namespace

void add_tape(py::module_& m) {
  py::class_<Tape>(m, "Tape")
      .def(py::init<py::object, const py::tuple&, const py::tuple&, const std::vector<int64_t>&,
                    const std::vector<int64_t>&,
                    const std::vector<std::pair<Launch, std::vector<Place>>>&>(),
           py::arg("api"), py::arg("inputs"), py::arg("results"), py::arg("between"),
           py::arg("outputs"), py::arg("launches"))
      .def("__call__", &Tape::run);
}

}  // namespace emo_kernels::python
