#include "conditions.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

namespace py = pybind11;

namespace emo_kernels::python {
namespace {

// The objects of a model are cold when they are looked at: those of a stage of EMO-5M take 55 us, 7
// where they are warm and 31 where they were asked for some steps before. Not all at once: of many
// requests the processor drops all but two dozen.
constexpr size_t kAhead = 4;

void fetch(const void* at, int lines) {
  for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(at) + 64 * i);
}

void fetch_keys(PyObject* dict) { fetch(reinterpret_cast<PyDictObject*>(dict)->ma_keys, 4); }

void fetch(const Weight& weight) {
  fetch(weight.place.dict, 1);
  fetch(weight.place.expected, 2);
  fetch(weight.shape - 128, 4);
}

Place place_of(const py::handle& pair) {
  const auto dict = pair.cast<py::tuple>()[0], key = pair.cast<py::tuple>()[1];
  if (!PyDict_Check(dict.ptr())) throw std::invalid_argument("bind_call: a place is in no dict");
  Place place{dict.ptr(), key.ptr(), nullptr};
  place.expected = PyDict_GetItemWithError(place.dict, place.key);
  return place;
}

template <class Condition, class Key>
void add_new(std::vector<Condition>& all, const std::vector<Condition>& others, Key key) {
  const auto less = [&](const auto& a, const auto& b) { return key(a) < key(b); };
  const auto equal = [&](const auto& a, const auto& b) { return key(a) == key(b); };
  all.insert(all.end(), others.begin(), others.end());
  std::sort(all.begin(), all.end(), less);
  all.erase(std::unique(all.begin(), all.end(), equal), all.end());
}

}  // namespace

void Conditions::add_places(const py::list& pairs) {
  for (const py::handle pair : pairs) places_.push_back(place_of(pair));
}

void Conditions::add_sized(const py::list& dicts) {
  for (const py::handle dict : dicts) {
    if (!PyDict_Check(dict.ptr()))
      throw std::invalid_argument("bind_call: what is sized is no dict");
    lengths_.push_back({dict.ptr(), PyDict_GET_SIZE(dict.ptr())});
  }
}

void Conditions::add_weights(const dlpack::ExchangeApi& api, const py::list& pairs) {
  for (const py::handle pair : pairs) {
    const Place place = place_of(pair);
    if (place.expected == nullptr) throw std::invalid_argument("bind_call: a weight is missing");
    const TensorMemory memory = memory_of(api, place.expected);
    dlpack::Tensor found;
    if (api.look_at(place.expected, &found) != 0) throw py::error_already_set();
    weights_.push_back({place, memory, reinterpret_cast<const char*>(found.shape)});
  }
}

void Conditions::add_flags(const py::list& rows) {
  for (const py::handle row : rows) {
    const auto [function, argument, expected] =
        row.cast<std::tuple<py::object, py::object, py::object>>();
    flags_.push_back(
        {function.ptr(), argument.is_none() ? nullptr : argument.ptr(), expected.ptr()});
  }
}

void Conditions::add(const Conditions& other) {
  add_new(places_, other.places_,
          [](const Place& p) { return std::tie(p.dict, p.key, p.expected); });
  add_new(lengths_, other.lengths_, [](const Length& l) { return std::tie(l.dict, l.expected); });
  weights_.insert(weights_.end(), other.weights_.begin(), other.weights_.end());
}

bool Conditions::hold(const dlpack::ExchangeApi& api) const {
  for (const Length& length : lengths_) {
    if (!length.holds()) return false;
  }
  for (size_t i = 0; i < places_.size(); ++i) {
    if (i + 2 * kAhead < places_.size()) fetch(places_[i + 2 * kAhead].dict, 1);
    if (i + kAhead < places_.size()) fetch_keys(places_[i + kAhead].dict);
    if (!places_[i].holds()) return false;
  }
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (i + kAhead < weights_.size()) fetch(weights_[i + kAhead]);
    if (i + kAhead / 2 < weights_.size()) fetch_keys(weights_[i + kAhead / 2].place.dict);
    const Weight& weight = weights_[i];
    dlpack::Tensor found;
    if (!weight.place.holds() || !look_at(api, weight.place.expected, &found)) return false;
    if (found.data != weight.memory.data || !same_layout(found, weight.memory, true)) return false;
  }
  for (const Flag& flag : flags_) {
    if (!flag.holds()) return false;
  }
  return true;
}

py::list Conditions::values() const {
  py::list values;
  for (const Place& place : places_) {
    if (place.expected != nullptr) values.append(py::handle(place.expected));
  }
  for (const Weight& weight : weights_) values.append(py::handle(weight.place.expected));
  return values;
}

}  // namespace emo_kernels::python
