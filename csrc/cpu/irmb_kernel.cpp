// Computes  the convolutional iRMB in inference: u = act(Wv norm(x) + bv), c = SiLU(BN(DWConv(u))),
//           out = x + gamma Wp (u + gate c) (SPEC of the EMO block, steps 1 to 9 without
//           attention).
// Tiling    a thread walks its output rows; per tile it normalises the new input rows, expands them
//           panel by panel (48 channels with AVX-512) into a ring of halo rows, runs the depthwise
//           convolution out of the ring and contracts the result: only x and out leave the L2
//           cache.
// Traffic   reads x once (plus halo rows between threads) and the weights once, writes out once:
//           stage 2 of EMO-5M, batch 1: 0.57 MB for 51.8 MFLOP, 91 FLOP/byte.
// Numerics  accumulates in the element type over k = 0, 1, ...; batch norm in front is applied to
// x,
//           the one behind the depthwise convolution folded (in fp64) into its weights.
// Limits    fp32 (fp64 at portable width); no attention; depthwise kernels up to 64 taps a side.
#include "cpu/depthwise.h"
#include "cpu/gemm.h"
#include "cpu/irmb_plan.h"
#include "cpu/irmb_stages.h"

namespace emo_kernels::cpu {
namespace {

// A contiguous share of `count` things for this thread.
EMO_INLINE int64_t share(int64_t count, int thread, int threads) {
  return count * thread / threads;
}

template <class T>
void run_by_rows(Stages<T>& s, int thread, int threads, bool sums_only) {
  const IrmbPlan& plan = s.plan;
  const int64_t total = plan.call.N * plan.Ho;
  const int64_t end = share(total, thread + 1, threads);
  for (int64_t row = share(total, thread, threads); row < end;) {
    const int64_t n = row / plan.Ho, first = row - n * plan.Ho;
    const int64_t last = min(plan.Ho, first + end - row);
    for (int64_t column = 0; column < plan.Wo; column += plan.block_columns) {
      s.set_block(n, column, min(plan.Wo, column + plan.block_columns));
      for (int64_t panel = 0; panel < plan.panels_m; panel += plan.group_panels) {
        s.set_group(panel, min(plan.panels_m, panel + plan.group_panels));
        int64_t expanded = 0;  // input rows below this one are in the ring or past
        for (int64_t y = first; y < last; y += plan.tile_rows) {
          const int64_t tile_end = min(last, y + plan.tile_rows);
          expanded = s.expand_for(y, tile_end, expanded);
          s.depthwise(y, tile_end, sums_only);
          if (!sums_only) s.shrink(y, tile_end);
        }
      }
    }
    row += last - first;
  }
}

template <class T>
void run_by_panels(Stages<T>& s, int thread, int threads, void (*barrier)()) {
  const IrmbPlan& plan = s.plan;
  const int64_t first = share(plan.panels_m, thread, threads);
  const int64_t last = share(plan.panels_m, thread + 1, threads);
  for (int64_t n = 0; n < plan.call.N; ++n) {
    s.set_block(n, 0, plan.Wo);
    for (int64_t panel = first; panel < last; ++panel) {
      s.set_group(panel, panel + 1);
      s.expand_for(0, plan.Ho, 0);
      s.depthwise(0, plan.Ho, false);
    }
    barrier();
    s.shrink_share(thread, threads);
    if (n + 1 < plan.call.N) barrier();
  }
}

template <class T>
void run(const IrmbPlan& plan, void* shared, void* own, int64_t* offsets, int thread, int threads,
         void (*barrier)()) {
  Stages<T> s(plan, static_cast<T*>(shared), static_cast<T*>(own), offsets);
  s.pack(share(plan.panels_m, thread, threads), share(plan.panels_m, thread + 1, threads),
         share(plan.panels_o, thread, threads), share(plan.panels_o, thread + 1, threads),
         thread == 0);
  if (plan.by_panels) {
    run_by_panels(s, thread, threads, barrier);
    return;
  }
  barrier();
  if (plan.call.R > 0) {
    run_by_rows(s, thread, threads, true);
    barrier();
    const int64_t N = plan.call.N;
    for (int64_t n = share(N, thread, threads); n < share(N, thread + 1, threads); ++n) s.gate(n);
    barrier();
    s.gates_ready = true;
  }
  run_by_rows(s, thread, threads, false);
}

template <class T>
constexpr IrmbKernel kKernel = {kPanel<T>, kMostGemmRows, kChunk / kPanel<T>, run<T>};

}  // namespace

#define EMO_CONCAT_(a, b, c) a##b##c
#define EMO_CONCAT(a, b, c) EMO_CONCAT_(a, b, c)

const IrmbKernel& EMO_CONCAT(irmb_kernel_, EMO_ISA, _f32)() { return kKernel<float>; }
#if defined(EMO_ISA_PORTABLE)
const IrmbKernel& irmb_kernel_portable_f64() { return kKernel<double>; }
#endif

}  // namespace emo_kernels::cpu
