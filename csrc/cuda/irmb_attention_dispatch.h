// From a call of a block's attention to the kernel that runs it, as depthwise_dispatch.h.
#pragma once

#include "cuda/depthwise_dispatch.h"
#include "cuda/irmb_attention.h"

namespace emo_kernels::cuda {

// Pixels of a map are counted in an int, blocks of a grid in 31 bits.
inline void check_map_size(int64_t H, int64_t W) {
  if (H * W >= int64_t{1} << 30) {
    throw std::invalid_argument("irmb: a map must have fewer than 2^30 pixels, got " +
                                std::to_string(H * W));
  }
}

inline Grid block_grid(int64_t blocks) {
  if (blocks >= int64_t{1} << 31) {
    throw std::invalid_argument("irmb: too many images for one launch: " + std::to_string(blocks) +
                                " blocks of threads, at most 2^31 - 1; split the batch");
  }
  return {blocks, kBlockThreads, 1, 1};
}

inline AttentionShape attention_shape(const AttentionCall& call) {
  for (const int64_t size : {call.C, call.H, call.W, call.head_dim}) {
    if (size < 1 || size >= int64_t{1} << 24) {
      throw std::invalid_argument("irmb: sizes must be from 1 to 2^24, got " +
                                  std::to_string(size));
    }
  }
  check_map_size(call.H, call.W);
  if (call.C % call.head_dim != 0) throw std::invalid_argument("irmb: heads must divide C");
  if (call.windows == Windows::kBoth) throw std::invalid_argument("irmb: one kind of windows");
  const auto side = [&](int64_t size) {
    const bool whole = call.window_size <= 0;
    return static_cast<int>(whole || call.window_size >= 1 << 24 ? size : call.window_size);
  };
  AttentionShape s;
  s.N = call.N, s.C = static_cast<int>(call.C), s.D = static_cast<int>(call.head_dim);
  s.H = static_cast<int>(call.H), s.W = static_cast<int>(call.W);
  s.window_h = side(call.H), s.window_w = side(call.W);
  s.windows_h = static_cast<int>(ceil_div(s.H, s.window_h));
  s.windows_w = static_cast<int>(ceil_div(s.W, s.window_w));
  s.strided = call.windows == Windows::kGrid;
  return s;
}

template <class T, class Launcher>
int64_t attention_in(const AttentionCall& call, Launcher& launcher) {
  AttentionArgs<T> args{};
  const AttentionShape s = args.shape = attention_shape(call);
  args.plan = make_attention_plan(s, sizeof(T), call.shared_limit);
  if (args.plan.shared == 0) {
    throw std::invalid_argument("irmb: windows of this attention do not fit into " +
                                std::to_string(call.shared_limit) + " bytes of shared memory");
  }
  args.pixels = matrix_of<T>({call.x, call.dtype}, int64_t{s.H} * s.W, s.C, 16);
  args.out = static_cast<T*>(call.out);
  args.norm = call.norm;
  args.front = {call.norm_weight, call.norm_bias, call.norm_mean, call.norm_var, call.eps};
  args.weight = matrix_of<T>(call.qk_weight, int64_t{2} * s.C, s.C, 16);
  args.bias = call.qk_bias;
  args.scale = 1.0f / sqrtf(static_cast<float>(s.D));
  const Grid grid = block_grid(s.N * s.windows_h * s.windows_w * args.plan.shares);
  launcher.template launch<Attention<T>>(
      args, grid, std::string("irmb_attention_kernel<") + kTypeName<T> + ">");
  return 0;
}

// Runs the call; it uses no scratch.
template <class Launcher>
int64_t dispatch(const AttentionCall& call, Launcher& launcher) {
  switch (call.dtype) {
    case DType::kFloat32:
      return attention_in<float>(call, launcher);
    case kFloat16:
      return attention_in<Half>(call, launcher);
    case DType::kBFloat16:
      return attention_in<BFloat16>(call, launcher);
    default:
      throw std::invalid_argument("irmb: maps must be fp32, fp16 or bf16");
  }
}

}  // namespace emo_kernels::cuda
