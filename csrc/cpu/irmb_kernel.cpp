// Computes  the convolutional iRMB in inference: u = act(Wv norm(x) + bv), c = SiLU(BN(DWConv(u))),
//           out = x + gamma Wp (u + gate c) (SPEC of the EMO block, steps 1 to 9 without
//           attention).
// Tiling    a thread walks its output rows; per tile it normalises the new input rows, expands them
//           panel by panel (48 channels with AVX-512) into a ring of halo rows, runs the depthwise
//           convolution out of the ring and contracts the result: only x and out leave the L2
//           cache. Small maps at batch 1 go panel by panel instead, all pixels at once, so that
//           weights are packed right before their use, fetched while the panel before computes.
// Traffic   reads x once (plus halo rows between threads) and the weights once, writes out once:
//           stage 2 of EMO-5M, batch 1: 0.57 MB for 51.8 MFLOP, 91 FLOP/byte.
// Numerics  accumulates in the element type over k = 0, 1, ...; the norm in front is applied to x,
//           the one behind the depthwise convolution folded (in fp64) into its weights. Maps in
//           bf16 are computed with in fp32; with AVX-512 BF16 the operands of the GEMMs are rounded
//           to bf16, where eager rounds them too, and take denormals for zero.
// Limits    fp32, bf16 (fp64 at portable width); ungrouped expansion; depthwise kernels up to 64
//           taps a side.
#include "cpu/attention.h"
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

template <class Ty>
void run_by_rows(Stages<Ty>& s, int64_t images, int thread, int threads, bool sums_only) {
  const IrmbPlan& plan = s.plan;
  const int64_t total = images * plan.Ho;
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

// A panel's weights are fetched while the one before it computes, and packed when they are due.
template <class Ty>
void run_by_panels(Stages<Ty>& s, int64_t images, int thread, int threads, void (*barrier)()) {
  const IrmbPlan& plan = s.plan;
  const int64_t first = share(plan.panels_m, thread, threads);
  const int64_t last = share(plan.panels_m, thread + 1, threads);
  const int64_t output = s.first_share(thread, threads);
  for (int64_t n = 0; n < images; ++n) {
    s.set_block(n, 0, plan.Wo);
    for (int64_t panel = first; panel < last; ++panel) {
      s.pack_expanded(panel);
      s.ahead = panel + 1 < last         ? expansion_of<typename Ty::T>(plan, panel + 1)
                : output < plan.panels_o ? s.projection_of(output)
                                         : Ahead{};
      s.set_group(panel, panel + 1);
      s.expand_for(0, plan.Ho, 0);
      s.depthwise(0, plan.Ho, false);
    }
    barrier();
    s.shrink_share(thread, threads);
    if (n + 1 < images) barrier();
  }
}

template <class Ty>
void run_squeeze_excite(Stages<Ty>& s, int64_t images, int thread, int threads, void (*barrier)()) {
  s.gates_ready = false;
  run_by_rows(s, images, thread, threads, true);
  barrier();
  const int64_t last = share(images, thread + 1, threads);
  for (int64_t n = share(images, thread, threads); n < last; ++n) s.gate(n);
  barrier();
  s.gates_ready = true;
}

template <class Ty>
void attend(Attention<Ty>& attention, const IrmbPlan& plan, int64_t image0, int64_t images,
            int thread, int threads, void (*barrier)()) {
  const AttentionPlan& a = plan.attention;
  if (plan.by_panels) {
    attention.ahead = expansion_of<typename Ty::T>(plan, share(plan.panels_m, thread, threads));
  }
  const int64_t units = images * a.n1 * a.n2 * a.heads;
  const int64_t first = share(units, thread, threads), last = share(units, thread + 1, threads);
  if (a.grid) {
    attention.run(image0, first, last, true, false, thread);
    barrier();
  }
  if (a.block) {
    attention.run(image0, first, last, false, a.grid, thread);
    barrier();
  }
}

template <class Ty>
void run(const IrmbPlan& plan, void* shared_buffer, void* own_buffer, int64_t* offsets, int thread,
         int threads, void (*barrier)()) {
  using T = typename Ty::T;
  using Map = typename Ty::Map;
  const IrmbCall& call = plan.call;
  T *const shared = static_cast<T*>(shared_buffer), *const own = static_cast<T*>(own_buffer);
  const auto mine = [&](int64_t count, auto pack) {
    const int64_t last = share(count, thread + 1, threads);
    for (int64_t i = share(count, thread, threads); i < last; ++i) pack(i);
  };
  const Map* const x = static_cast<const Map*>(call.x);
  const int64_t in = call.H * call.W * call.C, out = plan.Ho * plan.Wo * call.O;
  for (int64_t image = 0; image < call.N; image += plan.images) {
    const int64_t images = min(plan.images, call.N - image);
    if (image > 0) barrier();
    if (plan.attention.attends) {
      Attention<Ty> attention(plan, shared, own, offsets);
      if (image == 0) {
        mine(2 * plan.attention.heads, [&](int64_t slot) { attention.pack(slot); });
        barrier();
      }
      attend(attention, plan, image, images, thread, threads, barrier);
    }
    Stages<Ty> s(plan, shared, own, offsets);
    const Map* const z = reinterpret_cast<const Map*>(shared + plan.attention.z);
    s.set_images(plan.attention.attends ? z : x + image * in, x + image * in,
                 static_cast<Map*>(call.out) + image * out);
    if (image == 0) {
      if (thread == 0) s.pack_gamma();
      if (!plan.by_panels) {
        mine(plan.panels_o, [&](int64_t panel) { s.pack_outputs(panel); });
        mine(plan.panels_m, [&](int64_t panel) { s.pack_expanded(panel); });
        barrier();
      }
    }
    if (plan.by_panels) {
      run_by_panels(s, images, thread, threads, barrier);
    } else {
      if (call.R > 0) run_squeeze_excite(s, images, thread, threads, barrier);
      run_by_rows(s, images, thread, threads, false);
    }
  }
}

// Groups of channels are whole chunks of a sum where sums are added chunk by chunk.
template <class T, class Map, class Term>
constexpr IrmbKernel kKernel = {kPanel<T>,
                                kMostGemmRows,
                                kTerms<Term> == 1 ? kChunk / kPanel<T> : 1,
                                sizeof(T),
                                sizeof(Map),
                                sizeof(Term),
                                run<Types<T, Map, Term>>};

}  // namespace

#define EMO_CONCAT_(a, b, c) a##b##c
#define EMO_CONCAT(a, b, c) EMO_CONCAT_(a, b, c)

#if defined(EMO_ISA_AVX512BF16)
const IrmbKernel& irmb_kernel_avx512bf16_bf16() { return kKernel<float, BFloat16, BFloat16>; }
#else
const IrmbKernel& EMO_CONCAT(irmb_kernel_, EMO_ISA, _bf16)() {
  return kKernel<float, BFloat16, float>;
}
const IrmbKernel& EMO_CONCAT(irmb_kernel_, EMO_ISA, _f32)() { return kKernel<float, float, float>; }
#endif
#if defined(EMO_ISA_PORTABLE)
const IrmbKernel& irmb_kernel_portable_f64() { return kKernel<double, double, double>; }
#endif

}  // namespace emo_kernels::cpu
