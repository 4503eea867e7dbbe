// From a call to the kernels that run it: the same on a GPU and in the walk on the host.
//
// A Launcher has launch<Program>(args, grid, name), which runs a program on every thread of a grid.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/depthwise_general.h"
#include "cuda/sum_partials.h"

namespace emo_kernels::cuda {

inline Grid grid_of(const Plan& plan, int roles = 1) {
  return {plan.blocks(), plan.groups, plan.slots, roles};
}

template <class T>
constexpr const char* kTypeName = sizeof(T) == 4 ? "fp32" : "fp16";
template <>
inline constexpr const char* kTypeName<BFloat16> = "bf16";

template <class T>
std::string kernel_name(const char* stem, int K, int S) {
  return std::string(stem) + "<" + kTypeName<T> + ", K = " + std::to_string(K) +
         ", S = " + std::to_string(S) + ">";
}

// Columns of a thread, by what its registers hold.
template <int K, int S>
constexpr int kForwardStrip = K == 3 && S == 1 ? 4 : 2;
template <int K, int S>
constexpr int kBackwardStrip = K == 3 && S == 1   ? 4
                               : K == 5 && S == 2 ? 1
                                                  : 2;

template <class Call>
Geometry geometry(const Call& call, const char* name) {
  const int64_t sizes[] = {call.C,      call.H,       call.W,       call.K,
                           call.stride, call.padding, call.dilation};
  const int64_t reach = call.dilation * (call.K - 1) + 1;
  for (const int64_t size : sizes) {
    if (size < 0 || size >= int64_t{1} << 24) {
      throw std::invalid_argument(std::string(name) + ": sizes must be below 2^24, got " +
                                  std::to_string(size));
    }
  }
  const int64_t HO = (call.H + 2 * call.padding - reach) / call.stride + 1;
  const int64_t WO = (call.W + 2 * call.padding - reach) / call.stride + 1;
  if (call.N < 1 || call.C < 1 || HO < 1 || WO < 1) {
    throw std::invalid_argument(std::string(name) + ": nothing to compute");
  }
  Geometry g;
  g.N = call.N;
  g.C = static_cast<int>(call.C), g.H = static_cast<int>(call.H), g.W = static_cast<int>(call.W);
  g.HO = static_cast<int>(HO), g.WO = static_cast<int>(WO), g.K = static_cast<int>(call.K);
  g.S = static_cast<int>(call.stride), g.P = static_cast<int>(call.padding);
  g.D = static_cast<int>(call.dilation);
  return g;
}

// Whether two channels can be read and written at once in all these maps.
template <class T>
bool in_pairs(int C, std::initializer_list<const void*> maps) {
  bool aligned = C % 2 == 0;
  for (const void* map : maps) {
    aligned &= reinterpret_cast<uintptr_t>(map) % sizeof(Pair<T>) == 0;
  }
  return aligned;
}

template <class Partial, class Launcher>
void sum_partials(const SumArgs<Partial>& args, Launcher& launcher) {
  using Program = SumPartials<Partial>;
  const Grid grid{ceil_div(args.taps * args.C, Program::kColumns), Program::kColumns,
                  Program::kSlots, 1};
  launcher.template launch<Program>(args, grid, "sum_partials_kernel");
}

// ---- forward ------------------------------------------------------------------------------------

template <class Program, class T, class Launcher>
int64_t launch_forward(ForwardArgs<T> args, const DepthwiseCall& call, const Task& task,
                       const std::string& name, Launcher& launcher) {
  args.plan = make_plan(task);
  args.partials = call.sums == nullptr ? nullptr : static_cast<double*>(call.target.scratch);
  launcher.template launch<Program>(args, grid_of(args.plan), name);
  if (call.sums == nullptr) return 0;
  const SumArgs<double> sums{args.partials, args.plan.programs, 1,
                             2 * call.C,    call.sums,          DType::kFloat64};
  sum_partials(sums, launcher);
  return args.plan.programs * 2 * call.C * int64_t{sizeof(double)};
}

template <class T, int K, int S, class Launcher>
int64_t forward_of(const ForwardArgs<T>& args, const DepthwiseCall& call, Launcher& launcher) {
  const Geometry& g = args.g;
  constexpr int kStrip = kForwardStrip<K, S>;
  const Task task{g.N,
                  g.C,
                  2,
                  kThreads,
                  1,
                  g.D,
                  static_cast<int>(ceil_div(g.HO, g.D)),
                  static_cast<int>(ceil_div(g.WO, g.D)),
                  kStrip,
                  kUnfinished<K, S> - 1,
                  kBlocks};
  const std::string name = kernel_name<T>("depthwise_conv2d_fwd_kernel", K, S);
  return launch_forward<Forward<T, K, S, kStrip>>(args, call, task, name, launcher);
}

template <class T, class Launcher>
int64_t forward_in(const DepthwiseCall& call, Launcher& launcher) {
  const Geometry g = geometry(call, "depthwise_conv2d");
  const ForwardArgs<T> args{
      g,          {},     static_cast<const T*>(call.x), static_cast<T*>(call.y), call.weight,
      call.pivot, nullptr};
  if (in_pairs<T>(g.C, {call.x, call.y})) {
    if (g.K == 3 && g.S == 1) return forward_of<T, 3, 1>(args, call, launcher);
    if (g.K == 3 && g.S == 2) return forward_of<T, 3, 2>(args, call, launcher);
    if (g.K == 5 && g.S == 1) return forward_of<T, 5, 1>(args, call, launcher);
    if (g.K == 5 && g.S == 2) return forward_of<T, 5, 2>(args, call, launcher);
  }
  const Task task{g.N, g.C, 1, kThreads, 1, 1, g.HO, g.WO, 1, 0, kBlocks};
  const std::string name = kernel_name<T>("depthwise_conv2d_general_fwd_kernel", g.K, g.S);
  return launch_forward<GeneralForward<T>>(args, call, task, name, launcher);
}

// Runs the call; returns the bytes of scratch that it uses.
template <class Launcher>
int64_t dispatch(const DepthwiseCall& call, Launcher& launcher) {
  switch (call.dtype) {
    case DType::kFloat32:
      return forward_in<float>(call, launcher);
    case kFloat16:
      return forward_in<Half>(call, launcher);
    case DType::kBFloat16:
      return forward_in<BFloat16>(call, launcher);
    default:
      throw std::invalid_argument("depthwise_conv2d: maps must be fp32, fp16 or bf16");
  }
}

// ---- backward -----------------------------------------------------------------------------------

// Launches a program that may leave partial sums of the filters' gradient, and adds those up.
template <class Program, class T, class Launcher>
int64_t launch_backward(BackwardArgs<T> args, const DepthwiseBackwardCall& call, const Task& task,
                        const std::string& name, Launcher& launcher) {
  const bool filters = args.first_role + args.roles > kFilterGradient;
  args.plan = make_plan(task);
  args.partials = filters ? static_cast<float*>(call.target.scratch) : nullptr;
  launcher.template launch<Program>(args, grid_of(args.plan, args.roles), name);
  if (!filters) return 0;
  const SumArgs<float> sums{args.partials, args.plan.programs, call.K * call.K,
                            call.C,        call.dweight,       call.weight.dtype};
  sum_partials(sums, launcher);
  return args.plan.programs * call.K * call.K * call.C * int64_t{sizeof(float)};
}

template <class T, int K, int S, class Launcher>
int64_t backward_of(BackwardArgs<T> args, const DepthwiseBackwardCall& call, Launcher& launcher) {
  const Geometry& g = args.g;
  constexpr int kStrip = kBackwardStrip<K, S>, kLead = kUnfinished<K, S> - 1;
  args.rows = extent(S, g.P, g.D, kLead, g.H, g.HO);
  args.cols = extent(S, g.P, g.D, kLead, g.W, g.WO);
  using Program = Backward<T, K, S, kStrip>;
  const Task task{g.N,
                  g.C,
                  2,
                  Program::kBlockThreads,
                  args.roles,
                  g.D,
                  args.rows.length,
                  args.cols.length,
                  kStrip,
                  kLead,
                  kPartialBlocks};
  const std::string name = kernel_name<T>("depthwise_conv2d_bwd_kernel", K, S);
  return launch_backward<Program>(args, call, task, name, launcher);
}

// One gradient after the other.
template <class T, class Launcher>
int64_t general_backward(BackwardArgs<T> args, const DepthwiseBackwardCall& call,
                         Launcher& launcher) {
  const Geometry& g = args.g;
  args.roles = 1;
  if (call.dx != nullptr) {
    args.first_role = kInputGradient;
    const Task task{g.N, g.C, 1, kThreads, 1, 1, g.H, g.W, 1, 0, kBlocks};
    const std::string name = kernel_name<T>("depthwise_conv2d_general_bwd_input_kernel", g.K, g.S);
    launch_backward<GeneralInputGradient<T>>(args, call, task, name, launcher);
  }
  if (call.dweight == nullptr) return 0;
  args.first_role = kFilterGradient;
  const Task task{g.N, g.C, 1, kThreads, 1, 1, g.HO, g.WO, 1, 0, kPartialBlocks};
  const std::string name = kernel_name<T>("depthwise_conv2d_general_bwd_weight_kernel", g.K, g.S);
  return launch_backward<GeneralFilterGradient<T>>(args, call, task, name, launcher);
}

template <class T, class Launcher>
int64_t backward_in(const DepthwiseBackwardCall& call, Launcher& launcher) {
  const Geometry g = geometry(call, "depthwise_conv2d_backward");
  if (call.dx == nullptr && call.dweight == nullptr) {
    throw std::invalid_argument("depthwise_conv2d_backward: no gradient is asked for");
  }
  const auto map = [](const void* data) { return static_cast<const T*>(data); };
  BackwardArgs<T> args{};
  args.g = g;
  args.grad = map(call.grad), args.y = map(call.y), args.x = map(call.x);
  args.local_grad = map(call.local_grad), args.dx = static_cast<T*>(call.dx);
  args.weight = call.weight, args.coefficients = call.coefficients;
  args.first_role = call.dx != nullptr ? kInputGradient : kFilterGradient;
  args.roles = call.dx != nullptr && call.dweight != nullptr ? 2 : 1;
  const bool aligned = in_pairs<T>(g.C, {call.grad, call.y, call.x, call.local_grad, call.dx});
  if (aligned && (g.S == 1 || g.D == 1)) {
    if (g.K == 3 && g.S == 1) return backward_of<T, 3, 1>(args, call, launcher);
    if (g.K == 3 && g.S == 2) return backward_of<T, 3, 2>(args, call, launcher);
    if (g.K == 5 && g.S == 1) return backward_of<T, 5, 1>(args, call, launcher);
    if (g.K == 5 && g.S == 2) return backward_of<T, 5, 2>(args, call, launcher);
  }
  return general_backward<T>(args, call, launcher);
}

// As above.
template <class Launcher>
int64_t dispatch(const DepthwiseBackwardCall& call, Launcher& launcher) {
  switch (call.dtype) {
    case DType::kFloat32:
      return backward_in<float>(call, launcher);
    case kFloat16:
      return backward_in<Half>(call, launcher);
    case DType::kBFloat16:
      return backward_in<BFloat16>(call, launcher);
    default:
      throw std::invalid_argument("depthwise_conv2d_backward: maps must be fp32, fp16 or bf16");
  }
}

// What measures a call without running it.
struct NoLauncher {
  template <class Program, class Args>
  void launch(const Args&, const Grid&, const std::string&) {}
};

}  // namespace emo_kernels::cuda
