// Entry points of the CUDA kernels, as emo_kernels.h has those of the CPU: raw pointers, shapes and
// a stream. They are in every build; without nvcc the launches say so.
#pragma once

#include "emo_kernels.h"

namespace emo_kernels::cuda {

constexpr DType kFloat16 = static_cast<DType>(3);

// A vector or a small array in any dtype; null where absent.
struct Vector {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// Where a launch runs.
struct Target {
  int device = 0;
  void* stream = nullptr;   // cudaStream_t
  void* scratch = nullptr;  // scratch_bytes() of the call, aligned to 16
};

// As cpu::DepthwiseCall, for fp32, fp16 and bf16 maps.
struct DepthwiseCall {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // (N, H, W, C)
  void* y = nullptr;        // (N, Ho, Wo, C)
  Vector weight, pivot;     // (C, K, K), (C,)
  double* sums = nullptr;   // (2, C)
  int64_t N = 0, C = 0, H = 0, W = 0, K = 0, stride = 1, padding = 0, dilation = 1;
  Target target;
};

// As cpu::DepthwiseBackwardCall. Both results, or one, in one reading of grad, y and x.
struct DepthwiseBackwardCall {
  DType dtype = DType::kFloat32;
  const void *grad = nullptr, *x = nullptr, *y = nullptr;  // (N, Ho, Wo, C), (N, H, W, C), as grad
  Vector weight, coefficients;                             // (C, K, K), (4, C)
  const void* local_grad = nullptr;                        // (N, H, W, C)
  void *dx = nullptr, *dweight = nullptr;                  // dweight in the dtype of weight
  int64_t N = 0, C = 0, H = 0, W = 0, K = 0, stride = 1, padding = 0, dilation = 1;
  Target target;
};

// Expansion and depthwise convolution in one: y = filters * act(weight norm(x) + bias), the map
// between them zero outside, and the sums of y. K 3 or 5, stride 1 or 2, M even.
struct ExpandDepthwiseCall {
  DType dtype = DType::kFloat32;
  Activation act = Activation::kNone;
  Norm norm = Norm::kNone;
  float norm_eps = 0.0f;          // of a layer norm
  const void* x = nullptr;        // (N, H, W, C)
  void* y = nullptr;              // (N, Ho, Wo, M)
  Vector norm_weight, norm_bias;  // (C,) of an affine or layer norm; absent: 1, 0
  Vector weight, bias;            // (M, C), (M,)
  Vector filters, pivot;          // (M, K, K), (M,)
  double* sums = nullptr;         // (2, M)
  int64_t N = 0, C = 0, M = 0, H = 0, W = 0, K = 0, stride = 1, padding = 0;
  Target target;
};

// Where the attention of a block runs: where it is counted to be faster, in a kernel of its own, or
// in that of the rest.
enum class Attend : int { kBest = 0, kApart = 1, kInside = 2 };

// As cpu::IrmbCall without fp64 and attention over the expansion, in windows of one kind.
struct IRMBCall {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;                             // (N, H, W, C)
  void* out = nullptr;                                 // (N, Ho, Wo, O)
  Vector norm_weight, norm_bias, norm_mean, norm_var;  // (C,)
  Vector qk_weight, qk_bias;                           // (2 C, C) or absent, (2 C,)
  Vector v_weight, v_bias, dw_weight;                  // (M, C) or absent, (M,), (M, K, K)
  Vector bn_weight, bn_bias, bn_mean, bn_var;          // (M,)
  Vector se_reduce_weight, se_reduce_bias;             // (R, M), (R,)
  Vector se_expand_weight, se_expand_bias;             // (M, R), (M,)
  Vector proj_weight, gamma;                           // (O, M), (O,)
  int64_t N = 0, C = 0, H = 0, W = 0, M = 0, O = 0, K = 0, R = 0;  // R 0: no squeeze-excite
  int64_t stride = 1, padding = 0, dilation = 1;
  int64_t head_dim = 0, window_size = 0;  // 0: no attention; <= 0: the whole map
  Windows windows = Windows::kGrid;
  Norm norm = Norm::kNone;  // kAffine: by the statistics
  Activation act = Activation::kNone;
  bool expands = true, skip = false;
  Attend attend = Attend::kBest;
  int64_t shared_limit = 0;  // bytes that a block of threads may have
  float norm_eps = 0.0f, bn_eps = 0.0f;
  Target target;
};

// How a call would run: bytes of shared memory of a block of each kernel, 0 where there is none or
// it does not fit; whether the attention runs in the kernel of the rest, and the times counted for
// both; the kernels' names, none where the call cannot run.
struct IRMBReport {
  int64_t block = 0, attention = 0, excite = 0, image = 0;
  bool inside = false;
  double time_inside = 0.0, time_apart = 0.0;
  std::vector<std::string> kernels;
};

int64_t scratch_bytes(const DepthwiseCall& call);
int64_t scratch_bytes(const DepthwiseBackwardCall& call);
int64_t scratch_bytes(const ExpandDepthwiseCall& call);
int64_t shared_bytes(const ExpandDepthwiseCall& call);  // of a block; 0: it does not fit
int64_t scratch_bytes(const IRMBCall& call);
IRMBReport report(const IRMBCall& call);
// On the target's device and stream; a std::runtime_error names the kernel that failed.
void launch_depthwise_conv2d(const DepthwiseCall& call);
void launch_depthwise_conv2d_backward(const DepthwiseBackwardCall& call);
void launch_expand_depthwise(const ExpandDepthwiseCall& call);
void launch_irmb(const IRMBCall& call);
// On the host: the kernels' own code, thread after thread, every access checked. A
// std::logic_error says what was read outside, or written other than once.
void walk_depthwise_conv2d(const DepthwiseCall& call);
void walk_depthwise_conv2d_backward(const DepthwiseBackwardCall& call);
void walk_expand_depthwise(const ExpandDepthwiseCall& call);
void walk_irmb(const IRMBCall& call);

}  // namespace emo_kernels::cuda
