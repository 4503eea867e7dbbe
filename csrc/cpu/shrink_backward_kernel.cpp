// Computes  the gradients of out = residual + drop W t, t = local + gate c, c = silu(z), z = scale
// y
//           + shift, from g at out: dt = drop W^T g, dz = dt gate silu'(z), its sums, dW = (drop
//           g)^T t, dgate = sum dt c, ddrop = sum (W^T g) t.
// Tiling    up to 224 pixels at a time: g stays in the L2 cache while panels of expanded channels
//           pass; of each, dt is a GEMM, t is recomputed, dz written, t multiplied into dW.
// Traffic   reads grad, y and local once, writes dz (and dlocal) once, past the caches where they
//           are large; weight and a thread's dW pass once every 224 pixels.
// Numerics  as expand_backward's.
// Limits    none on sizes.
#include "cpu/launch.h"
#include "cpu/norm_rows.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

using Call = ShrinkBackwardCall;

template <class E>
struct Layout {
  using T = SumOf<E>;
  int64_t most, padded;              // padded: channels in whole panels
  Blocked<E> weight;                 // shared: (O, M)
  T *scale, *shift, *mean, *invstd;  // shared
  double *sums, *dgate, *ddrop;      // own: [2][padded], [N][padded], [N]
  Blocked<T> dweight;                // own: (O, M)
  Blocked<E> g, g_pairs;             // own
  T *d, *t;                          // own: tiles of a panel
  E* t_pairs;                        // own: unused where operands are of the sums' type
  T* drop;                           // own: of the pixels at hand

  Layout(const Call& c, Places& shared, Places& own) {
    constexpr int64_t P = kPanel<T>;
    padded = ceil_div(c.M, P) * P;
    most = most_pixels<T>(ceil_div(c.O, P) * P + 2 * P);
    weight = Blocked<E>::at(shared, c.O, c.M);
    scale = shared.take<T>(padded);
    shift = shared.take<T>(padded);
    mean = shared.take<T>(padded);
    invstd = shared.take<T>(padded);
    sums = own.take<double>(2 * padded);
    dgate = own.take<double>(c.dgate ? c.N * padded : 0);
    ddrop = own.take<double>(c.ddrop ? c.N : 0);
    dweight = Blocked<T>::at(own, c.dweight ? c.O : 0, c.M);
    g = Blocked<E>::at(own, most, c.O);
    g_pairs = Blocked<E>::at(own, kTerms<E> > 1 ? most : 0, c.O);
    d = own.take<T>((most + kMostGemmRows) * P);
    t = own.take<T>((most + kMostGemmRows) * P);
    t_pairs = own.take<E>(kTerms<E> > 1 ? (most + kMostGemmRows) * P : 0);
    drop = own.take<T>(most);
  }
};

template <class E>
ScratchBytes scratch(const Call& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<E> layout(call, shared, own);
  return {shared.used, own.used};
}

// One panel of channels of the pixels [first, first + rows).
template <class T, class S, class E = TermOf<S>>
struct Panel {
  using V = Vec<T, kLanesOf<T>>;
  static constexpr int64_t P = kPanel<T>;
  const Call& c;
  const Layout<E>& l;
  int64_t first, rows, m, channels;
  const S *y, *local;
  const T* gate;

  Panel(const Call& call, const Layout<E>& layout, int64_t p0, int64_t count, int64_t p)
      : c(call),
        l(layout),
        first(p0),
        rows(count),
        m(p * P),
        channels(min<int64_t>(P, c.M - m)),
        y(static_cast<const S*>(c.y) + first * c.M + m),
        local(c.local ? static_cast<const S*>(c.local) + first * c.M + m : nullptr),
        gate(c.gate ? static_cast<const T*>(c.gate) + m : nullptr) {}

  EMO_INLINE const T* gates(int64_t i) const {
    return gate ? gate + (first + i) / c.pixels * c.M : nullptr;
  }
  EMO_INLINE V z(V value, int64_t lane) const {
    return fma(value, load<V>(l.scale + m + lane), load<V>(l.shift + m + lane));
  }

  // dz, its sums, dlocal, and t times the drop scale.
  void differentiate() const {
    const int64_t all = c.N * c.pixels;
    const auto dy = WrittenMap<T, S>(c.dy, all, c.M).from(first * c.M + m);
    const auto dlocal = WrittenMap<T, S>(c.dlocal, all, c.M).from(first * c.M + m);
    const int64_t next = next_panel<T>(m / P, c.M, rows);
    sum_rows<T>(rows, channels, l.sums + m, l.sums + l.padded + m,
                [&](int64_t i, int64_t lane, int64_t count, V& a, V& b)
                    __attribute__((always_inline)) {
                      const int64_t at = i * c.M + lane;
                      fetch(y + at + next);
                      if (local) fetch(local + at + next);
                      if (dy) dy.expect(at + next);
                      if (dlocal) dlocal.expect(at + next);
                      const V value = load_as<V>(y + at, count);
                      V t, slope;
                      silu_and_slope<T>(z(value, lane), t, slope);
                      V dt = load<V>(l.d + i * P + lane);
                      if (c.drop_scale) dt *= l.drop[i];
                      V dz = dt * slope;
                      if (gate) {
                        const V g = load_as<V>(gates(i) + lane, count);
                        t *= g;
                        dz *= g;
                      }
                      if (local) t += load_as<V>(local + at, count);
                      if (c.drop_scale) t *= l.drop[i];
                      store(l.t + i * P + lane, t);
                      a = dz;
                      b = (value - load<V>(l.mean + m + lane)) * load<V>(l.invstd + m + lane);
                      if (!c.behind_norm) dz *= load<V>(l.scale + m + lane);
                      if (dy) dy.store(at, dz, count);
                      if (dlocal) dlocal.store(at, dt, count);
                    });
  }

  // silu(z), and t without the drop scale.
  EMO_INLINE V recompute(int64_t i, int64_t lane, int64_t count, V& t) const {
    const V value = silu<T>(z(load_as<V>(y + i * c.M + lane, count), lane));
    t = value;
    if (gate) t *= load_as<V>(gates(i) + lane, count);
    if (local) t += load_as<V>(local + i * c.M + lane, count);
    return value;
  }

  // dgate and ddrop of the pixels [i0, i1), of one image.
  void differentiate_image(int64_t i0, int64_t i1) const {
    const int64_t image = (first + i0) / c.pixels;
    double* const none = nullptr;
    if (c.dgate) {
      sum_rows<T>(i1 - i0, channels, none, l.dgate + image * l.padded + m,
                  [&](int64_t k, int64_t lane, int64_t count, V& a, V& b)
                      __attribute__((always_inline)) {
                        V t;
                        a = load<V>(l.d + (i0 + k) * P + lane);
                        if (c.drop_scale) a *= l.drop[i0 + k];
                        b = recompute(i0 + k, lane, count, t);
                      });
    }
    if (c.ddrop) {
      alignas(64) double sums[kPanel<T>];
      fill_zero(sums, P);
      // One number an image: all of its sum in double.
      sum_rows<T, Sums::kMoments>(i1 - i0, channels, none, sums,
                                  [&](int64_t k, int64_t lane, int64_t count, V& a, V& b)
                                      __attribute__((always_inline)) {
                                        a = load<V>(l.d + (i0 + k) * P + lane);
                                        recompute(i0 + k, lane, count, b);
                                      });
      for (int64_t lane = 0; lane < channels; ++lane) l.ddrop[image] += sums[lane];
    }
  }

  void differentiate_images() const {
    for (int64_t i = 0; i < rows;) {
      const int64_t end = min(rows, ((first + i) / c.pixels + 1) * c.pixels - first);
      differentiate_image(i, end);
      i = end;
    }
  }
};

template <class T, class S, class E>
void step(const Call& c, const Layout<E>& l, int64_t first, int64_t rows) {
  constexpr int64_t P = kPanel<T>;
  const T* const drop = static_cast<const T*>(c.drop_scale);
  load_rows(static_cast<const S*>(c.grad) + first * c.O, c.O, rows, l.g,
            [](int64_t) { return T(1); });
  const Blocked<E> g = c.dweight ? across(l.g, rows, l.g_pairs) : l.g;
  for (int64_t i = 0; drop && i < rows; ++i) l.drop[i] = drop[(first + i) / c.pixels];
  for (int64_t p = 0; p < l.weight.panels(); ++p) {
    const int64_t width = l.weight.width(p);
    product<E, false>({l.g.data, l.g.stride(), l.weight.panel(p), c.O, l.d, rows, nullptr, false},
                      width);
    const Panel<T, S> panel(c, l, first, rows, p);
    if (c.dgate || c.ddrop) panel.differentiate_images();
    panel.differentiate();
    if (c.dweight == nullptr) continue;
    const E* const t = across<E>(l.t, rows, panel.channels, l.t_pairs);
    for (int64_t o = 0; o < l.g.panels(); ++o) {
      product<E, true>(
          {g.panel(o), 0, t, rows, l.dweight.panel(p) + o * P * P, l.g.channels(o), nullptr, true},
          width);
    }
  }
}

template <class T, class S>
void run(const Call& call, const Share& share) {
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<TermOf<S>> l(call, shared, own);
  each_of_mine(l.weight.panels(), share, [&](int64_t p) {
    pack_straight(static_cast<const T*>(call.weight), call.O, l.weight, p);
  });
  if (share.thread == 0) {
    const auto copy = [&](const void* from, T* to, T otherwise) {
      const T* const values = static_cast<const T*>(from);
      for (int64_t m = 0; m < l.padded; ++m) {
        to[m] = m >= call.M ? T(0) : values ? values[m] : otherwise;
      }
    };
    copy(call.scale, l.scale, T(1));
    copy(call.shift, l.shift, T(0));
    copy(call.mean, l.mean, T(0));
    copy(call.invstd, l.invstd, T(1));
  }
  fill_zero(l.sums, 2 * l.padded);
  if (call.dgate) fill_zero(l.dgate, call.N * l.padded);
  if (call.ddrop) fill_zero(l.ddrop, call.N);
  if (call.dweight) fill_zero(l.dweight.data, l.dweight.panels() * l.dweight.stride());
  team_barrier();
  each_step(call.N * call.pixels, l.most, share.thread, share.threads,
            [&](int64_t first, int64_t rows) { step<T, S>(call, l, first, rows); });
  WrittenMap<T, S>::finish();
  team_barrier();
  if (call.sums) {
    each_of_mine(2 * call.M, share, [&](int64_t i) {
      call.sums[i] = total(l.sums + i / call.M * l.padded + i % call.M, share);
    });
  }
  if (call.dgate) {
    each_of_mine(call.N * call.M, share, [&](int64_t i) {
      call.dgate[i] = total(l.dgate + i / call.M * l.padded + i % call.M, share);
    });
  }
  if (call.ddrop) {
    each_of_mine(call.N, share, [&](int64_t n) { call.ddrop[n] = total(l.ddrop + n, share); });
  }
  if (call.dweight) add_up(l.dweight, call.O, static_cast<T*>(call.dweight), share);
}

template <class T, class S>
constexpr Kernel<Call> kKernel = {scratch<TermOf<S>>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(ShrinkBackwardCall, shrink_backward_kernel)

}  // namespace emo_kernels::cpu
