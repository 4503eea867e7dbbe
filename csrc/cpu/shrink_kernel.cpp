// Computes  out = residual + drop_scale W t, t = local + gate silu(scale y + shift): batch norm,
//           SiLU, skip and projection of a training step; and the sums of out that the next
//           block's batch norm wants.
// Tiling    up to 224 pixels at a time; panels of expanded channels pass: t of one panel is formed
//           in the L1 cache and multiplied into all outputs, which stay in the L2 cache.
// Traffic   reads y, local and residual once, writes out once.
// Numerics  sums in the type it computes in, panel by panel; the same bits for any split. Those for
//           a batch norm in double, of what was stored, while it is in the cache.
// Limits    none on sizes.
#include "cpu/launch.h"
#include "cpu/moments.h"
#include "cpu/norm_rows.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

template <class E>
struct Layout {
  using T = SumOf<E>;
  int64_t most, panels;
  Blocked<E> weight;  // shared: the transpose, (M, O)
  T *scale, *shift, *pivot;
  double* sums;    // own: [2][panels of O * P]
  Blocked<T> acc;  // own
  E* t;

  Layout(const ShrinkCall& c, Places& shared, Places& own) {
    constexpr int64_t P = kPanel<T>;
    panels = ceil_div(c.M, P);
    most = most_pixels<T>(ceil_div(c.O, P) * P + P);
    weight = Blocked<E>::at(shared, c.M, c.O);
    scale = shared.take<T>(panels * P);
    shift = shared.take<T>(panels * P);
    pivot = shared.take<T>(weight.panels() * P);
    sums = own.take<double>(2 * weight.panels() * P);
    acc = Blocked<T>::at(own, most, c.O);
    t = own.take<E>((most + kMostGemmRows) * P);
  }
};

template <class E>
ScratchBytes scratch(const ShrinkCall& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<E> layout(call, shared, own);
  return {shared.used, own.used};
}

// t of one panel.
template <class T, class S, class E>
void activate_panel(const ShrinkCall& c, const Layout<E>& l, int64_t first, int64_t rows,
                    int64_t p) {
  using V = Vec<T, kLanesOf<T>>;
  constexpr int64_t P = kPanel<T>;
  const int64_t m = p * P, channels = min<int64_t>(P, c.M - m);
  const S *y = static_cast<const S*>(c.y), *local = static_cast<const S*>(c.local);
  const T* const gate = static_cast<const T*>(c.gate);
  const int64_t next = next_panel<T>(p, c.M, rows);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (first + i) * c.M + m;
    const T* const gates = gate ? gate + (first + i) / c.pixels * c.M + m : nullptr;
    each_lane_of<T>(channels, [&](int64_t lane, int64_t count) __attribute__((always_inline)) {
      fetch(y + at + lane + next);
      if (local) fetch(local + at + lane + next);
      V v = silu<T>(fma(load_as<V>(y + at + lane, count), load<V>(l.scale + m + lane),
                        load<V>(l.shift + m + lane)));
      if (gates) v *= load_as<V>(gates + lane, count);
      if (local) v += load_as<V>(local + at + lane, count);
      store_as(l.t + i * P + lane, v);
    });
  }
}

template <class T, class S, class E>
void store_rows(const ShrinkCall& c, const Layout<E>& l, int64_t first, int64_t rows) {
  using V = Vec<T, kLanesOf<T>>;
  const S* const residual = static_cast<const S*>(c.residual);
  const T* const drop = static_cast<const T*>(c.drop_scale);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (first + i) * c.O;
    const T factor = drop ? drop[(first + i) / c.pixels] : T(1);
    each_lane_of<T>(c.O, [&](int64_t o, int64_t count) __attribute__((always_inline)) {
      V v = load<V>(l.acc.panel(o / kPanel<T>) + i * kPanel<T> + o % kPanel<T>);
      if (drop) v *= factor;
      if (residual) v += load_as<V>(residual + at + o, count);
      store_as(static_cast<S*>(c.out) + at + o, v, count);
    });
  }
}

template <class T, class S>
void run(const ShrinkCall& call, const Share& share) {
  constexpr int64_t P = kPanel<T>;
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<TermOf<S>> l(call, shared, own);
  each_of_mine(l.weight.panels(), share, [&](int64_t p) {
    const T* const pivot = static_cast<const T*>(call.pivot);
    pack_transposed(static_cast<const T*>(call.weight), call.M, l.weight, p);
    copy_padded<T>(pivot ? pivot + p * P : nullptr, l.weight.channels(p), l.pivot + p * P, P);
  });
  fill_zero(l.sums, 2 * l.weight.panels() * P);
  if (share.thread == 0) {
    const T *scale = static_cast<const T*>(call.scale), *shift = static_cast<const T*>(call.shift);
    for (int64_t m = 0; m < l.panels * P; ++m) {
      l.scale[m] = m >= call.M ? T(0) : scale ? scale[m] : T(1);
      l.shift[m] = m < call.M && shift ? shift[m] : T(0);
    }
  }
  team_barrier();
  each_step(call.N * call.pixels, l.most, share.thread, share.threads,
            [&](int64_t first, int64_t rows) {
              for (int64_t p = 0; p < l.panels; ++p) {
                activate_panel<T, S>(call, l, first, rows, p);
                const int64_t channels = min<int64_t>(P, call.M - p * P);
                multiply_all(l.t, 0, channels, rows, l.weight, p * P, l.acc, p > 0);
              }
              store_rows<T, S>(call, l, first, rows);
              if (call.sums == nullptr) return;
              add_moments(static_cast<const S*>(call.out) + first * call.O, rows, call.O, call.O,
                          l.pivot, l.sums, l.sums + l.weight.panels() * P);
            });
  if (call.sums == nullptr) return;
  team_barrier();
  each_of_mine(2 * call.O, share, [&](int64_t i) {
    const int64_t at = i / call.O * l.weight.panels() * P + i % call.O;
    call.sums[i] = total(l.sums + at, share);
  });
}

template <class T, class S>
constexpr Kernel<ShrinkCall> kKernel = {scratch<TermOf<S>>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(ShrinkCall, shrink_kernel)

}  // namespace emo_kernels::cpu
