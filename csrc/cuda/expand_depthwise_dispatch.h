// From a call to the kernels that run it: the same on a GPU and in the walk on the host.
#pragma once

#include "cuda/depthwise_dispatch.h"
#include "cuda/expand_depthwise.h"

namespace emo_kernels::cuda {

inline ExpandTask task_of(const ExpandDepthwiseCall& call) {
  DepthwiseCall convolution;
  convolution.N = call.N, convolution.C = call.M, convolution.H = call.H, convolution.W = call.W;
  convolution.K = call.K, convolution.stride = call.stride, convolution.padding = call.padding;
  ExpandTask task;
  task.g = geometry(convolution, "expand_depthwise");
  task.C = static_cast<int>(call.C);
  task.itemsize = call.dtype == DType::kFloat32 ? 4 : 2;
  return task;
}

template <class T, int K, int S, class Launcher>
int64_t expand_depthwise_of(const ExpandDepthwiseArgs<T>& args, const ExpandDepthwiseCall& call,
                            Launcher& launcher) {
  const Grid grid{args.plan.programs * args.plan.blocks_c, kExpandThreads, 1, 1};
  const std::string name = kernel_name<T>("expand_depthwise_fwd_kernel", K, S);
  launcher.template launch<ExpandDepthwise<T, K, S>>(args, grid, name);
  if (call.sums == nullptr) return 0;
  const SumArgs<double> sums{args.partials, args.plan.programs, 1,
                             2 * call.M,    call.sums,          DType::kFloat64};
  sum_partials(sums, launcher);
  return args.plan.programs * 2 * call.M * int64_t{sizeof(double)};
}

template <class T, class Launcher>
int64_t expand_depthwise_in(const ExpandDepthwiseCall& call, Launcher& launcher) {
  const ExpandTask task = task_of(call);
  const bool known = (call.K == 3 || call.K == 5) && (call.stride == 1 || call.stride == 2);
  if (!known || call.C < 1 || !in_pairs<T>(task.g.C, {call.y})) {
    throw std::invalid_argument("expand_depthwise: K 3 or 5, stride 1 or 2, M even");
  }
  ExpandDepthwiseArgs<T> args{};
  args.g = task.g, args.C = task.C, args.plan = make_plan(task);
  if (args.plan.bytes == 0) {
    throw std::invalid_argument("expand_depthwise: too many channels for shared memory");
  }
  const bool aligned = reinterpret_cast<uintptr_t>(call.x) % 16 == 0;
  args.in_vectors = aligned && task.C * sizeof(T) % 16 == 0;
  args.act = call.act, args.norm = call.norm, args.eps = call.norm_eps;
  args.x = static_cast<const T*>(call.x), args.y = static_cast<T*>(call.y);
  args.norm_weight = call.norm_weight, args.norm_bias = call.norm_bias;
  args.weight = call.weight, args.bias = call.bias, args.filters = call.filters;
  args.pivot = call.pivot;
  args.partials = call.sums == nullptr ? nullptr : static_cast<double*>(call.target.scratch);
  if (call.K == 3 && call.stride == 1) return expand_depthwise_of<T, 3, 1>(args, call, launcher);
  if (call.K == 3) return expand_depthwise_of<T, 3, 2>(args, call, launcher);
  if (call.stride == 1) return expand_depthwise_of<T, 5, 1>(args, call, launcher);
  return expand_depthwise_of<T, 5, 2>(args, call, launcher);
}

// Runs the call; returns the bytes of scratch that it uses.
template <class Launcher>
int64_t dispatch(const ExpandDepthwiseCall& call, Launcher& launcher) {
  switch (call.dtype) {
    case DType::kFloat32:
      return expand_depthwise_in<float>(call, launcher);
    case kFloat16:
      return expand_depthwise_in<Half>(call, launcher);
    case DType::kBFloat16:
      return expand_depthwise_in<BFloat16>(call, launcher);
    default:
      throw std::invalid_argument("expand_depthwise: maps must be fp32, fp16 or bf16");
  }
}

}  // namespace emo_kernels::cuda
