// The kernels of the depthwise convolution backward: depthwise_backward.h, depthwise_general.h.
#include "cuda/launch.cuh"

namespace emo_kernels::cuda {

template <class Program>
__global__ void __launch_bounds__(Program::kBlockThreads, 2)
    depthwise_conv2d_bwd_kernel(const typename Program::Args args) {
  run_block<Program>(args);
}

template <class T, int K, int S, int kStrip>
auto kernel_of(Backward<T, K, S, kStrip>*) {
  return &depthwise_conv2d_bwd_kernel<Backward<T, K, S, kStrip>>;
}

template <class T>
auto kernel_of(GeneralInputGradient<T>*) {
  return &depthwise_conv2d_bwd_kernel<GeneralInputGradient<T>>;
}

template <class T>
auto kernel_of(GeneralFilterGradient<T>*) {
  return &depthwise_conv2d_bwd_kernel<GeneralFilterGradient<T>>;
}

void launch_depthwise_conv2d_backward(const DepthwiseBackwardCall& call) {
  run_on_stream(call, "depthwise_conv2d_backward");
}

}  // namespace emo_kernels::cuda
