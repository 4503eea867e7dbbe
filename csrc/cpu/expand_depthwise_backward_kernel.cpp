// Computes  the gradients of y = w * e, e = act(a), a = W n + b, n = norm(x) from dy = c1 grad +
//           c2 (y - mean) + c3: de = w^T * dy + local_grad, dw = dy * e, da = de act'(a),
//           dn = W^T da, dW = da^T n, db = sum da, then the norm's own gradient, or its sums.
// Tiling    bands of whole rows, up to 336 pixels, over the images in a row. Of each panel of
//           expanded channels the rows of dy that meet the band come into the L2 cache; row by row
//           de, times act'(a), becomes da and e gives its share of dw; da feeds both products.
//           Neither de nor da is written to memory.
// Traffic   reads grad and y once (plus halo rows between bands), local_grad, x and residual once,
//           writes dx once; e and act'(a), where they were kept, are read, else computed again.
// Numerics  of dw and of the sums over pixels up to 8 rows and 8 pixels in the type it computes in,
//           those sums in double; products as in expand_backward_kernel.cpp; threads in order.
// Limits    ungrouped; kernels up to 64 taps a side.
#include "cpu/depthwise_gradient.h"
#include "cpu/expand_gradient.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

using Call = ExpandDepthwiseBackwardCall;

// Rows of all images' dy, one behind the other.
struct Rows {
  int64_t first, last;
};

// Those that meet rows [begin, end) of all images' e.
EMO_INLINE Rows dy_rows(const DepthwiseBackwardCall& c, int64_t Ho, int64_t begin, int64_t end) {
  const int64_t above = begin % c.H + c.padding - (c.K - 1) * c.dilation;
  const int64_t below = ((end - 1) % c.H + c.padding) / c.stride;
  return {begin / c.H * Ho + (above > 0 ? min(Ho, ceil_div(above, c.stride)) : 0),
          (end - 1) / c.H * Ho + min(Ho, below + 1)};
}

template <class E>
struct Layout {
  using T = SumOf<E>;
  static constexpr int64_t P = kPanel<T>;
  int64_t Ho, Wo, taps, rows;  // rows: of a band, at most
  ExpandGradient<E> expand;
  T *weights, *zeros;  // shared
  double* totals;      // own, as what follows: [taps][panels * P]
  T* partial;          // [taps][P]
  Ring<T> dy;          // of one panel
  T *e, *de;           // a row of one panel; of e with the zero columns that the taps read

  static int64_t band(const Call& call) {
    constexpr int64_t kMost = 336, kBytes = 448 << 10;
    const int64_t H = call.depthwise.H;
    const int64_t elements = 2 * ceil_div(call.expand.C, P) * P + 4 * P;
    const int64_t pixels = min(kMost, kBytes / (elements * static_cast<int64_t>(sizeof(T))));
    const int64_t rows = max<int64_t>(1, pixels / call.depthwise.W);
    return min(call.N * H, rows < H ? rows : rows / H * H);
  }

  Layout(const Call& call, Places& shared, Places& own)
      : Ho(output_rows(call.depthwise)),
        Wo(output_columns(call.depthwise)),
        taps(call.depthwise.K * call.depthwise.K),
        rows(band(call)),
        expand(call.expand, rows * call.depthwise.W, shared, own) {
    const DepthwiseBackwardCall& c = call.depthwise;
    weights = shared.take<T>(expand.panels * taps * P);
    zeros = shared.take<T>(P);
    totals = own.take<double>(c.dweight ? taps * expand.panels * P : 0);
    partial = own.take<T>(c.dweight ? taps * P : 0);
    const DyColumns columns(c, Wo);
    dy.before = columns.before;
    dy.columns = columns.all;
    dy.rows = 1;
    for (int64_t begin = 0; begin < min(c.H, c.N * c.H - rows + 1); ++begin) {
      const Rows meeting = dy_rows(c, Ho, begin, begin + rows);
      dy.rows = max(dy.rows, meeting.last - meeting.first);
    }
    dy.data = own.take<T>(dy.panel_stride() + P);
    e = own.take<T>(c.dweight ? e_columns(c) * P : 0);
    de = own.take<T>(c.W * P);
  }

  int64_t e_columns(const DepthwiseBackwardCall& c) const {
    return max(c.W + 2 * c.padding, (Wo - 1) * c.stride + (c.K - 1) * c.dilation + 1);
  }
};

template <class E>
ScratchBytes scratch(const Call& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<E> layout(call, shared, own);
  return {shared.used, own.used};
}

template <class T, class S, class E>
class Gradient {
 public:
  Gradient(const Call& call, const Layout<E>& layout)
      : x_(call.expand),
        c_(call.depthwise),
        l_(layout),
        weight_row_(weight_row_for<T>(c_.K, c_.stride, c_.dilation)) {
    fill_zero(l_.dy.data, l_.dy.panel_stride() + P);
    if (c_.dweight == nullptr) return;
    fill_zero(l_.e, l_.e_columns(c_) * P);
    fill_zero(l_.totals, l_.taps * l_.expand.panels * P);
    fill_zero(l_.partial, l_.taps * P);
  }

  // Rows [begin, end) of all images; the band behind them starts there.
  void band(int64_t begin, int64_t end) {
    const int64_t first = begin * c_.W, pixels = (end - begin) * c_.W;
    const Rows now = dy_rows(c_, l_.Ho, begin, end);
    const int64_t last = min(c_.N * c_.H, 2 * end - begin);
    const Rows behind = end < last ? dy_rows(c_, l_.Ho, end, last) : Rows{0, 0};
    const Blocked<E> n = l_.expand.template normalize<S>(x_, first, pixels);
    for (int64_t p = 0; p < l_.expand.panels; ++p) {
      for (int64_t q = now.first; q < now.last; ++q) {
        fill_dy_row<T, S>(c_, l_.dy, q, q * l_.Wo, l_.Wo, p, 1);
      }
      if (x_.slope == nullptr) l_.expand.activation(x_, p, pixels);
      for (int64_t r = begin, summed = 0; r < end; ++r) {
        row(r, (r - begin) * c_.W, p);
        if (c_.dweight && (++summed == kRowsInOneGo || r + 1 == end)) {
          flush_taps(l_.partial, l_.taps, l_.totals + p * P, l_.expand.panels * P);
          summed = 0;
        }
      }
      const bool same = p + 1 < l_.expand.panels;
      PixelsAhead ahead = same ? wanted(now, first, pixels, p + 1)
                               : wanted(behind, first + pixels, (last - end) * c_.W, 0);
      l_.expand.multiply(x_, p, pixels, n, &ahead);
      ahead.fetch_rest();
    }
    l_.expand.template finish<S>(x_, first, pixels);
  }

 private:
  static constexpr int64_t P = kPanel<T>;
  using V = Vec<T, kLanesOf<T>>;

  // What panel p of some rows of dy, and of the pixels that they meet, brings in.
  PixelsAhead wanted(Rows dy, int64_t first, int64_t pixels, int64_t p) const {
    const auto at = [&](const void* map, int64_t pixel) {
      return map ? static_cast<const S*>(map) + pixel * c_.C + p * P : nullptr;
    };
    PixelsAhead ahead = PixelsAhead::of<S>(c_.C);
    const int64_t dys = (dy.last - dy.first) * l_.Wo;
    ahead.add(at(c_.grad, dy.first * l_.Wo), dys);
    if (c_.coefficients) ahead.add(at(c_.y, dy.first * l_.Wo), dys);
    ahead.add(at(c_.local_grad, first), pixels);
    ahead.add(at(x_.slope, first), pixels);
    if (x_.slope) ahead.add(at(c_.x, first), pixels);
    return ahead;
  }

  // Row r of all images, its first pixel the band's `pixel`: da and its sums, and the share in dw.
  void row(int64_t r, int64_t pixel, int64_t p) {
    const int64_t y = r % c_.H, above = r / c_.H * l_.Ho, channels = min<int64_t>(P, c_.C - p * P);
    const InputRow<T, T> to{
        l_.weights + p * l_.taps * P, l_.zeros, channels, l_.Ho, l_.de, P, nullptr};
    dx_row<T, T>(c_, y, to, [&](int64_t q) { return l_.dy.first(0, above + q); });
    const Pixels at{r * c_.W * c_.C + p * P, pixel * P, channels, l_.expand.dbias + p * P};
    differentiate(at);
    if (c_.dweight == nullptr) return;
    WeightRow<T> share{nullptr, l_.e, l_.Wo, channels, c_.K, c_.stride, c_.dilation, nullptr};
    const Phase taps(c_, y % c_.stride);
    for (int64_t i = 0; i < taps.count; ++i) {
      const int64_t q = y / c_.stride + taps.origin + i * taps.reach;
      if (q < 0 || q >= l_.Ho) continue;
      share.dy = l_.dy.first(0, above + q);
      share.sums = l_.partial + (taps.last - i * taps.step) * c_.K * P;
      weight_row_(share);
    }
  }

  // One panel of a row: where it lies in maps, and in tiles.
  struct Pixels {
    int64_t map, tile, channels;
    double* dbias;
  };

  void differentiate(const Pixels& at) const {
    const S *e = static_cast<const S*>(c_.x) + at.map, *slope = static_cast<const S*>(x_.slope);
    if (slope) {
      slope += at.map;
      differentiate(at, [&](int64_t i, int64_t lane, int64_t count, V& value, V& derivative)
                            __attribute__((always_inline)) {
                              const int64_t place = i * c_.C + lane;
                              value = load_as<V>(e + place, count);
                              derivative = load_as<V>(slope + place, count);
                            });
      return;
    }
    with_activation(x_.act, [&](auto act) __attribute__((always_inline)) {
      const T* const a = l_.expand.a + at.tile;
      differentiate(at, [&](int64_t i, int64_t lane, int64_t, V& value,
                            V& derivative) __attribute__((always_inline)) {
        activate_and_slope<T, decltype(act)::value>(load<V>(a + i * P + lane), value, derivative);
        value = as_stored<S>(value);
      });
    });
  }

  // da = (de + local_grad) act'(a), its sums, and e; activated(i, lane, count, e, act'(a)).
  template <class F>
  EMO_INLINE void differentiate(const Pixels& at, F activated) const {
    const S* const local = static_cast<const S*>(c_.local_grad);
    const S* const added = local ? local + at.map : nullptr;
    E* const da = l_.expand.da + at.tile;
    T* const e = c_.dweight ? l_.e + c_.padding * P : nullptr;
    sum_rows<T>(c_.W, at.channels, at.dbias, nullptr,
                [&](int64_t i, int64_t lane, int64_t count, V& sum, V&)
                    __attribute__((always_inline)) {
                      V value, slope, v = load<V>(l_.de + i * P + lane);
                      activated(i, lane, count, value, slope);
                      if (added) {
                        v += load_as<V>(added + i * c_.C + lane, count);
                      }
                      v *= slope;
                      if (e) store(e + i * P + lane, value);
                      store_as(da + i * P + lane, v);
                      sum = v;
                    });
    if (at.channels % kTerms<E> != 0) clear_channel(da + at.channels, c_.W);
  }

  const ExpandBackwardCall& x_;
  const DepthwiseBackwardCall& c_;
  const Layout<E>& l_;
  void (*const weight_row_)(const WeightRow<T>&);
};

template <class T, class S>
void run(const Call& call, const Share& share) {
  constexpr int64_t P = kPanel<T>;
  using E = TermOf<S>;
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<E> l(call, shared, own);
  l.expand.prepare(call.expand, share);
  each_of_mine(l.expand.panels, share,
               [&](int64_t p) { pack_phases<T>(call.depthwise, p, l.weights + p * l.taps * P); });
  if (share.thread == 0) fill_zero(l.zeros, P);
  Gradient<T, S, E> gradient(call, l);
  team_barrier();
  each_step(call.N * call.depthwise.H, l.rows, share.thread, share.threads,
            [&](int64_t first, int64_t rows) { gradient.band(first, first + rows); });
  team_barrier();
  l.expand.reduce(call.expand, share);
  if (call.depthwise.dweight) {
    add_up_taps<T>(call.depthwise, l.totals, l.expand.panels * P, share);
  }
}

template <class T, class S>
constexpr Kernel<Call> kKernel = {scratch<TermOf<S>>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(ExpandDepthwiseBackwardCall, expand_depthwise_backward_kernel)

}  // namespace emo_kernels::cpu
