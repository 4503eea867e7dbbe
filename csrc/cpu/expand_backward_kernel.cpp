// Computes  the gradients of e = act(a), a = W n + b, n = norm(x), from de = grad + drop_scale
//           Wo^T out_grad (the local skip): da = de act'(a), dn = W^T da, dW = da^T n, db = sum da,
//           then the norm's own gradient, or its sums.
// Tiling    up to 224 pixels at a time: n, out_grad and dn stay in the L2 cache while panels of
//           expanded channels pass. Of each panel a and Wo^T out_grad are recomputed, da
//           replaces a in the L1 cache, and feeds both dn and dW: no map of the
//           expanded width is written.
// Traffic   reads grad, x, out_grad and residual once, writes dx once; weights and a
//           thread's dW pass once every 224 pixels.
// Numerics  sums of products in the type it computes in (of operands rounded to bfloat16 where they
//           are multiplied in pairs), dW over up to 224 pixels at a time; sums over pixels of up to
//           8 terms in it too, those sums in double; threads in order.
// Limits    ungrouped.
#include "cpu/expand_gradient.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

using Call = ExpandBackwardCall;

template <class E>
struct Layout : ExpandGradient<E> {
  using T = SumOf<E>;
  Blocked<E> skip, g;  // Wo as (O, M), shared; out_grad, own
  T* d;                // own: a panel's tile

  static int64_t pixels(const Call& c) {
    constexpr int64_t P = kPanel<T>;
    return most_pixels<T>(2 * ceil_div(c.C, P) * P + ceil_div(c.O, P) * P + 2 * P);
  }

  Layout(const Call& c, Places& shared, Places& own)
      : ExpandGradient<E>(c, pixels(c), shared, own) {
    skip = Blocked<E>::at(shared, c.O, c.out_grad ? c.M : 0);
    g = Blocked<E>::at(own, this->most, c.out_grad ? c.O : 0);
    d = own.take<T>((this->most + kMostGemmRows) * kPanel<T>);
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
  const T *a, *d;   // tiles; d null: no local skip
  const S* grad;    // at the panel's first channel
  int64_t M, next;  // channels of a pixel, and from here to the next panel
  int64_t rows, channels;
  double* dbias;
  E* da;

  // da = (grad + d) act'(a), and its sums over the pixels.
  template <Activation kAct>
  void differentiate() const {
    sum_rows<T>(rows, channels, dbias, nullptr,
                [&](int64_t i, int64_t lane, int64_t count, V& sum, V&)
                    __attribute__((always_inline)) {
                      fetch(grad + i * M + lane + next);
                      V v = load_as<V>(grad + i * M + lane, count);
                      if (d) v += load<V>(d + i * P + lane);
                      v *= activate_slope<T, kAct>(load<V>(a + i * P + lane));
                      store_as(da + i * P + lane, v);
                      sum = v;
                    });
    if (channels % kTerms<E> != 0) clear_channel(da + channels, rows);
  }
};

template <class T, class S, class E>
void step(const Call& c, const Layout<E>& l, int64_t first, int64_t rows) {
  constexpr int64_t P = kPanel<T>;
  const S* const grad = static_cast<const S*>(c.grad);
  const T* const drop = static_cast<const T*>(c.drop_scale);
  const Blocked<E> n = l.template normalize<S>(c, first, rows);
  if (c.out_grad) {
    load_rows(static_cast<const S*>(c.out_grad) + first * c.O, c.O, rows, l.g,
              [&](int64_t i) { return drop ? drop[(first + i) / c.pixels] : T(1); });
  }
  for (int64_t p = 0; p < l.panels; ++p) {
    const int64_t channels = min<int64_t>(P, c.M - p * P);
    l.activation(c, p, rows);
    if (c.out_grad) {
      product<E, false>({l.g.data, l.g.stride(), l.skip.panel(p), c.O, l.d, rows, nullptr, false},
                        panel_width<T>(channels));
    }
    const Panel<T, S, E> panel{l.a,
                               c.out_grad ? l.d : nullptr,
                               grad + first * c.M + p * P,
                               c.M,
                               next_panel<T>(p, c.M, rows),
                               rows,
                               channels,
                               l.dbias + p * P,
                               l.da};
    with_activation(c.act, [&](auto act) { panel.template differentiate<decltype(act)::value>(); });
    l.multiply(c, p, rows, n);
  }
  l.template finish<S>(c, first, rows);
}

template <class T, class S>
void run(const Call& call, const Share& share) {
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<TermOf<S>> l(call, shared, own);
  l.prepare(call, share);
  if (call.out_grad) {
    each_of_mine(l.panels, share, [&](int64_t p) {
      pack_straight(static_cast<const T*>(call.out_weight), call.O, l.skip, p);
    });
  }
  team_barrier();
  each_step(call.N * call.pixels, l.most, share.thread, share.threads,
            [&](int64_t first, int64_t rows) { step<T, S>(call, l, first, rows); });
  team_barrier();
  l.reduce(call, share);
}

template <class T, class S>
constexpr Kernel<Call> kKernel = {scratch<TermOf<S>>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(ExpandBackwardCall, expand_backward_kernel)

}  // namespace emo_kernels::cpu
