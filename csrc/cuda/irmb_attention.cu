// The kernel of a block's attention in inference: irmb_attention.h.
#include "cuda/irmb_kernels.h"

namespace emo_kernels::cuda {

template <class Program>
__global__ void __launch_bounds__(kBlockThreads, 2)
    irmb_attention_kernel(const typename Program::Args args) {
  run_block<Program>(args);
}

template <class T>
KernelOf<Attention<T>> kernel_of(Attention<T>*) {
  return &irmb_attention_kernel<Attention<T>>;
}

template KernelOf<Attention<float>> kernel_of(Attention<float>*);
template KernelOf<Attention<Half>> kernel_of(Attention<Half>*);
template KernelOf<Attention<BFloat16>> kernel_of(Attention<BFloat16>*);

}  // namespace emo_kernels::cuda
