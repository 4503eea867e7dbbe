// The kernel of the whole attention block in inference: irmb_image.h.
#include "cuda/irmb_kernels.h"

namespace emo_kernels::cuda {

template <class Program, int kWarps>
__global__ void __launch_bounds__(kWarps* kLanes, kWarps == kBlockWarps ? 2 : 1)
    irmb_image_kernel(const typename Program::Args args) {
  run_block<Program>(args);
}

template <class T, int K, int kWarps>
KernelOf<Image<T, K, kWarps>> kernel_of(Image<T, K, kWarps>*) {
  return &irmb_image_kernel<Image<T, K, kWarps>, kWarps>;
}

#define EMO_IMAGE(K, WARPS)                                                     \
  template KernelOf<Image<float, K, WARPS>> kernel_of(Image<float, K, WARPS>*); \
  template KernelOf<Image<Half, K, WARPS>> kernel_of(Image<Half, K, WARPS>*);   \
  template KernelOf<Image<BFloat16, K, WARPS>> kernel_of(Image<BFloat16, K, WARPS>*);
EMO_IMAGE(3, 8)
EMO_IMAGE(5, 8)
EMO_IMAGE(3, 16)
EMO_IMAGE(5, 16)
#undef EMO_IMAGE

}  // namespace emo_kernels::cuda
