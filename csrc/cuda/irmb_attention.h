// Computes: the attention of a block in inference, window_heads.h, into a map (N, H, W, C).
//     irmb_block.h does the rest of the block.
// Tiling: a block has one window of one image and some of the heads: all where there are many
//     windows, so that Wqk and x are brought once.
// Traffic: x once for each share of the heads, Wqk from the caches, z once.
// Numerics, Limits: as window_heads.h.
#pragma once

#include "cuda/window_heads.h"

namespace emo_kernels::cuda {

template <class T>
class Attention : public WindowHeads<T, kBlockWarps> {
  using Heads = WindowHeads<T, kBlockWarps>;

 public:
  using Args = AttentionArgs<T>;

  EMO_KERNEL Attention(const Args& args, const Place& place, void* shared)
      : Heads(args, place.group, shared) {
    auto rest = static_cast<uint32_t>(place.block);  // a grid has fewer
    rest /= args.plan.shares;
    const int window_w = static_cast<int>(rest % args.shape.windows_w);
    rest /= args.shape.windows_w;
    const int window_h = static_cast<int>(rest % args.shape.windows_h);
    this->turn_to(static_cast<int>(rest / args.shape.windows_h), window_h, window_w);
  }

  static int64_t shared_bytes(const Args& args) { return args.plan.shared; }

  template <class Each>
  EMO_KERNEL static void run(const Args& args, int64_t block, const Each& each) {
    const int share = static_cast<int>(static_cast<uint32_t>(block) % args.plan.shares);
    const int first = share * args.plan.heads_a_share;
    const int end = least(first + args.plan.heads_a_share, args.plan.heads);
    Heads::attend(args, each, first, end, [&](const Heads& self, int64_t pixel) {
      const AttentionShape& s = args.shape;
      return args.out + (int64_t{self.image()} * s.H * s.W + pixel) * s.C;
    });
  }
};

}  // namespace emo_kernels::cuda
