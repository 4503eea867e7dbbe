// Whether the attention runs in the kernel of its block, and where in shared memory what lies then.
//
// Counted, not measured; the campaign times both. In one kernel the attention's result is neither
// written nor read again, and a launch is saved; but a block of threads has a whole image with all
// heads, and where few images share out their expanded channels, each share computes the attention
// anew. EMO-5M's stage 3 in bf16: 256 images move 48 MB (x twice, out) instead of 80; for one image
// the attention, a quarter of the block's multiplications, would be computed 20 times.
#pragma once

#include "cuda/irmb_attention_plan.h"
#include "cuda/irmb_tiles.h"

namespace emo_kernels::cuda {

constexpr double kLaunchTime = 2e6;  // 2 us at 10^6 multiplications of a multiprocessor in each
constexpr double kByteTime = 0.23;   // of a GPU that moves 4.3 TB/s

// Of the heads of one window.
inline double time_of_heads(const AttentionPlan& plan, const AttentionShape& s, int heads) {
  const double rows = plan.padded, wide = plan.wide;
  const double head = 2 * wide * s.C * (rows + 8) + 2 * rows * rows * wide + 24 * rows * rows;
  return heads * head + 16.0 * rows * s.C;
}

inline double time_apart(const AttentionPlan& attention, const AttentionShape& a,
                         const BlockPlan& block, const BlockShape& s, int bytes, int limit) {
  const int64_t windows = a.N * a.windows_h * a.windows_w;
  const double heads = time_of_heads(attention, a, attention.heads_a_share);
  const double z = static_cast<double>(a.N * a.H * a.W) * a.C * bytes;
  return detail::time_of_blocks(windows * attention.shares, heads, kBlockWarps, attention.shared,
                                limit) +
         detail::time_of(block, s, limit) + kLaunchTime + 2 * kByteTime * z;
}

// `block.shared` is 0 where it does not fit.
struct ImagePlan {
  BlockPlan block;
  AttentionPlan attention;
  double time = 0.0;
};

// Places the attention's parts where the block's chunks lie later, behind the pixels.
inline bool lay_out_image(ImagePlan& plan, const BlockShape& s, const AttentionShape& a, int strip,
                          int bytes, int limit) {
  if (detail::lay_out(plan.block, s, strip, bytes) > limit) return false;
  plan.attention = lay_out_attention(a, bytes, plan.block.e, limit);
  if (plan.attention.shared == 0) return false;
  plan.block.tile = most(plan.block.tile, plan.attention.shared);
  plan.block.shared = plan.block.tile + 32;
  return plan.block.shared <= limit;
}

inline ImagePlan make_image_plan(const BlockShape& s, const AttentionShape& a, int strip, int bytes,
                                 int limit) {
  ImagePlan best;
  if (int64_t{s.HO} * s.WO > 32 * 2 * kBlockWarps) return best;
  const double windows = static_cast<double>(a.windows_h) * a.windows_w;
  for (const int warps : {kBlockWarps, 2 * kBlockWarps}) {
    for (int warps_m = 1; warps_m <= warps; warps_m *= 2) {
      ImagePlan plan;
      plan.block.warps = warps, plan.block.warps_m = warps_m, plan.block.warps_n = warps / warps_m;
      plan.block.pairs = static_cast<int>(ceil_div(s.O, 16 * plan.block.warps_n));
      plan.block.tile_h = s.HO, plan.block.tile_w = s.WO;
      if (32 * warps_m < s.HO * s.WO || plan.block.pairs > kMostPairs) continue;
      if (!lay_out_image(plan, s, a, strip, bytes, limit)) continue;
      for (const bool shares : {false, true}) {
        detail::share_out(plan.block, s, shares);
        const double each = windows * time_of_heads(plan.attention, a, plan.attention.heads) +
                            detail::time_of_chunks(plan.block, s);
        plan.time =
            detail::time_of_blocks(s.N * plan.block.splits, each, warps, plan.block.shared, limit);
        if (best.block.shared == 0 || plan.time < best.time) best = plan;
      }
    }
  }
  return best;
}

template <class T>
struct ImageArgs {
  AttentionArgs<T> attention;
  BlockArgs<T> block;
};

}  // namespace emo_kernels::cuda
