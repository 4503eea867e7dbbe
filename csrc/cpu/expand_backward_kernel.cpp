// Computes  the gradients of e = act(a), a = W n + b, n = norm(x), from de = grad + drop_scale
//           Wo^T out_grad (the local skip): da = de act'(a), dn = W^T da, dW = da^T n, db = sum da,
//           then the norm's own gradient, or its sums.
// Tiling    up to 224 pixels at a time: n, out_grad and dn stay in the L2 cache while panels of
//           expanded channels pass. Of each panel a (unless act'(a) was kept) and Wo^T out_grad are
//           recomputed, da replaces a in the L1 cache, and feeds both dn and dW: no map of the
//           expanded width is written.
// Traffic   reads grad, slope, x, out_grad and residual once, writes dx once; weights and a
//           thread's dW pass once every 224 pixels.
// Numerics  sums of products in the type it computes in (of operands rounded to bfloat16 where they
//           are multiplied in pairs), dW over up to 224 pixels at a time; sums over pixels of up to
//           8 terms in it too, those sums in double; threads in order.
// Limits    ungrouped.
#include "cpu/launch.h"
#include "cpu/norm_rows.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

using Call = ExpandBackwardCall;

template <class E>
struct Layout {
  using T = SumOf<E>;
  int64_t most, panels;                // of expanded channels
  Blocked<E> forward, backward, skip;  // shared: W^T as (C, M), W as (M, C), Wo as (O, M)
  T* bias;
  NormRows<T> norm;
  double *dbias, *sums;      // own: [panels of M * P], [2][panels of C * P]
  Blocked<T> dweight, dn;    // own: (M, C), (pixels, C)
  Blocked<E> n, n_pairs, g;  // own
  T *a, *d;                  // own: a panel's tiles
  E *da, *da_pairs;          // own: da is a where operands are of the sums' type

  Layout(const Call& c, Places& shared, Places& own) {
    constexpr int64_t P = kPanel<T>;
    most = most_pixels<T>(2 * ceil_div(c.C, P) * P + ceil_div(c.O, P) * P + 2 * P);
    panels = ceil_div(c.M, P);
    forward = Blocked<E>::at(shared, c.C, c.slope ? 0 : c.M);
    backward = Blocked<E>::at(shared, c.M, c.C);
    skip = Blocked<E>::at(shared, c.O, c.out_grad ? c.M : 0);
    bias = shared.take<T>(panels * P);
    dbias = own.take<double>(panels * P);
    sums = own.take<double>(2 * backward.panels() * P);
    dweight = Blocked<T>::at(own, c.dweight ? c.M : 0, c.C);
    norm = NormRows<T>::at(c.norm, c.C, c.eps, most, shared, own);
    n = Blocked<E>::at(own, most, c.C);
    n_pairs = Blocked<E>::at(own, kTerms<E> > 1 ? most : 0, c.C);
    g = Blocked<E>::at(own, most, c.out_grad ? c.O : 0);
    dn = Blocked<T>::at(own, most, c.C);
    a = own.take<T>((most + kMostGemmRows) * P);
    d = own.take<T>((most + kMostGemmRows) * P);
    if constexpr (kTerms<E> == 1) {
      da = da_pairs = a;
    } else {
      da = own.take<E>((most + kMostGemmRows) * P);
      da_pairs = own.take<E>((most + kMostGemmRows) * P);
    }
  }
};

template <class E>
ScratchBytes scratch(const Call& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<E> layout(call, shared, own);
  return {shared.used, own.used};
}

// One panel of channels of some pixels.
template <class T, class S, class E>
struct Panel {
  using V = Vec<T, kLanesOf<T>>;
  static constexpr int64_t P = kPanel<T>;
  const T *a, *d;         // tiles; d null: no local skip
  const S *grad, *slope;  // at the panel's first channel; slope null: of a
  int64_t M, next;        // channels of a pixel, and from here to the next panel
  int64_t rows, channels;
  double* dbias;
  E* da;

  // da = (grad + d) times what slope_of(pixel, lane, count) gives, and its sums over the pixels.
  template <class F>
  EMO_INLINE void differentiate(F slope_of) const {
    sum_rows<T>(rows, channels, dbias, nullptr,
                [&](int64_t i, int64_t lane, int64_t count, V& sum, V&)
                    __attribute__((always_inline)) {
                      fetch(grad + i * M + lane + next);
                      V v = load_as<V>(grad + i * M + lane, count);
                      if (d) v += load<V>(d + i * P + lane);
                      v *= slope_of(i, lane, count);
                      store_as(da + i * P + lane, v);
                      sum = v;
                    });
    if (channels % kTerms<E> != 0) clear_channel(da + channels, rows);
  }

  void differentiate_kept() const {
    differentiate([&](int64_t i, int64_t lane, int64_t count) __attribute__((always_inline)) {
      fetch(slope + i * M + lane + next);
      return load_as<V>(slope + i * M + lane, count);
    });
  }

  template <Activation kAct>
  void differentiate_of() const {
    differentiate([&](int64_t i, int64_t lane, int64_t) __attribute__((always_inline)) {
      return activate_slope<T, kAct>(load<V>(a + i * P + lane));
    });
  }

  void differentiate(Activation act) const {
    if (slope) return differentiate_kept();
    switch (act) {
      case Activation::kNone:
        return differentiate_of<Activation::kNone>();
      case Activation::kRelu:
        return differentiate_of<Activation::kRelu>();
      case Activation::kGelu:
        return differentiate_of<Activation::kGelu>();
      case Activation::kSilu:
        return differentiate_of<Activation::kSilu>();
    }
  }
};

template <class T, class S>
void add_to_blocked(const S* map, int64_t C, int64_t rows, const Blocked<T>& to) {
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t i = 0; i < rows; ++i, map += C) {
    each_lane_of<T>(C, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      T* const at = to.panel(c / kPanel<T>) + i * kPanel<T> + c % kPanel<T>;
      store(at, load<V>(at) + load_as<V>(map + c, count));
    });
  }
}

template <class T, class S, class E>
void step(const Call& c, const Layout<E>& l, int64_t first, int64_t rows) {
  constexpr int64_t P = kPanel<T>;
  const S* const x = static_cast<const S*>(c.x) + first * c.C;
  const S *grad = static_cast<const S*>(c.grad), *slope = static_cast<const S*>(c.slope);
  const T* const drop = static_cast<const T*>(c.drop_scale);
  l.norm.forward(x, rows, l.n);
  if (c.out_grad) {
    load_rows(static_cast<const S*>(c.out_grad) + first * c.O, c.O, rows, l.g,
              [&](int64_t i) { return drop ? drop[(first + i) / c.pixels] : T(1); });
  }
  const bool wants_dn = c.dx || c.sums;
  const Blocked<E> n = c.dweight ? across(l.n, rows, l.n_pairs) : l.n;
  for (int64_t p = 0; p < l.panels; ++p) {
    const int64_t channels = min<int64_t>(P, c.M - p * P), width = panel_width<T>(channels);
    const int64_t at = first * c.M + p * P;
    if (slope == nullptr) {
      product<E, false>(
          {l.n.data, l.n.stride(), l.forward.panel(p), c.C, l.a, rows, l.bias + p * P, false},
          width);
    }
    if (c.out_grad) {
      product<E, false>({l.g.data, l.g.stride(), l.skip.panel(p), c.O, l.d, rows, nullptr, false},
                        width);
    }
    const Panel<T, S, E> panel{l.a,
                               c.out_grad ? l.d : nullptr,
                               grad + at,
                               slope ? slope + at : nullptr,
                               c.M,
                               next_panel<T>(p, c.M, rows),
                               rows,
                               channels,
                               l.dbias + p * P,
                               l.da};
    panel.differentiate(c.act);
    if (wants_dn) multiply_all(l.da, 0, channels, rows, l.backward, p * P, l.dn, p > 0);
    if (c.dweight) {
      const E* const da = across<E>(l.da, rows, channels, l.da_pairs);
      multiply_transposed(da, rows, channels, n, l.dweight, p * P);
    }
  }
  if (!wants_dn) return;
  if (c.norm_grad)
    add_to_blocked(static_cast<const S*>(c.norm_grad) + first * c.C, c.C, rows, l.dn);
  if (c.sums) l.norm.add_sums(x, rows, l.dn, l.sums);
  if (c.dx == nullptr) return;
  const S* const residual = static_cast<const S*>(c.residual);
  S* const dx = static_cast<S*>(c.dx) + first * c.C;
  for (int64_t i = 0; i < rows; ++i) {
    l.norm.pixel_backward(x + i * c.C, i, l.dn.data + i * P, l.dn.stride(), c.behind_norm,
                          residual ? residual + (first + i) * c.C : nullptr, dx + i * c.C);
  }
}

template <class T, class S>
void run(const Call& call, const Share& share) {
  constexpr int64_t P = kPanel<T>;
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<TermOf<S>> l(call, shared, own);
  const T *weight = static_cast<const T*>(call.weight), *bias = static_cast<const T*>(call.bias);
  each_of_mine(l.panels, share, [&](int64_t p) {
    if (call.slope == nullptr) {
      pack_transposed(weight, call.C, l.forward, p);
      copy_padded<T>(bias ? bias + p * P : nullptr, l.forward.channels(p), l.bias + p * P, P);
    }
    if (call.out_grad) {
      pack_straight(static_cast<const T*>(call.out_weight), call.O, l.skip, p);
    }
  });
  each_of_mine(l.backward.panels(), share,
               [&](int64_t p) { pack_straight(weight, call.M, l.backward, p); });
  if (share.thread == 0) {
    l.norm.fill(call.norm_weight, call.norm_bias, call.mean, call.invstd);
  }
  fill_zero(l.dbias, l.panels * P);
  fill_zero(l.sums, 2 * l.backward.panels() * P);
  if (call.dweight) fill_zero(l.dweight.data, l.dweight.panels() * l.dweight.stride());
  team_barrier();
  each_step(call.N * call.pixels, l.most, share.thread, share.threads,
            [&](int64_t first, int64_t rows) { step<T, S>(call, l, first, rows); });
  team_barrier();
  if (call.dbias)
    each_of_mine(call.M, share, [&](int64_t m) { call.dbias[m] = total(l.dbias + m, share); });
  if (call.sums) {
    each_of_mine(call.C, share, [&](int64_t c) {
      call.sums[c] = total(l.sums + c, share);
      call.sums[call.C + c] = total(l.sums + l.backward.panels() * P + c, share);
    });
  }
  if (call.dweight) add_up(l.dweight, call.M, static_cast<T*>(call.dweight), share);
}

template <class T, class S>
constexpr Kernel<Call> kKernel = {scratch<TermOf<S>>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(ExpandBackwardCall, expand_backward_kernel)

}  // namespace emo_kernels::cpu
