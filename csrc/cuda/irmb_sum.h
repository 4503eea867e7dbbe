// Computes: out = residual + gamma sum_s partials[s], each term where it exists: the end of a block
//     whose expanded channels were shared out.
// Tiling: an element of the output for each thread.
// Traffic: partials (splits, N HO WO, O) in fp32 once, the residual, out.
// Numerics: fp32, split by split, rounded once: where M is shared out depends on the shapes alone.
// Limits: none.
#pragma once

#include "cuda/irmb_block.h"

namespace emo_kernels::cuda {

// The arguments of the block whose sums they are.
template <class T>
struct SumOfBlock {
  BlockArgs<T> block;
};

template <class T>
class BlockSum {
 public:
  using Args = SumOfBlock<T>;

  EMO_KERNEL BlockSum(const Args& args, const Place& place, void*)
      : args_(args.block), at_(place.block * kBlockThreads + place.group) {}

  static int64_t shared_bytes(const Args&) { return 0; }

  template <class Each>
  EMO_KERNEL static void run(const Args&, int64_t, const Each& each) {
    each.then([](BlockSum& self) { self.sum(); });
  }

 private:
  EMO_KERNEL void sum() {
    const BlockShape& s = args_.shape;
    const int64_t size = s.N * s.HO * s.WO * s.O;
    if (at_ >= size) return;
    float y = 0.0f;
    for (int split = 0; split < args_.plan.splits; ++split) {
      y += read(args_.partials + split * size + at_);
    }
    const int o = static_cast<int>(at_ % s.O);
    write(args_.out + at_, narrow<T>(finished<float>(args_, at_, o, y)));
  }

  const BlockArgs<T>& args_;
  const int64_t at_;
};

}  // namespace emo_kernels::cuda
