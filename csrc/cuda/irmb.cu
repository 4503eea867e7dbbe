// The kernels of the whole block in inference: irmb_block.h, irmb_sum.h.
#include "cuda/irmb_kernels.h"

namespace emo_kernels::cuda {

template <class Program>
__global__ void __launch_bounds__(kBlockThreads, 2) irmb_kernel(const typename Program::Args args) {
  run_block<Program>(args);
}

template <class Program>
__global__ void __launch_bounds__(kBlockThreads)
    irmb_sum_kernel(const typename Program::Args args) {
  run_block<Program>(args);
}

template <class T, int K, int S, int kPairs>
auto kernel_of(Block<T, K, S, kPairs>*) {
  return &irmb_kernel<Block<T, K, S, kPairs>>;
}

template <class T>
auto kernel_of(BlockSum<T>*) {
  return &irmb_sum_kernel<BlockSum<T>>;
}

void launch_irmb(const IRMBCall& call) { run_on_stream(call, "irmb"); }

}  // namespace emo_kernels::cuda
