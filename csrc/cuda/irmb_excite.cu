// The kernels of squeeze-excite in inference: sums of the convolution's result (irmb_block.h), and
// what becomes of them (irmb_excite.h).
#include "cuda/irmb_kernels.h"

namespace emo_kernels::cuda {

template <class Program>
__global__ void __launch_bounds__(kBlockThreads, 2)
    irmb_squeeze_kernel(const typename Program::Args args) {
  run_block<Program>(args);
}

__global__ void __launch_bounds__(kBlockThreads, 2) irmb_excite_kernel(const ExciteArgs args) {
  run_block<Excite>(args);
}

template <class T, int K, int S>
KernelOf<Block<T, K, S, 0>> kernel_of(Block<T, K, S, 0>*) {
  return &irmb_squeeze_kernel<Block<T, K, S, 0>>;
}

KernelOf<Excite> kernel_of(Excite*) { return &irmb_excite_kernel; }

#define EMO_SQUEEZE(K, S)                                                     \
  template KernelOf<Block<float, K, S, 0>> kernel_of(Block<float, K, S, 0>*); \
  template KernelOf<Block<Half, K, S, 0>> kernel_of(Block<Half, K, S, 0>*);   \
  template KernelOf<Block<BFloat16, K, S, 0>> kernel_of(Block<BFloat16, K, S, 0>*);
EMO_SQUEEZE(3, 1)
EMO_SQUEEZE(3, 2)
EMO_SQUEEZE(5, 1)
EMO_SQUEEZE(5, 2)
EMO_SQUEEZE(0, 0)
#undef EMO_SQUEEZE

}  // namespace emo_kernels::cuda
