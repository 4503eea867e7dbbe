// How a kernel that is compiled per instruction set is chosen, given scratch and run by a team.
#pragma once

#include <cstdint>

#include "emo_kernels.h"

namespace emo_kernels::cpu {

// Bytes: one buffer for the team, and one for each thread.
struct ScratchBytes {
  int64_t shared, own;
};

// What one thread of a team has; thread t's own buffer starts at own + t * own_bytes.
struct Share {
  char* shared;
  char* own;
  int64_t own_bytes;
  int thread, threads;
};

template <class Call>
struct Kernel {
  ScratchBytes (*scratch)(const Call& call);
  void (*run)(const Call& call, const Share& share);
};

// One per instruction set and type of the maps.
#define EMO_DECLARE_KERNELS(Kind, name) \
  const Kind& name##_portable_f32();    \
  const Kind& name##_portable_bf16();   \
  const Kind& name##_portable_f64();    \
  const Kind& name##_avx2_f32();        \
  const Kind& name##_avx2_bf16();       \
  const Kind& name##_avx512_f32();      \
  const Kind& name##_avx512_bf16();     \
  const Kind& name##_avx512bf16_bf16(); \
  const Kind& name##_neon_f32();        \
  const Kind& name##_neon_bf16()
#define EMO_DECLARE_KERNEL(Call, name) EMO_DECLARE_KERNELS(Kernel<Call>, name)

EMO_DECLARE_KERNEL(ConvNormActCall, conv_norm_act_kernel);
EMO_DECLARE_KERNEL(ConvNormActBackwardCall, conv_norm_act_backward_kernel);
EMO_DECLARE_KERNEL(NormPoolLinearCall, norm_pool_linear_kernel);
EMO_DECLARE_KERNEL(PixelsCall, pixels_kernel);
EMO_DECLARE_KERNEL(DepthwiseCall, depthwise_conv2d_kernel);
EMO_DECLARE_KERNEL(DepthwiseBackwardCall, depthwise_conv2d_backward_kernel);
EMO_DECLARE_KERNEL(ExpandCall, expand_kernel);
EMO_DECLARE_KERNEL(ExpandBackwardCall, expand_backward_kernel);
EMO_DECLARE_KERNEL(ExpandDepthwiseCall, expand_depthwise_kernel);
EMO_DECLARE_KERNEL(ExpandDepthwiseBackwardCall, expand_depthwise_backward_kernel);
EMO_DECLARE_KERNEL(ShrinkCall, shrink_kernel);
EMO_DECLARE_KERNEL(ShrinkBackwardCall, shrink_backward_kernel);
EMO_DECLARE_KERNEL(AttentionCall, window_attention_kernel);
EMO_DECLARE_KERNEL(AttentionBackwardCall, window_attention_backward_kernel);

// In the file compiled per instruction set, behind kKernel<T, S>: the type it computes in, and the
// type its maps lie in.
#define EMO_JOIN_(a, b, c) a##b##c
#define EMO_JOIN(a, b, c) EMO_JOIN_(a, b, c)
#define EMO_DEFINE_KERNEL_BF16(Call, name) \
  const Kernel<Call>& EMO_JOIN(name##_, EMO_ISA, _bf16)() { return kKernel<float, BFloat16>; }
#define EMO_DEFINE_KERNEL_F32(Call, name) \
  const Kernel<Call>& EMO_JOIN(name##_, EMO_ISA, _f32)() { return kKernel<float, float>; }
#if defined(EMO_ISA_PORTABLE)
#define EMO_DEFINE_KERNEL(Call, name) \
  EMO_DEFINE_KERNEL_F32(Call, name)   \
  EMO_DEFINE_KERNEL_BF16(Call, name)  \
  const Kernel<Call>& name##_portable_f64() { return kKernel<double, double>; }
#elif defined(EMO_ISA_AVX512BF16)
#define EMO_DEFINE_KERNEL(Call, name) EMO_DEFINE_KERNEL_BF16(Call, name)
#else
#define EMO_DEFINE_KERNEL(Call, name) \
  EMO_DEFINE_KERNEL_F32(Call, name)   \
  EMO_DEFINE_KERNEL_BF16(Call, name)
#endif

}  // namespace emo_kernels::cpu
