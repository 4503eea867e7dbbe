// Which window and heads a block of the attention kernels has, and where in its shared memory what
// lies.
#pragma once

#include "cuda/norm_rows.h"

namespace emo_kernels::cuda {

struct AttentionShape {
  int64_t N = 0;
  int C = 0, H = 0, W = 0, D = 0;
  int window_h = 0, window_w = 0, windows_h = 0, windows_w = 0;
  bool strided = true;  // tokens of a window lie windows_h x windows_w pixels apart
};

struct AttentionPlan {
  int tokens = 0, padded = 0, wide = 0;  // of a window, in tiles of 16; D in tiles of 16
  int heads = 0, shares = 1, heads_a_share = 1;
  int h_stride = 0, qk_stride = 0, v_stride = 0, score_stride = 0, p_stride = 0;
  // Bytes at which each part begins: the window's pixels; the weights of a head's q or k, in their
  // place its scores; q and k, in their place the softmax; v, the sums of a row's parts, the norm
  // in front; the end of them all, 0 where it does not fit.
  int h = 0, weight = 0, scores = 0, qk = 0, p = 0, v = 0, parts = 0, norm = 0, shared = 0;
};

constexpr int kMostTokens = 128;

// The plan of a block that has all heads, whose parts begin behind `behind` bytes.
inline AttentionPlan lay_out_attention(const AttentionShape& s, int bytes, int behind,
                                       int64_t limit) {
  AttentionPlan plan;
  const int64_t tokens = int64_t{s.window_h} * s.window_w;
  if (tokens > kMostTokens) return plan;
  plan.tokens = static_cast<int>(tokens), plan.padded = rounded(plan.tokens, 16);
  plan.wide = rounded(s.D, 16), plan.heads = plan.heads_a_share = s.C / s.D;
  plan.h_stride = padded_row(s.C), plan.qk_stride = padded_row(2 * plan.wide);
  plan.v_stride = padded_row(plan.wide), plan.p_stride = padded_row(plan.padded);
  plan.score_stride = plan.padded + 1;
  int64_t at = behind;
  const auto place = [&](int& part, int64_t size) {
    part = static_cast<int>(at < (1 << 30) ? at : 1 << 30);
    at += (size + 15) / 16 * 16;
  };
  const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const int64_t rows = plan.padded;
  place(plan.h, rows * plan.h_stride * bytes);
  place(plan.weight,
        larger(int64_t{plan.wide} * plan.h_stride * bytes, rows * plan.score_stride * 4));
  plan.scores = plan.weight;
  place(plan.qk, rows * larger(plan.qk_stride, plan.p_stride) * bytes);
  plan.p = plan.qk;
  place(plan.v, rows * plan.v_stride * bytes);
  place(plan.parts, norm_parts_bytes(plan.padded));
  place(plan.norm, int64_t{2} * rounded(s.C, 16) * 4);
  plan.shared = at > limit ? 0 : static_cast<int>(at);
  return plan;
}

// The plan of the kernel of the attention alone, where few windows share out their heads.
inline AttentionPlan make_attention_plan(const AttentionShape& s, int bytes, int64_t limit) {
  AttentionPlan plan = lay_out_attention(s, bytes, 0, limit);
  if (plan.shared == 0) return plan;
  const int64_t windows = s.N * s.windows_h * s.windows_w;
  const int64_t wanted = windows > 0 ? ceil_div(kFewBlocks, windows) : 1;
  const int shares = wanted < plan.heads ? static_cast<int>(wanted) : plan.heads;
  plan.heads_a_share = static_cast<int>(ceil_div(plan.heads, shares));
  plan.shares = static_cast<int>(ceil_div(plan.heads, plan.heads_a_share));
  return plan;
}

template <class T>
struct AttentionArgs {
  AttentionShape shape;
  AttentionPlan plan;
  Matrix pixels;  // (H W, C) of image 0: x (N, H, W, C)
  T* out;         // (N, H, W, C)
  Norm norm;      // kAffine: over the statistics of `front`
  ChannelNorm front;
  Matrix weight;  // (2 C, C), or absent: q = k = h
  Vector bias;    // (2 C,)
  float scale;    // 1 / sqrt(D)
};

}  // namespace emo_kernels::cuda
