// All that makes csrc/ importable as emo_kernels._C, and nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "emo_kernels.h"

namespace py = pybind11;
namespace cpu = emo_kernels::cpu;
namespace cuda = emo_kernels::cuda;

namespace {

py::dict build_info() {
  py::dict info;
  const std::string why_not = EMO_CUDA_STATUS;
  info["version"] = EMO_VERSION;
  info["compiler"] = EMO_COMPILER;
  info["isas"] = cpu::compiled_isas();
  info["cuda"] = why_not.empty();
  info["cuda_reason"] = why_not.empty() ? py::object(py::none()) : py::object(py::str(why_not));
  info["cuda_architectures"] = EMO_CUDA_ARCHITECTURES;
  return info;
}

py::dict cuda_report() {
  cuda::DeviceReport report;
  {
    py::gil_scoped_release unlocked;
    report = cuda::device_report();
  }
  py::list devices;
  for (const cuda::Device& device : report.devices) {
    py::dict row;
    row["name"] = device.name;
    row["compute_capability"] = py::make_tuple(device.major, device.minor);
    row["multiprocessors"] = device.multiprocessors;
    row["memory_bytes"] = device.memory_bytes;
    devices.append(row);
  }
  py::dict result;
  result["compiled"] = report.compiled;
  result["runtime_version"] = report.runtime_version;
  result["driver_version"] = report.driver_version;
  result["error"] =
      report.error.empty() ? py::object(py::none()) : py::object(py::str(report.error));
  result["devices"] = devices;
  return result;
}

// Tuples of integers, in the order emo_kernels/cpu/irmb.py and csrc/emo_kernels.h give them.
template <size_t kCount>
std::array<int64_t, kCount> integers(const char* name, const py::tuple& values) {
  if (values.size() != kCount) {
    throw std::invalid_argument(std::string("irmb: ") + name + " must have " +
                                std::to_string(kCount) + " entries");
  }
  std::array<int64_t, kCount> result;
  for (size_t i = 0; i < kCount; ++i) {
    result[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(values.ptr(), static_cast<Py_ssize_t>(i)));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  return result;
}

void irmb(int dtype, uintptr_t x, uintptr_t out, const py::tuple& weights, const py::tuple& counts,
          const py::tuple& sizes, const py::tuple& switches, double norm_eps, double bn_eps,
          int threads) {
  constexpr size_t kParams = 19;
  const auto pointer = integers<kParams>("weights", weights);
  const auto count = integers<kParams>("counts", counts);
  cpu::IrmbCall call;
  call.dtype = static_cast<emo_kernels::DType>(dtype);
  call.x = reinterpret_cast<const void*>(x);
  call.out = reinterpret_cast<void*>(out);
  cpu::Param* const params[kParams] = {
      &call.norm_weight,    &call.norm_bias,        &call.norm_mean,      &call.norm_var,
      &call.qk_weight,      &call.qk_bias,          &call.v_weight,       &call.v_bias,
      &call.dw_weight,      &call.bn_weight,        &call.bn_bias,        &call.bn_mean,
      &call.bn_var,         &call.se_reduce_weight, &call.se_reduce_bias, &call.se_expand_weight,
      &call.se_expand_bias, &call.proj_weight,      &call.gamma};
  for (size_t i = 0; i < kParams; ++i) {
    *params[i] = {reinterpret_cast<const void*>(static_cast<uintptr_t>(pointer[i])), count[i]};
  }
  const auto size = integers<8>("sizes", sizes);
  call.N = size[0], call.C = size[1], call.H = size[2], call.W = size[3];
  call.M = size[4], call.O = size[5], call.K = size[6], call.R = size[7];
  const auto chosen = integers<10>("switches", switches);
  call.norm = static_cast<emo_kernels::Norm>(chosen[0]);
  call.act = static_cast<emo_kernels::Activation>(chosen[1]);
  call.stride = chosen[2], call.padding = chosen[3], call.dilation = chosen[4];
  call.skip = chosen[5] != 0;
  call.head_dim = chosen[6], call.window_size = chosen[7];
  call.windows = static_cast<emo_kernels::Windows>(chosen[8]);
  call.attention_first = chosen[9] != 0;
  call.norm_eps = norm_eps;
  call.bn_eps = bn_eps;
  call.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::irmb(call);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of emo_kernels. Import torch first: it brings the OpenMP runtime.";
  m.def("build_info", &build_info);
  m.def("cuda_report", &cuda_report);
  m.def("compiled_isas", &cpu::compiled_isas);
  m.def("available_isas", &cpu::available_isas);
  m.def("selected_isa", &cpu::selected_isa);
  m.def("scratch_bytes", &cpu::scratch_bytes);
  m.def("irmb", &irmb, py::arg("dtype"), py::arg("x"), py::arg("out"), py::arg("weights"),
        py::arg("counts"), py::arg("sizes"), py::arg("switches"), py::arg("norm_eps"),
        py::arg("bn_eps"), py::arg("threads"));
  m.def("release_scratch", &cpu::release_scratch);
}
