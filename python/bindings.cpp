// All that makes csrc/ importable as emo_kernels._C, and nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "bound_call.h"
#include "cuda_bindings.h"
#include "emo_kernels.h"
#include "map_memory.h"
#include "new_map.h"
#include "watch.h"

namespace py = pybind11;
namespace cpu = emo_kernels::cpu;
namespace cuda = emo_kernels::cuda;
using emo_kernels::python::Prepared;

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

cpu::IrmbCall irmb_call(int dtype, int weight_dtype, const py::tuple& weights,
                        const py::tuple& counts, const py::tuple& sizes, const py::tuple& switches,
                        double norm_eps, double bn_eps) {
  constexpr size_t kParams = 19;
  const auto pointer = integers<kParams>("weights", weights);
  const auto count = integers<kParams>("counts", counts);
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
  return call;
}

template <class P>
void point(P*& target, int64_t address) {
  target = reinterpret_cast<P*>(static_cast<uintptr_t>(address));
}

// Fills the call's pointers, in the order given.
template <class... P>
void point_all(const py::tuple& addresses, P*&... targets) {
  const auto address = integers<sizeof...(P)>("pointers", addresses);
  size_t i = 0;
  (point(targets, address[i++]), ...);
}

template <class... I>
void size_all(const py::tuple& values, I&... targets) {
  const auto value = integers<sizeof...(I)>("sizes", values);
  size_t i = 0;
  ((targets = static_cast<I>(value[i++])), ...);
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
  const auto pointer = integers<6>("weights", weights);
  point_all(pointers, c.pivot, c.sums);
  size_all(sizes, c.N, c.C, c.H, c.W, c.O, c.K, c.stride, c.padding, c.dilation, c.channels_last,
           c.act, c.weight_channels_last);
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
  point_all(pointers, c.weight, c.bias, c.norm_weight, c.norm_bias);
  size_all(sizes, c.N, c.C, c.H, c.W, c.O);
  c.eps = eps;
  return prepared(c, cpu::norm_pool_linear);
}

// ---- one training step, operator by operator: pointers and sizes in the order of emo_kernels/cpu
// --

void pixels(int dtype, int op, const py::tuple& pointers, const py::tuple& sizes, int threads) {
  cpu::PixelsCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  c.op = static_cast<cpu::PixelsOp>(op);
  point_all(pointers, c.x, c.grad, c.residual, c.pivot, c.rows, c.means, c.out, c.sums);
  size_all(sizes, c.N, c.pixels, c.C);
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::pixels(c);
}

void batch_norm_activate(int dtype, int op, int act, const py::tuple& pointers,
                         const py::tuple& sizes, int threads) {
  cpu::PixelsCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  c.op = static_cast<cpu::PixelsOp>(op);
  c.act = static_cast<emo_kernels::Activation>(act);
  point_all(pointers, c.x, c.grad, c.rows, c.out, c.sums);
  size_all(sizes, c.N, c.pixels, c.C);
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::pixels(c);
}

void conv_norm_act_backward(int dtype, const py::tuple& pointers, const py::tuple& sizes,
                            int threads) {
  cpu::ConvNormActBackwardCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  point_all(pointers, c.grad, c.y, c.x, c.weight, c.norm, c.coefficients, c.dx, c.dweight);
  size_all(sizes, c.N, c.C, c.H, c.W, c.O, c.K, c.stride, c.padding, c.dilation, c.channels_last,
           c.act);
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::conv_norm_act_backward(c);
}

void batch_norm(int dtype, const py::tuple& pointers, int64_t channels, double count,
                double momentum, double eps) {
  cpu::BatchNormCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  point_all(pointers, c.sums, c.pivot, c.weight, c.bias, c.running_mean, c.running_var, c.affine,
            c.coefficients);
  c.C = channels;
  c.count = count;
  c.momentum = momentum;
  c.eps = eps;
  cpu::batch_norm(c);
}

void depthwise_conv2d(int dtype, const py::tuple& pointers, const py::tuple& sizes, int threads) {
  cpu::DepthwiseCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  point_all(pointers, c.x, c.weight, c.pivot, c.y, c.sums);
  size_all(sizes, c.N, c.C, c.H, c.W, c.K, c.stride, c.padding, c.dilation);
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::depthwise_conv2d(c);
}

void depthwise_conv2d_backward(int dtype, const py::tuple& pointers, const py::tuple& sizes,
                               int threads) {
  cpu::DepthwiseBackwardCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  point_all(pointers, c.grad, c.x, c.weight, c.y, c.coefficients, c.local_grad, c.dx, c.dweight);
  size_all(sizes, c.N, c.C, c.H, c.W, c.K, c.stride, c.padding, c.dilation);
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::depthwise_conv2d_backward(c);
}

void expand(int dtype, const py::tuple& pointers, const py::tuple& sizes, double eps, int threads) {
  cpu::ExpandCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  point_all(pointers, c.x, c.weight, c.bias, c.norm_weight, c.norm_bias, c.out, c.slope);
  size_all(sizes, c.N, c.pixels, c.C, c.M, c.norm, c.act);
  c.eps = eps;
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::expand(c);
}

void expand_backward(int dtype, const py::tuple& pointers, const py::tuple& sizes, double eps,
                     int threads) {
  cpu::ExpandBackwardCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  point_all(pointers, c.grad, c.x, c.weight, c.bias, c.norm_weight, c.norm_bias, c.mean, c.invstd,
            c.out_grad, c.out_weight, c.drop_scale, c.residual, c.norm_grad, c.slope, c.dx,
            c.dweight, c.dbias, c.sums);
  size_all(sizes, c.N, c.pixels, c.C, c.M, c.O, c.norm, c.act, c.behind_norm);
  c.eps = eps;
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::expand_backward(c);
}

void expand_depthwise_backward(int dtype, const py::tuple& pointers, const py::tuple& sizes,
                               double eps, int threads) {
  cpu::ExpandDepthwiseBackwardCall c;
  cpu::ExpandBackwardCall& e = c.expand;
  cpu::DepthwiseBackwardCall& d = c.depthwise;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  point_all(pointers, d.grad, d.weight, d.y, d.coefficients, d.local_grad, d.x, e.slope, e.x,
            e.weight, e.bias, e.norm_weight, e.norm_bias, e.mean, e.invstd, e.residual, e.dx,
            e.dweight, e.dbias, e.sums, d.dweight);
  size_all(sizes, c.N, d.H, d.W, e.C, e.M, d.K, d.stride, d.padding, d.dilation, e.norm, e.act,
           e.behind_norm);
  e.N = d.N = c.N;
  e.pixels = d.H * d.W;
  d.C = e.M;
  e.eps = eps;
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::expand_depthwise_backward(c);
}

void shrink(int dtype, const py::tuple& pointers, const py::tuple& sizes, int threads) {
  cpu::ShrinkCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  point_all(pointers, c.y, c.weight, c.scale, c.shift, c.local, c.residual, c.gate, c.drop_scale,
            c.pivot, c.out, c.sums);
  size_all(sizes, c.N, c.pixels, c.M, c.O);
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::shrink(c);
}

void shrink_backward(int dtype, const py::tuple& pointers, const py::tuple& sizes, int threads) {
  cpu::ShrinkBackwardCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  point_all(pointers, c.grad, c.y, c.weight, c.scale, c.shift, c.local, c.gate, c.drop_scale,
            c.mean, c.invstd, c.dy, c.dweight, c.dlocal, c.sums, c.dgate, c.ddrop);
  size_all(sizes, c.N, c.pixels, c.M, c.O, c.behind_norm);
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::shrink_backward(c);
}

void window_attention(int dtype, const py::tuple& pointers, const py::tuple& sizes, double eps,
                      int threads) {
  cpu::AttentionCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  point_all(pointers, c.x, c.qk_weight, c.qk_bias, c.v, c.v_padding, c.norm_weight, c.norm_bias,
            c.out);
  size_all(sizes, c.N, c.C, c.H, c.W, c.M, c.head_dim, c.window_size, c.windows, c.norm);
  c.eps = eps;
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::window_attention(c);
}

void window_attention_backward(int dtype, const py::tuple& pointers, const py::tuple& sizes,
                               double eps, int threads) {
  cpu::AttentionBackwardCall c;
  c.dtype = static_cast<emo_kernels::DType>(dtype);
  point_all(pointers, c.grad, c.x, c.qk_weight, c.qk_bias, c.v, c.v_padding, c.norm_weight,
            c.norm_bias, c.mean, c.invstd, c.residual, c.dx, c.dqk_weight, c.dv, c.dqk_bias,
            c.dv_padding, c.sums);
  size_all(sizes, c.N, c.C, c.H, c.W, c.M, c.head_dim, c.window_size, c.windows, c.norm,
           c.behind_norm);
  c.eps = eps;
  c.threads = threads;
  py::gil_scoped_release unlocked;
  cpu::window_attention_backward(c);
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
  m.def("pixels", &pixels);
  m.def("batch_norm_activate", &batch_norm_activate);
  m.def("conv_norm_act_backward", &conv_norm_act_backward);
  m.def("batch_norm", &batch_norm);
  m.def("depthwise_conv2d", &depthwise_conv2d);
  m.def("depthwise_conv2d_backward", &depthwise_conv2d_backward);
  m.def("expand", &expand);
  m.def("expand_backward", &expand_backward);
  m.def("expand_depthwise_backward", &expand_depthwise_backward);
  m.def("shrink", &shrink);
  m.def("shrink_backward", &shrink_backward);
  m.def("window_attention", &window_attention);
  m.def("window_attention_backward", &window_attention_backward);
  cuda::bind(m);
  emo_kernels::python::add_watch(m);
}
