// The convolution in front of a network: entry point, and its kernel of every instruction set.
#pragma once

#include <cstdint>

#include "cpu/launch.h"
#include "emo_kernels.h"

namespace emo_kernels::cpu {

// out = act(BN(W * x + b)), dense; without norm_mean no norm.
struct ConvNormActCall {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;                        // (N, C, H, W), or (N, H, W, C) if channels_last
  void* out = nullptr;                            // (N, Ho, Wo, O)
  const void *weight = nullptr, *bias = nullptr;  // (O, C, K, K), (O,)
  const void *norm_weight = nullptr, *norm_bias = nullptr;  // (O,)
  const void *norm_mean = nullptr, *norm_var = nullptr;     // (O,)
  int64_t N = 0, C = 0, H = 0, W = 0, O = 0, K = 0, stride = 1, padding = 0, dilation = 1;
  bool channels_last = false;
  Activation act = Activation::kNone;
  double eps = 1e-6;
  int threads = 1;
};

void conv_norm_act(const ConvNormActCall& call);

EMO_DECLARE_KERNEL(ConvNormActCall, conv_norm_act_kernel);

}  // namespace emo_kernels::cpu
