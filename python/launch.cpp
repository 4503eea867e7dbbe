// One training step, operator by operator: addresses and sizes in the order of emo_kernels/cpu.
#include "launch.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/convert.h"
#include "emo_kernels.h"
#include "integers.h"

namespace py = pybind11;
namespace cpu = emo_kernels::cpu;

namespace emo_kernels::python {
namespace {

template <class Call>
auto set_threads(Call& call, int threads, int) -> decltype(call.threads = threads, void()) {
  call.threads = threads;
}
template <class Call>
void set_threads(Call&, int, long) {}  // of one thread

template <class Call>
Call call_in(int dtype) {
  Call call;
  call.dtype = static_cast<DType>(dtype);
  return call;
}

template <class... P>
void take(void* const* addresses, P&... targets) {
  ((targets = static_cast<P>(*addresses++)), ...);
}

// `call` with the members named still open.
template <class Call, class... P>
Launch open_call(const Call& call, void (*run)(const Call&), P Call::*... places) {
  return {sizeof...(P), [=](void* const* addresses, int threads) {
            Call mine = call;
            take(addresses, mine.*places...);
            set_threads(mine, threads, 0);
            run(mine);
          }};
}

void run_launch(const Launch& launch, const py::tuple& addresses, int threads) {
  if (addresses.size() != launch.places) {
    throw std::invalid_argument("launch: expected " + std::to_string(launch.places) +
                                " addresses, got " + std::to_string(addresses.size()));
  }
  std::vector<void*> places(launch.places);
  for (size_t i = 0; i < launch.places; ++i) {
    places[i] = PyLong_AsVoidPtr(PyTuple_GET_ITEM(addresses.ptr(), static_cast<Py_ssize_t>(i)));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  const py::gil_scoped_release unlocked;
  launch.run(places.data(), threads);
}

Launch pixels(int dtype, int op, int act, const py::tuple& sizes) {
  using C = cpu::PixelsCall;
  C c = call_in<C>(dtype);
  c.op = static_cast<cpu::PixelsOp>(op);
  c.act = static_cast<Activation>(act);
  read_integers("pixels: sizes", sizes, c.N, c.pixels, c.C);
  return open_call(c, cpu::pixels, &C::x, &C::grad, &C::residual, &C::pivot, &C::rows, &C::means,
                   &C::out, &C::sums);
}

Launch batch_norm(int dtype, int64_t channels, double count, double momentum, double eps) {
  using C = cpu::BatchNormCall;
  C c = call_in<C>(dtype);
  c.C = channels;
  c.count = count;
  c.momentum = momentum;
  c.eps = eps;
  return open_call(c, cpu::batch_norm, &C::sums, &C::pivot, &C::weight, &C::bias, &C::running_mean,
                   &C::running_var, &C::affine, &C::coefficients);
}

Launch convert(int from_dtype, int dtype, int64_t count) {
  using C = cpu::ConvertCall;
  C c = call_in<C>(dtype);
  c.from_dtype = static_cast<DType>(from_dtype);
  c.count = count;
  return open_call(c, cpu::convert, &C::from, &C::to);
}

Launch conv_norm_act_backward(int dtype, const py::tuple& sizes) {
  using C = cpu::ConvNormActBackwardCall;
  C c = call_in<C>(dtype);
  read_integers("conv_norm_act_backward: sizes", sizes, c.N, c.C, c.H, c.W, c.O, c.K, c.stride,
                c.padding, c.dilation, c.channels_last, c.act);
  return open_call(c, cpu::conv_norm_act_backward, &C::grad, &C::y, &C::x, &C::weight, &C::norm,
                   &C::coefficients, &C::dx, &C::dweight);
}

Launch depthwise_conv2d(int dtype, const py::tuple& sizes) {
  using C = cpu::DepthwiseCall;
  C c = call_in<C>(dtype);
  read_integers("depthwise_conv2d: sizes", sizes, c.N, c.C, c.H, c.W, c.K, c.stride, c.padding,
                c.dilation);
  return open_call(c, cpu::depthwise_conv2d, &C::x, &C::weight, &C::pivot, &C::y, &C::sums);
}

Launch depthwise_conv2d_backward(int dtype, const py::tuple& sizes) {
  using C = cpu::DepthwiseBackwardCall;
  C c = call_in<C>(dtype);
  read_integers("depthwise_conv2d_backward: sizes", sizes, c.N, c.C, c.H, c.W, c.K, c.stride,
                c.padding, c.dilation);
  return open_call(c, cpu::depthwise_conv2d_backward, &C::grad, &C::x, &C::weight, &C::y,
                   &C::coefficients, &C::local_grad, &C::dx, &C::dweight);
}

Launch expand(int dtype, const py::tuple& sizes, double eps) {
  using C = cpu::ExpandCall;
  C c = call_in<C>(dtype);
  read_integers("expand: sizes", sizes, c.N, c.pixels, c.C, c.M, c.norm, c.act);
  c.eps = eps;
  return open_call(c, cpu::expand, &C::x, &C::weight, &C::bias, &C::norm_weight, &C::norm_bias,
                   &C::out);
}

Launch expand_backward(int dtype, const py::tuple& sizes, double eps) {
  using C = cpu::ExpandBackwardCall;
  C c = call_in<C>(dtype);
  read_integers("expand_backward: sizes", sizes, c.N, c.pixels, c.C, c.M, c.O, c.norm, c.act,
                c.behind_norm);
  c.eps = eps;
  return open_call(c, cpu::expand_backward, &C::grad, &C::x, &C::weight, &C::bias, &C::norm_weight,
                   &C::norm_bias, &C::mean, &C::invstd, &C::out_grad, &C::out_weight,
                   &C::drop_scale, &C::residual, &C::norm_grad, &C::dx, &C::dweight, &C::dbias,
                   &C::sums);
}

Launch expand_depthwise(int dtype, const py::tuple& sizes, double eps) {
  using C = cpu::ExpandDepthwiseCall;
  C c = call_in<C>(dtype);
  cpu::ExpandCall& e = c.expand;
  cpu::DepthwiseCall& d = c.depthwise;
  read_integers("expand_depthwise: sizes", sizes, c.N, d.H, d.W, e.C, e.M, d.K, d.stride, d.padding,
                d.dilation, e.norm, e.act);
  d.N = c.N;
  d.C = e.M;
  e.eps = eps;
  return {11, [c](void* const* addresses, int threads) {
            C mine = c;
            cpu::ExpandCall& e = mine.expand;
            cpu::DepthwiseCall& d = mine.depthwise;
            take(addresses, e.x, e.weight, e.bias, e.norm_weight, e.norm_bias, d.weight, d.pivot,
                 e.out, e.slope, d.y, d.sums);
            mine.threads = threads;
            cpu::expand_depthwise(mine);
          }};
}

Launch expand_depthwise_backward(int dtype, const py::tuple& sizes, double eps) {
  using C = cpu::ExpandDepthwiseBackwardCall;
  C c = call_in<C>(dtype);
  cpu::ExpandBackwardCall& e = c.expand;
  cpu::DepthwiseBackwardCall& d = c.depthwise;
  read_integers("expand_depthwise_backward: sizes", sizes, c.N, d.H, d.W, e.C, e.M, d.K, d.stride,
                d.padding, d.dilation, e.norm, e.act, e.behind_norm);
  e.N = d.N = c.N;
  e.pixels = d.H * d.W;
  d.C = e.M;
  e.eps = eps;
  return {20, [c](void* const* addresses, int threads) {
            C mine = c;
            cpu::ExpandBackwardCall& e = mine.expand;
            cpu::DepthwiseBackwardCall& d = mine.depthwise;
            take(addresses, d.grad, d.weight, d.y, d.coefficients, d.local_grad, d.x, e.slope, e.x,
                 e.weight, e.bias, e.norm_weight, e.norm_bias, e.mean, e.invstd, e.residual, e.dx,
                 e.dweight, e.dbias, e.sums, d.dweight);
            mine.threads = threads;
            cpu::expand_depthwise_backward(mine);
          }};
}

Launch shrink(int dtype, const py::tuple& sizes) {
  using C = cpu::ShrinkCall;
  C c = call_in<C>(dtype);
  read_integers("shrink: sizes", sizes, c.N, c.pixels, c.M, c.O);
  return open_call(c, cpu::shrink, &C::y, &C::weight, &C::scale, &C::shift, &C::local, &C::residual,
                   &C::gate, &C::drop_scale, &C::pivot, &C::out, &C::sums);
}

Launch shrink_backward(int dtype, const py::tuple& sizes) {
  using C = cpu::ShrinkBackwardCall;
  C c = call_in<C>(dtype);
  read_integers("shrink_backward: sizes", sizes, c.N, c.pixels, c.M, c.O, c.behind_norm);
  return open_call(c, cpu::shrink_backward, &C::grad, &C::y, &C::weight, &C::scale, &C::shift,
                   &C::local, &C::gate, &C::drop_scale, &C::mean, &C::invstd, &C::dy, &C::dweight,
                   &C::dlocal, &C::sums, &C::dgate, &C::ddrop);
}

Launch window_attention(int dtype, const py::tuple& sizes, double eps) {
  using C = cpu::AttentionCall;
  C c = call_in<C>(dtype);
  read_integers("window_attention: sizes", sizes, c.N, c.C, c.H, c.W, c.M, c.head_dim,
                c.window_size, c.windows, c.norm);
  c.eps = eps;
  return open_call(c, cpu::window_attention, &C::x, &C::qk_weight, &C::qk_bias, &C::v,
                   &C::v_padding, &C::norm_weight, &C::norm_bias, &C::out, &C::qk);
}

Launch window_attention_backward(int dtype, const py::tuple& sizes, double eps) {
  using C = cpu::AttentionBackwardCall;
  C c = call_in<C>(dtype);
  read_integers("window_attention_backward: sizes", sizes, c.N, c.C, c.H, c.W, c.M, c.head_dim,
                c.window_size, c.windows, c.norm, c.behind_norm);
  c.eps = eps;
  return open_call(c, cpu::window_attention_backward, &C::grad, &C::x, &C::qk_weight, &C::qk_bias,
                   &C::v, &C::v_padding, &C::norm_weight, &C::norm_bias, &C::mean, &C::invstd,
                   &C::residual, &C::qk, &C::dx, &C::dqk_weight, &C::dv, &C::dqk_bias,
                   &C::dv_padding, &C::sums);
}

}  // namespace

void add_launches(py::module_& m) {
  py::class_<Launch>(m, "Launch").def("__call__", &run_launch);
  m.def("pixels", &pixels);
  m.def("batch_norm", &batch_norm);
  m.def("convert", &convert);
  m.def("conv_norm_act_backward", &conv_norm_act_backward);
  m.def("depthwise_conv2d", &depthwise_conv2d);
  m.def("depthwise_conv2d_backward", &depthwise_conv2d_backward);
  m.def("expand", &expand);
  m.def("expand_backward", &expand_backward);
  m.def("expand_depthwise", &expand_depthwise);
  m.def("expand_depthwise_backward", &expand_depthwise_backward);
  m.def("shrink", &shrink);
  m.def("shrink_backward", &shrink_backward);
  m.def("window_attention", &window_attention);
  m.def("window_attention_backward", &window_attention_backward);
}

}  // namespace emo_kernels::python
