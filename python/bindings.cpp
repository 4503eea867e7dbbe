// All that makes csrc/ importable as emo_kernels._C, and nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bound_call.h"
#include "cuda_bindings.h"
#include "emo_kernels.h"
#include "integers.h"
#include "launch.h"
#include "map_memory.h"
#include "new_map.h"
#include "tape.h"
#include "watch.h"

namespace py = pybind11;
namespace cpu = emo_kernels::cpu;
namespace cuda = emo_kernels::cuda;
using emo_kernels::python::integers;
using emo_kernels::python::Prepared;
using emo_kernels::python::read_addresses;
using emo_kernels::python::read_integers;

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

cpu::IrmbCall irmb_call(int dtype, int weight_dtype, const py::tuple& weights,
                        const py::tuple& counts, const py::tuple& sizes, const py::tuple& switches,
                        double norm_eps, double bn_eps) {
  constexpr size_t kParams = 19;
  const auto pointer = integers<kParams>("irmb: weights", weights);
  const auto count = integers<kParams>("irmb: counts", counts);
  cpu::IrmbCall call;
  call.dtype = static_cast<emo_kernels::DType>(dtype);
  cpu::Param* const params[kParams] = {
      &call.norm_weight,    &call.norm_bias,        &call.norm_mean,      &call.norm_var,
      &call.qk_weight,      &call.qk_bias,          &call.v_weight,       &call.v_bias,
      &call.dw_weight,      &call.bn_weight,        &call.bn_bias,        &call.bn_mean,
      &call.bn_var,         &call.se_reduce_weight, &call.se_reduce_bias, &call.se_expand_weight,
      &call.se_expand_bias, &call.proj_weight,      &call.gamma};
  for (size_t i = 0; i < kParams; ++i) {
    *params[i] = {reinterpret_cast<const void*>(static_cast<uintptr_t>(pointer[i])), count[i],
                  static_cast<emo_kernels::DType>(weight_dtype)};
  }
  const auto size = integers<8>("irmb: sizes", sizes);
  call.N = size[0], call.C = size[1], call.H = size[2], call.W = size[3];
  call.M = size[4], call.O = size[5], call.K = size[6], call.R = size[7];
  const auto chosen = integers<10>("irmb: switches", switches);
  call.norm = static_cast<emo_kernels::Norm>(chosen[0]);
  call.act = static_cast<emo_kernels::Activation>(chosen[1]);
  call.stride = chosen[2], call.padding = chosen[3], call.dilation = chosen[4];
  call.skip = chosen[5] != 0;
  call.head_dim = chosen[6], call.window_size = chosen[7];
  call.windows = static_cast<emo_kernels::Windows>(chosen[8]);
  call.attention_first = chosen[9] != 0;
  call.norm_eps = norm_eps;
  call.bn_eps = bn_eps;
  return call;
}

// A launch of `call` whose map, result and threads are still open.
template <class Call>
Prepared prepared(Call call, void (*launch)(const Call&)) {
  return {[call, launch](const void* x, void* out, int threads) {
    Call mine = call;  // two threads may run this at once
    mine.x = x;
    mine.out = out;
    mine.threads = threads;
    launch(mine);
  }};
}

Prepared prepare_irmb(int dtype, int weight_dtype, const py::tuple& weights,
                      const py::tuple& counts, const py::tuple& sizes, const py::tuple& switches,
                      double norm_eps, double bn_eps) {
  return prepared(
      irmb_call(dtype, weight_dtype, weights, counts, sizes, switches, norm_eps, bn_eps),
      cpu::irmb);
}

Prepared prepare_conv_norm_act(int dtype, int weight_dtype, const py::tuple& weights,
                               const py::tuple& pointers, const py::tuple& sizes, double eps) {
  cpu::ConvNormActCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  cpu::Param* const params[] = {&c.weight,    &c.bias,      &c.norm_weight,
                                &c.norm_bias, &c.norm_mean, &c.norm_var};
  const auto pointer = integers<6>("conv_norm_act: weights", weights);
  read_addresses("conv_norm_act: pointers", pointers, c.pivot, c.sums);
  read_integers("conv_norm_act: sizes", sizes, c.N, c.C, c.H, c.W, c.O, c.K, c.stride, c.padding,
                c.dilation, c.channels_last, c.act, c.weight_channels_last);
  for (size_t i = 0; i < 6; ++i) {
    *params[i] = {reinterpret_cast<const void*>(static_cast<uintptr_t>(pointer[i])),
                  i == 0 ? c.O * c.C * c.K * c.K : c.O,
                  static_cast<emo_kernels::DType>(weight_dtype)};
  }
  c.eps = eps;
  return prepared(c, cpu::conv_norm_act);
}

Prepared prepare_norm_pool_linear(int dtype, const py::tuple& pointers, const py::tuple& sizes,
                                  double eps) {
  cpu::NormPoolLinearCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  read_addresses("norm_pool_linear: pointers", pointers, c.weight, c.bias, c.norm_weight,
                 c.norm_bias);
  read_integers("norm_pool_linear: sizes", sizes, c.N, c.C, c.H, c.W, c.O);
  c.eps = eps;
  return prepared(c, cpu::norm_pool_linear);
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
  emo_kernels::python::add_bound_call(m);
  emo_kernels::python::add_new_map(m);
  m.def("prepare_irmb", &prepare_irmb, py::arg("dtype"), py::arg("weight_dtype"),
        py::arg("weights"), py::arg("counts"), py::arg("sizes"), py::arg("switches"),
        py::arg("norm_eps"), py::arg("bn_eps"));
  m.def("prepare_conv_norm_act", &prepare_conv_norm_act);
  m.def("prepare_norm_pool_linear", &prepare_norm_pool_linear);
  m.def("release_scratch", [] {
    cpu::release_scratch();
    emo_kernels::python::map_memory().clear();
  });
  emo_kernels::python::add_launches(m);
  emo_kernels::python::add_tape(m);
  cuda::bind(m);
  emo_kernels::python::add_watch(m);
}
