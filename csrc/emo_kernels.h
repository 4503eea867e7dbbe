// Every entry point of the kernels, declared once: the table of contents of csrc/.
//
// Raw pointers, shapes and switches only: no Python, no torch. Maps are (N, H, W, C) in memory
// (channels_last), dense. Sizes: N C H W, M expanded channels, O output channels, K depthwise
// kernel size, R squeeze-excite width. Failures are std::invalid_argument ("irmb: ...").
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emo_kernels {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };
enum class Norm : int { kNone = 0, kAffine = 1, kLayer = 2 };
enum class Windows : int { kGrid = 0, kBlock = 1, kBoth = 2 };
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

namespace cpu {

// One array of parameters: `count` elements, dense; null where absent. With maps in bfloat16 it may
// be fp32 or bfloat16, else it has the dtype of the maps.
struct Param {
  const void* data = nullptr;
  int64_t count = 0;
  DType dtype = DType::kFloat32;
};

// One inverted residual mobile block in inference.
struct IrmbCall {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;  // (N, H, W, C)
  void* out = nullptr;      // (N, Ho, Wo, O), never an alias of x

  Param norm_weight, norm_bias;            // (C,)
  Param norm_mean, norm_var;               // (C,) batch norm only
  Param qk_weight, qk_bias;                // (2C, C), (2C,); null with attention: q = k = norm(x)
  Param v_weight, v_bias;                  // (M, C), (M,); v_weight null: no expansion, M = C
  Param dw_weight;                         // (M, K, K)
  Param bn_weight, bn_bias;                // (M,)
  Param bn_mean, bn_var;                   // (M,)
  Param se_reduce_weight, se_reduce_bias;  // (R, M), (R,)
  Param se_expand_weight, se_expand_bias;  // (M, R), (M,)
  Param proj_weight;                       // (O, M)
  Param gamma;                             // (O,)

  int64_t N = 0, C = 0, H = 0, W = 0, M = 0, O = 0, K = 0, R = 0;
  int64_t stride = 1, padding = 0, dilation = 1;
  Norm norm = Norm::kNone;  // kAffine: batch norm with the running statistics given
  Activation act = Activation::kNone;
  int64_t head_dim = 0;     // 0: no attention
  int64_t window_size = 7;  // <= 0: the whole map
  Windows windows = Windows::kGrid;
  bool attention_first = true;  // before the expansion (attn_pre) or over the expanded values
  double norm_eps = 1e-6, bn_eps = 1e-6;
  bool skip = false;
  int threads = 1;
};

void irmb(const IrmbCall& call);

// The convolution in front of a network.
//
// out = act(BN(W * x + b)), dense; without norm_mean no norm. With sums, of a batch norm to come,
// sums = sum (out - pivot), sum (out - pivot)^2.
struct ConvNormActCall {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;       // (N, C, H, W), or (N, H, W, C) if channels_last
  void* out = nullptr;           // (N, Ho, Wo, O)
  Param weight, bias;            // (O, C, K, K), or (O, K, K, C) if weight_channels_last; (O,)
  Param norm_weight, norm_bias;  // (O,)
  Param norm_mean, norm_var;     // (O,)
  const void* pivot = nullptr;   // (O,), in the type computed in; null: 0
  double* sums = nullptr;        // (2, O)
  int64_t N = 0, C = 0, H = 0, W = 0, O = 0, K = 0, stride = 1, padding = 0, dilation = 1;
  bool channels_last = false, weight_channels_last = false;
  Activation act = Activation::kNone;
  double eps = 1e-6;
  int threads = 1;
};

void conv_norm_act(const ConvNormActCall& call);

// out = W mean_p(LN(x_p)) + b: the end of a network, in inference.
struct NormPoolLinearCall {
  DType dtype = DType::kFloat32;
  const void* x = nullptr;                                  // (N, H, W, C)
  void* out = nullptr;                                      // (N, O)
  const void *norm_weight = nullptr, *norm_bias = nullptr;  // (C,)
  const void *weight = nullptr, *bias = nullptr;            // (O, C), (O,)
  int64_t N = 0, C = 0, H = 0, W = 0, O = 0;
  double eps = 1e-6;
  int threads = 1;
};

void norm_pool_linear(const NormPoolLinearCall& call);

// ---- one training step, operator by operator ----------------------------------------------------
// Maps are (pixels, C) matrices in the dtype; vectors, weights and their gradients in the type it
// is computed in: float where maps are bfloat16, else the same; sums in double. A null result is
// not computed, a null operand is absent.

constexpr int64_t kMostTaps = 64;

enum class PixelsOp : int {
  kSums = 0,
  kBatchNormBackward = 1,
  kSqueeze = 2,
  kSqueezeBackward = 3,
  kNormAct = 4,
  kNormActSums = 5
};

// Batch norm and squeeze-excite over the pixels of a map.
//   kSums               sums = sum (x - pivot), sum (x - pivot)^2
//   kBatchNormBackward  out = c1 grad + c2 (x - mean) + c3 (+ residual)
//   kSqueeze            means[n] = mean silu(scale x + shift)
//   kSqueezeBackward    out = grad + means[n] / pixels silu'(scale x + shift),
//                       sums = sum out, sum out (x - mean) invstd
//   kNormAct            out = act(z), z = scale (x - mean) + bias
//   kNormActSums        sums = sum dz, sum dz (x - mean) invstd, dz = grad act'(z)
struct PixelsCall {
  DType dtype = DType::kFloat32;
  PixelsOp op = PixelsOp::kSums;
  Activation act = Activation::kNone;
  const void *x = nullptr, *grad = nullptr, *residual = nullptr;  // (N, pixels, C)
  const void* pivot = nullptr;                                    // (C,)
  const void* rows = nullptr;  // (4, C): affine, coefficients, or scale, bias, mean, invstd
  void* means = nullptr;       // (N, C), read or written
  void* out = nullptr;         // (N, pixels, C)
  double* sums = nullptr;      // (2, C)
  int64_t N = 0, pixels = 0, C = 0;
  int threads = 1;
};

// Between the passes of a batch norm over `count` pixels; vectors in the type computed in.
//   coefficients null   affine = scale, shift, mean, 1 / sqrt(var + eps) from the sums of kSums;
//   the
//                       running statistics move
//   else                coefficients = c1, c2, c3, mean of kBatchNormBackward from affine and
//                       sums = sum dz, sum dz xhat; null: with the running statistics
struct BatchNormCall {
  DType dtype = DType::kFloat32;
  const double* sums = nullptr;                                     // (2, C)
  const void *pivot = nullptr, *weight = nullptr, *bias = nullptr;  // (C,)
  void *running_mean = nullptr, *running_var = nullptr;             // (C,)
  void *affine = nullptr, *coefficients = nullptr;                  // (4, C)
  int64_t C = 0;
  double count = 0.0, momentum = 0.0, eps = 0.0;
};

// y = w * x, and sums = sum (y - pivot), sum (y - pivot)^2.
struct DepthwiseCall {
  DType dtype = DType::kFloat32;
  const void *x = nullptr, *weight = nullptr;  // (N, H, W, C), (C, K, K)
  const void* pivot = nullptr;                 // (C,)
  void* y = nullptr;                           // (N, Ho, Wo, C)
  double* sums = nullptr;                      // (2, C)
  int64_t N = 0, C = 0, H = 0, W = 0, K = 0, stride = 1, padding = 0, dilation = 1;
  int threads = 1;
};

// dy = grad, or c1 grad + c2 (y - mean) + c3; dx (+ local_grad) and dw of the convolution.
struct DepthwiseBackwardCall {
  DType dtype = DType::kFloat32;
  const void *grad = nullptr, *x = nullptr, *weight = nullptr;
  const void *y = nullptr, *coefficients = nullptr;  // (N, Ho, Wo, C), (4, C)
  const void* local_grad = nullptr;                  // (N, H, W, C)
  void *dx = nullptr, *dweight = nullptr;
  int64_t N = 0, C = 0, H = 0, W = 0, K = 0, stride = 1, padding = 0, dilation = 1;
  int threads = 1;
};

// dx and dweight of y = W * x + b for dy = c1 dz + c2 (y - mean) + c3, dz = grad act'(scale (y -
// mean) + bias): the activation and the batch norm behind, taken back in the loads.
struct ConvNormActBackwardCall {
  DType dtype = DType::kFloat32;
  const void *grad = nullptr, *y = nullptr;  // (N, Ho, Wo, O)
  const void* x = nullptr;                   // as ConvNormActCall's
  const void* weight = nullptr;              // (O, C, K, K)
  const void* norm = nullptr;                // (4, O): scale, bias, mean, invstd
  const void* coefficients = nullptr;        // (4, O)
  void *dx = nullptr, *dweight = nullptr;    // (N, H, W, C), as weight
  int64_t N = 0, C = 0, H = 0, W = 0, O = 0, K = 0, stride = 1, padding = 0, dilation = 1;
  bool channels_last = false;
  Activation act = Activation::kNone;
  int threads = 1;
};

// out = act(W norm(x) + b); slope, act'(W norm(x) + b), is ExpandDepthwiseCall's.
struct ExpandCall {
  DType dtype = DType::kFloat32;
  const void *x = nullptr, *weight = nullptr, *bias = nullptr;  // (N pixels, C), (M, C), (M,)
  const void *norm_weight = nullptr, *norm_bias = nullptr;      // (C,)
  void *out = nullptr, *slope = nullptr;                        // (N pixels, M)
  int64_t N = 0, pixels = 0, C = 0, M = 0;
  Norm norm = Norm::kNone;
  Activation act = Activation::kNone;
  double eps = 1e-6;
  int threads = 1;
};

// The gradient at out is grad + drop_scale[n] out_weight^T out_grad; slope, the forward's, is
// ExpandDepthwiseBackwardCall's. sums = sum dn, sum dn h with
// h = (x - mean) invstd where mean is given, else x (affine) or xhat (layer). dx is the gradient
// behind the norm's own (`behind_norm`: at norm(x)) plus residual; norm_grad is added to dn.
struct ExpandBackwardCall {
  DType dtype = DType::kFloat32;
  const void *grad = nullptr, *x = nullptr, *weight = nullptr, *bias = nullptr;
  const void *norm_weight = nullptr, *norm_bias = nullptr, *mean = nullptr, *invstd = nullptr;
  const void *out_grad = nullptr, *out_weight = nullptr, *drop_scale = nullptr;
  const void *residual = nullptr, *norm_grad = nullptr;  // (N pixels, C)
  const void* slope = nullptr;                           // (N pixels, M)
  void *dx = nullptr, *dweight = nullptr;
  double *dbias = nullptr, *sums = nullptr;  // (M,), (2, C)
  int64_t N = 0, pixels = 0, C = 0, M = 0, O = 0;
  Norm norm = Norm::kNone;
  Activation act = Activation::kNone;
  bool behind_norm = false;
  double eps = 1e-6;
  int threads = 1;
};

// Both in one pass: expand.out, the map between them, and expand.slope are written where they are
// given; depthwise.x is not read.
struct ExpandDepthwiseCall {
  DType dtype = DType::kFloat32;
  ExpandCall expand;
  DepthwiseCall depthwise;
  int64_t N = 0;
  int threads = 1;
};

// Both gradients in one pass over the expanded map between them: depthwise.dx is computed, times
// act', as expand.grad, and neither is written. expand.slope and depthwise.x are the forward's, or
// null: recomputed. Without out_grad and norm_grad; sizes and types agree.
struct ExpandDepthwiseBackwardCall {
  DType dtype = DType::kFloat32;
  ExpandBackwardCall expand;
  DepthwiseBackwardCall depthwise;
  int64_t N = 0;
  int threads = 1;
};

// out = residual + drop_scale[n] W (local + gate[n] silu(scale y + shift)), and sums = sum (out -
// pivot), sum (out - pivot)^2.
struct ShrinkCall {
  DType dtype = DType::kFloat32;
  const void *y = nullptr, *weight = nullptr;         // (N pixels, M), (O, M)
  const void *scale = nullptr, *shift = nullptr;      // (M,)
  const void *local = nullptr, *residual = nullptr;   // (N pixels, M), (N pixels, O)
  const void *gate = nullptr, *drop_scale = nullptr;  // (N, M), (N,)
  const void* pivot = nullptr;                        // (O,)
  void* out = nullptr;
  double* sums = nullptr;  // (2, O)
  int64_t N = 0, pixels = 0, M = 0, O = 0;
  int threads = 1;
};

// dy = scale dz, or dz (`behind_norm`); sums = sum dz, sum dz h with h = (y - mean) invstd where
// mean is given, else y.
struct ShrinkBackwardCall {
  DType dtype = DType::kFloat32;
  const void *grad = nullptr, *y = nullptr, *weight = nullptr, *scale = nullptr, *shift = nullptr;
  const void *local = nullptr, *gate = nullptr, *drop_scale = nullptr;
  const void *mean = nullptr, *invstd = nullptr;
  void *dy = nullptr, *dweight = nullptr, *dlocal = nullptr;
  double *sums = nullptr, *dgate = nullptr, *ddrop = nullptr;  // (2, M), (N, M), (N,)
  int64_t N = 0, pixels = 0, M = 0, O = 0;
  bool behind_norm = false;
  int threads = 1;
};

// softmax(q k^T / sqrt(head_dim)) v in windows of h = norm(x); v is h, or a map of its own that
// is `v_padding` at padded pixels.
struct AttentionCall {
  DType dtype = DType::kFloat32;
  const void *x = nullptr, *qk_weight = nullptr, *qk_bias = nullptr;  // (N H W, C), (2C, C), (2C,)
  const void *v = nullptr, *v_padding = nullptr;                      // (N H W, M), (M,)
  const void *norm_weight = nullptr, *norm_bias = nullptr;            // (C,)
  void* out = nullptr;                                                // (N H W, M), or C without v
  void* qk = nullptr;  // (N H W, 2C), q and k: null: not kept
  int64_t N = 0, C = 0, H = 0, W = 0, M = 0, head_dim = 0, window_size = 7;
  Windows windows = Windows::kGrid;
  Norm norm = Norm::kNone;
  double eps = 1e-6;
  int threads = 1;
};

// As ExpandBackwardCall at the norm. The K half of dqk_bias is left alone: it is zero. qk: what the
// forward pass kept, null: q and k are computed again.
struct AttentionBackwardCall {
  DType dtype = DType::kFloat32;
  const void *grad = nullptr, *x = nullptr, *qk_weight = nullptr, *qk_bias = nullptr;
  const void *v = nullptr, *v_padding = nullptr, *norm_weight = nullptr, *norm_bias = nullptr;
  const void *mean = nullptr, *invstd = nullptr, *residual = nullptr, *qk = nullptr;
  void *dx = nullptr, *dqk_weight = nullptr, *dv = nullptr;
  double *dqk_bias = nullptr, *dv_padding = nullptr, *sums = nullptr;  // (C,), (M,), (2, C)
  int64_t N = 0, C = 0, H = 0, W = 0, M = 0, head_dim = 0, window_size = 7;
  Windows windows = Windows::kGrid;
  Norm norm = Norm::kNone;
  bool behind_norm = false;
  double eps = 1e-6;
  int threads = 1;
};

void pixels(const PixelsCall& call);
void batch_norm(const BatchNormCall& call);
void depthwise_conv2d(const DepthwiseCall& call);
void depthwise_conv2d_backward(const DepthwiseBackwardCall& call);
void conv_norm_act_backward(const ConvNormActBackwardCall& call);
void expand(const ExpandCall& call);
void expand_backward(const ExpandBackwardCall& call);
void expand_depthwise(const ExpandDepthwiseCall& call);
void expand_depthwise_backward(const ExpandDepthwiseBackwardCall& call);
void shrink(const ShrinkCall& call);
void shrink_backward(const ShrinkBackwardCall& call);
void window_attention(const AttentionCall& call);
void window_attention_backward(const AttentionBackwardCall& call);

// Instruction sets: compiled into this module, and of those the ones this machine runs, best last.
std::vector<std::string> compiled_isas();
std::vector<std::string> available_isas();
// The one in use: EMO_KERNELS_ISA if set (refused when this machine lacks it), else the best.
std::string selected_isa();

// Bytes of scratch the calling thread's calls hold (shared packs, one working set a thread).
int64_t scratch_bytes();
void release_scratch();

}  // namespace cpu

namespace cuda {

struct Device {
  std::string name;
  int major, minor, multiprocessors;
  int64_t memory_bytes;
};

struct DeviceReport {
  bool compiled = false;  // false: this build has no CUDA kernels
  int runtime_version = 0, driver_version = 0;
  std::string error;  // empty when the runtime answered
  std::vector<Device> devices;
};

// Creates no context on any device.
DeviceReport device_report();

}  // namespace cuda
}  // namespace emo_kernels
