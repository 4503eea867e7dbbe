// The kernel of a block's attention in inference: irmb_attention.h.
#include "cuda/irmb_attention_dispatch.h"
#include "cuda/launch.cuh"

namespace emo_kernels::cuda {

template <class Program>
__global__ void __launch_bounds__(kBlockThreads, 2)
    irmb_attention_kernel(const typename Program::Args args) {
  run_block<Program>(args);
}

template <class T>
auto kernel_of(Attention<T>*) {
  return &irmb_attention_kernel<Attention<T>>;
}

void launch_irmb_attention(const AttentionCall& call) { run_on_stream(call, "irmb"); }

}  // namespace emo_kernels::cuda
