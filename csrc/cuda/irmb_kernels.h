// Where the whole-block kernels are compiled: kernel_of(Program*) is the kernel that runs a
// program.
#pragma once

#include "cuda/irmb_dispatch.h"
#include "cuda/launch.cuh"

namespace emo_kernels::cuda {

template <class Program>
using KernelOf = void (*)(typename Program::Args);

// In irmb_attention.cu.
template <class T>
KernelOf<Attention<T>> kernel_of(Attention<T>*);

// In irmb_excite.cu.
template <class T, int K, int S>
KernelOf<Block<T, K, S, 0>> kernel_of(Block<T, K, S, 0>*);
KernelOf<Excite> kernel_of(Excite*);

// In irmb_image.cu.
template <class T, int K, int kWarps>
KernelOf<Image<T, K, kWarps>> kernel_of(Image<T, K, kWarps>*);

}  // namespace emo_kernels::cuda
