// The kernels of the depthwise convolution forward: depthwise_forward.h, depthwise_general.h.
#include "cuda/launch.cuh"

namespace emo_kernels::cuda {

template <class Program>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_conv2d_fwd_kernel(const typename Program::Args args) {
  run_block<Program>(args);
}

template <class T, int K, int S, int kStrip>
auto kernel_of(Forward<T, K, S, kStrip>*) {
  return &depthwise_conv2d_fwd_kernel<Forward<T, K, S, kStrip>>;
}

template <class T>
auto kernel_of(GeneralForward<T>*) {
  return &depthwise_conv2d_fwd_kernel<GeneralForward<T>>;
}

void launch_depthwise_conv2d(const DepthwiseCall& call) { run_on_stream(call, "depthwise_conv2d"); }

}  // namespace emo_kernels::cuda
