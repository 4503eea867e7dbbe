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

enum class DType : int { kFloat32 = 0, kFloat64 = 1 };
enum class Norm : int { kNone = 0, kAffine = 1, kLayer = 2 };
enum class Windows : int { kGrid = 0, kBlock = 1, kBoth = 2 };
enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kSilu = 3 };

namespace cpu {

// One array of parameters: `count` elements of the call's dtype, dense; null where absent.
struct Param {
  const void* data = nullptr;
  int64_t count = 0;
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
