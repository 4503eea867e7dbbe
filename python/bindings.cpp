// All that makes csrc/ importable as emo_kernels._C, and nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of emo_kernels. Import torch first: it brings the OpenMP runtime.";
  m.def("build_info", &build_info);
  m.def("cuda_report", &cuda_report);
  m.def("compiled_isas", &cpu::compiled_isas);
  m.def("available_isas", &cpu::available_isas);
  m.def("selected_isa", &cpu::selected_isa);
  m.def("scratch_bytes", &cpu::scratch_bytes);
  m.def("release_scratch", &cpu::release_scratch);
}
