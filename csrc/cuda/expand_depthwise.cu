// The kernel of expand, depthwise convolution and batch-norm sums in one: expand_depthwise.h.
#include "cuda/expand_depthwise_dispatch.h"
#include "cuda/launch.cuh"

namespace emo_kernels::cuda {

template <class Program>
__global__ void __launch_bounds__(kExpandThreads, 2)
    expand_depthwise_fwd_kernel(const typename Program::Args args) {
  run_block<Program>(args);
}

template <class T, int K, int S>
auto kernel_of(ExpandDepthwise<T, K, S>*) {
  return &expand_depthwise_fwd_kernel<ExpandDepthwise<T, K, S>>;
}

void launch_expand_depthwise(const ExpandDepthwiseCall& call) {
  run_on_stream(call, "expand_depthwise");
}

}  // namespace emo_kernels::cuda
