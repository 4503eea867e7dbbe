// Computes: the attention block in inference, whole: window_heads.h, then irmb_block.h.
// Tiling: a block of threads, of 8 warps or 16, has one image, or of few images a share of the
//     expanded channels of one. Window by window the attention's result gathers in shared memory,
//     where the expansion finds its pixels; the heads' parts lie where the chunks lie later.
// Traffic: x twice, once as the residual; out once; Wqk once for each window, the other weights
// once
//     for each image, from the caches. Neither the attention's result nor the expanded map leaves
//     the multiprocessor. Which blocks gain by it: irmb_image_plan.h.
// Numerics: to the bit those of the two kernels one after the other, but that a launch of another
//     plan may share out M otherwise (irmb_block.h).
// Limits: maps of up to 512 pixels that fit in shared memory, K 3 or 5, stride 1, no dilation, no
//     squeeze-excite, an expansion. Others run in two kernels.
#pragma once

#include "cuda/irmb_block.h"
#include "cuda/irmb_image_plan.h"
#include "cuda/window_heads.h"

namespace emo_kernels::cuda {

// The steps of a part of a program: part_at(program) is it.
template <class Each, class PartAt>
struct EachPart {
  const Each& each;
  PartAt part_at;

  template <class Step>
  EMO_KERNEL void operator()(const Step& step) const {
    each([&](auto& self) { step(part_at(self)); });
  }
  template <class Step>
  EMO_KERNEL void then(const Step& step) const {
    each.then([&](auto& self) { step(part_at(self)); });
  }
  template <class Step>
  EMO_KERNEL void warps(const Step& step) const {
    each.warps([&](auto& self) { step(part_at(self)); });
  }
  EMO_KERNEL void barrier() const { each.barrier(); }
};

template <class T, int K, int kWarps>
class Image {
  using Heads = WindowHeads<T, kWarps>;
  using Rest = Block<T, K, 1, kMostPairs, kWarps>;
  struct HeadsAt {
    EMO_KERNEL Heads& operator()(Image& self) const { return self.heads_; }
  };
  struct RestAt {
    EMO_KERNEL Rest& operator()(Image& self) const { return self.rest_; }
  };

 public:
  using Args = ImageArgs<T>;

  EMO_KERNEL Image(const Args& args, const Place& place, void* shared)
      : heads_(args.attention, place.group, shared), rest_(args.block, place.group, shared) {}

  static int64_t shared_bytes(const Args& args) { return args.block.plan.shared; }

  template <class Each>
  EMO_KERNEL static void run(const Args& args, int64_t block, const Each& each) {
    const EachPart<Each, HeadsAt> heads{each, {}};
    const EachPart<Each, RestAt> rest{each, {}};
    const BlockTile tile = block_tile(args.block.shape, args.block.plan, block);
    rest.then([&](Rest& self) { self.begin_image(tile); });
    const AttentionShape& a = args.attention.shape;
    for (int window = 0; window < a.windows_h * a.windows_w; ++window) {
      heads.then(
          [&](Heads& self) { self.turn_to(tile.n, window / a.windows_w, window % a.windows_w); });
      Heads::attend(args.attention, heads, 0, args.attention.plan.heads,
                    [&](const Heads& self, int64_t pixel) {
                      const BlockPlan& plan = args.block.plan;
                      return self.part(plan.x) + static_cast<int>(pixel) * plan.x_stride;
                    });
    }
    Rest::march(tile, rest);
  }

 private:
  Heads heads_;
  Rest rest_;
};

}  // namespace emo_kernels::cuda
