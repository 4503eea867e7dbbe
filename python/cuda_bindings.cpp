// The CUDA kernels and their walk on the host, as emo_kernels/cuda calls them.
#include "cuda_bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "emo_kernels_cuda.h"

namespace py = pybind11;

namespace emo_kernels::cuda {
namespace {

template <class P>
void point(P*& target, const py::handle& address) {
  target = reinterpret_cast<P*>(address.cast<uintptr_t>());
}

void point(Vector& target, const py::handle& pair) {
  const auto both = pair.cast<std::pair<uintptr_t, int>>();
  target = {reinterpret_cast<const void*>(both.first), static_cast<DType>(both.second)};
}

// Fills what a call points at, and its sizes, in the order given.
template <class... Ps>
void point_all(const py::tuple& pointers, Ps&... targets) {
  if (pointers.size() != sizeof...(Ps)) throw std::invalid_argument("wrong number of pointers");
  size_t i = 0;
  (point(targets, pointers[i++]), ...);
}

void size_all(const py::tuple& sizes, std::initializer_list<int64_t*> targets) {
  if (sizes.size() != targets.size()) throw std::invalid_argument("wrong number of sizes");
  size_t i = 0;
  for (int64_t* const target : targets) *target = sizes[i++].cast<int64_t>();
}

template <class Call>
void convolution_sizes(const py::tuple& sizes, Call& call) {
  size_all(sizes, {&call.N, &call.C, &call.H, &call.W, &call.K, &call.stride, &call.padding,
                   &call.dilation});
}

DepthwiseCall forward_call(int dtype, const py::tuple& pointers, const py::tuple& sizes) {
  DepthwiseCall call;
  call.dtype = static_cast<DType>(dtype);
  point_all(pointers, call.x, call.weight, call.pivot, call.y, call.sums);
  convolution_sizes(sizes, call);
  return call;
}

DepthwiseBackwardCall backward_call(int dtype, const py::tuple& pointers, const py::tuple& sizes) {
  DepthwiseBackwardCall call;
  call.dtype = static_cast<DType>(dtype);
  point_all(pointers, call.grad, call.x, call.weight, call.y, call.coefficients, call.local_grad,
            call.dx, call.dweight);
  convolution_sizes(sizes, call);
  return call;
}

ExpandDepthwiseCall expand_depthwise_sizes(int dtype, const py::tuple& sizes) {
  ExpandDepthwiseCall call;
  call.dtype = static_cast<DType>(dtype);
  int64_t act = 0, norm = 0, eps_bits = 0;
  size_all(sizes, {&call.N, &call.C, &call.M, &call.H, &call.W, &call.K, &call.stride,
                   &call.padding, &act, &norm, &eps_bits});
  call.act = static_cast<Activation>(act), call.norm = static_cast<Norm>(norm);
  const auto bits = static_cast<uint32_t>(eps_bits);
  std::memcpy(&call.norm_eps, &bits, sizeof(bits));
  return call;
}

ExpandDepthwiseCall expand_depthwise_call(int dtype, const py::tuple& pointers,
                                          const py::tuple& sizes) {
  ExpandDepthwiseCall call = expand_depthwise_sizes(dtype, sizes);
  point_all(pointers, call.x, call.norm_weight, call.norm_bias, call.weight, call.bias,
            call.filters, call.pivot, call.y, call.sums);
  return call;
}

// The two eps last.
IRMBCall irmb_sizes(int dtype, const py::tuple& sizes) {
  IRMBCall call;
  call.dtype = static_cast<DType>(dtype);
  if (sizes.size() != 22) throw std::invalid_argument("wrong number of sizes");
  int64_t windows = 0, norm = 0, act = 0, expands = 0, skip = 0, attend = 0;
  size_all(py::tuple(sizes[py::slice(0, 20, 1)]),
           {&call.N,           &call.C,       &call.H,        &call.W,
            &call.M,           &call.O,       &call.K,        &call.R,
            &call.stride,      &call.padding, &call.dilation, &call.head_dim,
            &call.window_size, &windows,      &norm,          &act,
            &expands,          &skip,         &attend,        &call.shared_limit});
  call.windows = static_cast<Windows>(windows);
  call.norm = static_cast<Norm>(norm);
  call.act = static_cast<Activation>(act);
  call.attend = static_cast<Attend>(attend);
  call.expands = expands != 0, call.skip = skip != 0;
  call.norm_eps = sizes[20].cast<float>();
  call.bn_eps = sizes[21].cast<float>();
  return call;
}

IRMBCall irmb_call(int dtype, const py::tuple& pointers, const py::tuple& sizes) {
  IRMBCall call = irmb_sizes(dtype, sizes);
  point_all(pointers, call.x, call.out, call.norm_weight, call.norm_bias, call.norm_mean,
            call.norm_var, call.qk_weight, call.qk_bias, call.v_weight, call.v_bias, call.dw_weight,
            call.bn_weight, call.bn_bias, call.bn_mean, call.bn_var, call.se_reduce_weight,
            call.se_reduce_bias, call.se_expand_weight, call.se_expand_bias, call.proj_weight,
            call.gamma);
  return call;
}

// Three functions of an operator: the scratch it needs, its launch, its walk.
template <class Call>
void define(py::module_& m, const std::string& name,
            Call (*make)(int, const py::tuple&, const py::tuple&), void (*launch)(const Call&),
            void (*walk)(const Call&)) {
  m.def(("cuda_" + name + "_scratch").c_str(),
        [=](int dtype, const py::tuple& pointers, const py::tuple& sizes) {
          return scratch_bytes(make(dtype, pointers, sizes));
        });
  m.def(("cuda_" + name).c_str(), [=](int dtype, const py::tuple& pointers, const py::tuple& sizes,
                                      uintptr_t scratch, int device, uintptr_t stream) {
    Call call = make(dtype, pointers, sizes);
    call.target = {device, reinterpret_cast<void*>(stream), reinterpret_cast<void*>(scratch)};
    py::gil_scoped_release unlocked;
    launch(call);
  });
  m.def(("cuda_" + name + "_walk").c_str(),
        [=](int dtype, const py::tuple& pointers, const py::tuple& sizes, uintptr_t scratch) {
          Call call = make(dtype, pointers, sizes);
          call.target.scratch = reinterpret_cast<void*>(scratch);
          py::gil_scoped_release unlocked;
          walk(call);
        });
}

}  // namespace

void bind(py::module_& m) {
  m.def("cuda_sources", [] { return EMO_CUDA_SOURCES; });
  define(m, "depthwise_conv2d", &forward_call, &launch_depthwise_conv2d, &walk_depthwise_conv2d);
  define(m, "depthwise_conv2d_backward", &backward_call, &launch_depthwise_conv2d_backward,
         &walk_depthwise_conv2d_backward);
  define(m, "expand_depthwise", &expand_depthwise_call, &launch_expand_depthwise,
         &walk_expand_depthwise);
  m.def("cuda_expand_depthwise_shared_bytes", [](int dtype, const py::tuple& sizes) {
    return shared_bytes(expand_depthwise_sizes(dtype, sizes));
  });
  define(m, "irmb", &irmb_call, &launch_irmb, &walk_irmb);
  m.def("cuda_irmb_report", [](int dtype, const py::tuple& sizes) {
    const IRMBReport found = report(irmb_sizes(dtype, sizes));
    py::dict row;
    row["block"] = found.block, row["attention"] = found.attention;
    row["excite"] = found.excite, row["image"] = found.image;
    row["inside"] = found.inside;
    row["time_inside"] = found.time_inside, row["time_apart"] = found.time_apart;
    row["kernels"] = found.kernels;
    return row;
  });
}

}  // namespace emo_kernels::cuda
