// From a call of the whole block to what its attention's kernel is given.
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

inline AttentionShape attention_shape(const IRMBCall& call) {
  if (call.head_dim < 1 || call.C % call.head_dim != 0)
    throw std::invalid_argument("irmb: heads must divide C");
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

template <class T>
AttentionArgs<T> attention_args(const IRMBCall& call, const AttentionShape& s) {
  AttentionArgs<T> args{};
  args.shape = s;
  args.pixels = matrix_of<T>({call.x, call.dtype}, int64_t{s.H} * s.W, s.C, 16);
  args.norm = call.norm;
  args.front = {call.norm_weight, call.norm_bias, call.norm_mean, call.norm_var, call.norm_eps};
  args.weight = matrix_of<T>(call.qk_weight, int64_t{2} * s.C, s.C, 16);
  args.bias = call.qk_bias;
  args.scale = 1.0f / sqrtf(static_cast<float>(s.D));
  return args;
}

// Runs the attention alone.
template <class T, class Launcher>
void launch_attention(AttentionArgs<T> args, const AttentionPlan& plan, Launcher& launcher) {
  args.plan = plan;
  const AttentionShape& s = args.shape;
  const Grid grid = block_grid(s.N * s.windows_h * s.windows_w * plan.shares);
  launcher.template launch<Attention<T>>(
      args, grid, std::string("irmb_attention_kernel<") + kTypeName<T> + ">");
}

}  // namespace emo_kernels::cuda
