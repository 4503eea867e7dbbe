// Computes  dweight = dy * x and dx = weight^T * dy of y = weight * x + bias, a dense convolution
//           of a map of few channels, for dy = c1 dz + c2 (y - mean) + c3, dz = grad act'(scale
//           (y - mean) + bias): the activation and the batch norm behind, taken back in the loads.
// Tiling    dweight: a thread walks its rows of dy; the rows of x they meet lie zero-padded in a
//           ring; a tile of terms (channel, tap row, tap column) x one panel of output channels
//           stays in registers over a run of pixels. dx: a thread walks its rows of dx, with a ring
//           of rows of dy; each gives a tap row's products, which are added where they belong.
// Traffic   dweight reads grad, y and x once (plus halo rows between threads); dx reads grad and y
//           again. EMO at 224: 3 MB and 16.3 MFLOP an image, 5 FLOP/byte.
// Numerics  the type it computes in; for dweight up to 112 pixels are summed in it, those sums in
//           double, threads in order.
// Limits    fp32 and bf16 (fp64 at portable width); ungrouped; kernels up to 64 taps a side.
#include "cpu/conv_terms.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

using Call = ConvNormActBackwardCall;

constexpr int64_t kRunPixels = 112;  // summed in the element type
constexpr int kPixelRows = 8;        // of a tile of products for dx

template <class T>
struct Layout {
  static constexpr int64_t P = kConvPanel<T>;
  ConvPanels<T> panels;
  int64_t Ho, Wo;
  int64_t terms, padded_terms;  // of the kernel; up to whole tiles
  int64_t tap_terms, tap_row;   // of a row of taps, (tap column, channel); up to whole vectors
  int64_t dy_rows, dy_panel;    // rows of dy in the ring, elements of a panel of one
  T *norm, *coefficients;       // shared: [4][channels]
  T* weights;                   // shared, for dx: [tap row][O][tap_row]
  double* totals;               // own, as what follows: [panel][term][width]
  T *dy, *line;
  const T** places;  // of the terms of the first pixel of a row
  ImageRows<T> ring;

  Layout(const Call& c, Places& shared, Places& own)
      : panels(c.O),
        Ho(output_side(c, c.H)),
        Wo(output_side(c, c.W)),
        terms(c.C * c.K * c.K),
        padded_terms(ceil_div(terms, kTermRows) * kTermRows),
        tap_terms(c.C * c.K),
        tap_row(ceil_div(tap_terms, kLanesOf<T>) * kLanesOf<T>),
        dy_rows(c.dx ? reach_of(c) / c.stride + 1 : 1),
        dy_panel((Wo + kPixelRows) * P),
        norm(shared.take<T>(4 * channels())),
        coefficients(shared.take<T>(4 * channels())),
        weights(shared.take<T>(c.dx ? c.K * c.O * tap_row : 0)),
        totals(own.take<double>(panels.count * padded_terms * P)),
        dy(own.take<T>(dy_rows * panels.count * dy_panel)),
        line(own.take<T>((c.W + 2 * c.padding) * c.C)),
        places(own.take<const T*>(padded_terms)),
        ring(c, own) {}
  int64_t channels() const { return panels.count * P; }
  T* dy_row(int64_t q, int64_t p) const { return dy + (q % dy_rows * panels.count + p) * dy_panel; }
};

template <class T>
ScratchBytes scratch(const Call& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<T> layout(call, shared, own);
  return {shared.used, own.used};
}

// One row's share of dweight for one panel, while what the next row reads is brought in.
template <class Terms, class Shape, class T>
void add_row(const Layout<T>& l, int64_t step, const T* dy, double* totals, Ahead (&next)[2]) {
  for (int64_t x0 = 0; x0 < l.Wo; x0 += kRunPixels) {
    const int64_t pixels = min(kRunPixels, l.Wo - x0);
    for (int64_t t = 0; t < l.terms; t += Terms::kTerms) {
      const T* at[Terms::kTerms];
      unroll<Terms::kTerms>(EMO_UNROLLED(i) { at[i] = l.places[t + i] + x0 * step; });
      Terms::template add_run<T, Shape>(at, step, dy + x0 * Shape::kWidth, pixels,
                                        totals + t * Shape::kWidth, next[t / Terms::kTerms % 2]);
    }
  }
}

template <class T, class S>
class Gradient {
 public:
  Gradient(const Call& call, const Layout<T>& layout) : c_(call), l_(layout) {}

  void pack(int64_t p) const {
    for (int64_t row = 0; row < 4; ++row) {
      for (int64_t o = p * P; o < (p + 1) * P; ++o) {
        const int64_t at = row * l_.channels() + o, from = row * c_.O + o;
        l_.norm[at] = o < c_.O ? static_cast<const T*>(c_.norm)[from] : T(0);
        l_.coefficients[at] = o < c_.O ? static_cast<const T*>(c_.coefficients)[from] : T(0);
      }
    }
    if (c_.dx == nullptr) return;
    for (int64_t o = p * P; o < min(c_.O, (p + 1) * P); ++o) pack_filter(o);
  }

  // Rows [q0, q1) of image n of dy: their share of dweight.
  void weight_rows(int64_t n, int64_t q0, int64_t q1) const {
    int64_t loaded = 0;
    for (int64_t q = q0; q < q1; ++q) {
      loaded = l_.ring.template load_for<S>(c_, n, q, loaded);
      make_dy(n, q);
      place_terms(q);
      Ahead next[2] = {row_below(c_.grad, n, q), row_below(c_.y, n, q)};
      for (int64_t p = 0; p < l_.panels.count; ++p) {
        double* const totals = l_.totals + p * l_.padded_terms * P;
        const T* const dy = l_.dy_row(q, p);
        with_conv_shape<T>(l_.panels.channels(p),
                           [&](auto shape) { add_weights<decltype(shape)>(dy, totals, next); });
      }
    }
  }

  // Rows [y0, y1) of image n of dx.
  void image_rows(int64_t n, int64_t y0, int64_t y1) const {
    int64_t made = 0;
    for (int64_t y = y0; y < y1; ++y) {
      const int64_t bottom = y + c_.padding, top = max<int64_t>(0, bottom - reach_of(c_));
      const int64_t last = min(l_.Ho - 1, bottom / c_.stride);
      for (int64_t q = max(made, ceil_div(top, c_.stride)); q <= last; ++q) make_dy(n, q);
      made = max(made, last + 1);
      fill_zero(l_.line, (c_.W + 2 * c_.padding) * c_.C);
      for (int64_t t = 0; t < c_.K; ++t) {
        const int64_t from = bottom - t * c_.dilation;
        if (from < 0 || from % c_.stride || from / c_.stride >= l_.Ho) continue;
        add_taps(from / c_.stride, t);
      }
      store_row(n, y);
    }
  }

 private:
  static constexpr int64_t P = kConvPanel<T>;
  using V = Vec<T, kLanesOf<T>>;

  void pack_filter(int64_t o) const {
    const int64_t K = c_.K;
    const T* const filter = static_cast<const T*>(c_.weight) + o * l_.terms;
    for (int64_t ky = 0; ky < K; ++ky) {
      T* const to = l_.weights + (ky * c_.O + o) * l_.tap_row;
      for (int64_t k = 0; k < l_.tap_row; ++k) {
        const int64_t term = (k % c_.C * K + ky) * K + k / c_.C;
        to[k] = k < l_.tap_terms ? filter[term] : T(0);
      }
    }
  }

  template <class Shape>
  void add_weights(const T* dy, double* totals, Ahead (&next)[2]) const {
    const int64_t column = l_.ring.column_stride, step = c_.stride * column;
    const bool stem = c_.K == 3 && c_.stride == 2 && c_.dilation == 1;
    if (stem && column == 1) return add_row<StemTerms<1>, Shape>(l_, step, dy, totals, next);
    if (stem && column == 3) return add_row<StemTerms<3>, Shape>(l_, step, dy, totals, next);
    add_row<AnyTerms, Shape>(l_, step, dy, totals, next);
  }

  Ahead row_below(const void* map, int64_t n, int64_t q) const {
    const int64_t row = l_.Wo * c_.O;
    const S* const begin = static_cast<const S*>(map) + (n * l_.Ho + q + 1) * row;
    return {begin, begin + row};
  }

  void place_terms(int64_t q) const {
    const int64_t top = q * c_.stride - c_.padding, K = c_.K;
    for (int64_t t = 0; t < l_.padded_terms; ++t) {
      const int64_t r = top + t / K % K * c_.dilation;
      const bool inside = t < l_.terms && r >= 0 && r < c_.H;
      const int64_t place = l_.ring.place(t / (K * K), t % K * c_.dilation);
      l_.places[t] = inside ? l_.ring.row(r) + place : l_.ring.zeros();
    }
  }

  // Row q of image n of dy into its place in the ring, panel by panel.
  void make_dy(int64_t n, int64_t q) const {
    with_activation(c_.act, [&](auto act) { make_dy<act.value>(n, q); });
  }

  template <Activation kAct>
  void make_dy(int64_t n, int64_t q) const {
    const int64_t row = (n * l_.Ho + q) * l_.Wo * c_.O;
    const S* const grad = static_cast<const S*>(c_.grad) + row;
    const S* const map = static_cast<const S*>(c_.y) + row;
    for (int64_t p = 0; p < l_.panels.count; ++p) {
      const int64_t width = l_.panels.width(p), channels = l_.panels.channels(p);
      each_lane_of<T>(channels, [&](int64_t lane, int64_t count) __attribute__((always_inline)) {
        V norm[2], c[4];
        const int64_t at = p * P + lane, next = l_.channels();
        unroll<2>(EMO_UNROLLED(i) { norm[i] = load<V>(l_.norm + i * next + at); });
        unroll<4>(EMO_UNROLLED(i) { c[i] = load<V>(l_.coefficients + i * next + at); });
        T* const to = l_.dy_row(q, p) + lane;
        const int64_t whole = min<int64_t>(count, kLanesOf<T>), room = width - lane;
        for (int64_t x = 0, from = at; x < l_.Wo; ++x, from += c_.O) {
          const V centred = load_as<V>(map + from, whole) - c[3];
          V dz = load_as<V>(grad + from, whole);
          if constexpr (kAct != Activation::kNone) {
            dz *= activate_slope<T, kAct>(fma(centred, norm[0], norm[1]));
          }
          store_as(to + x * width, fma(c[0], dz, fma(c[1], centred, c[2])), room);
        }
      });
    }
  }

  // What row q of dy sends through row t of the taps, added to the line.
  void add_taps(int64_t q, int64_t t) const {
    T products[kPixelRows * kLanesOf<T>];
    for (int64_t x0 = 0; x0 < l_.Wo; x0 += kPixelRows) {
      for (int64_t k = 0; k < l_.tap_terms; k += kLanesOf<T>) {
        multiply(q, t, x0, k, products);
        const int64_t pixels = min<int64_t>(kPixelRows, l_.Wo - x0);
        const int64_t count = min<int64_t>(kLanesOf<T>, l_.tap_terms - k);
        for (int64_t i = 0; i < pixels; ++i) {
          T* const first = l_.line + (x0 + i) * c_.stride * c_.C;
          for (int64_t j = 0; j < count; ++j) {
            const int64_t column = (k + j) / c_.C * c_.dilation, channel = (k + j) % c_.C;
            first[column * c_.C + channel] += products[i * kLanesOf<T> + j];
          }
        }
      }
    }
  }

  // products[pixel][lane] = sum over o of dy[pixel][o] weight[o][tap row t][term k + lane].
  void multiply(int64_t q, int64_t t, int64_t x0, int64_t k, T* products) const {
    V acc[kPixelRows];
    unroll<kPixelRows>(EMO_UNROLLED(i) { acc[i] = V{}; });
    const T* w = l_.weights + t * c_.O * l_.tap_row + k;
    for (int64_t p = 0; p < l_.panels.count; ++p) {
      const int64_t width = l_.panels.width(p), channels = l_.panels.channels(p);
      const T* const dy = l_.dy_row(q, p) + x0 * width;
      for (int64_t o = 0; o < channels; ++o, w += l_.tap_row) {
        const V filter = load<V>(w);
        unroll<kPixelRows>(
            EMO_UNROLLED(i) { acc[i] = fma(splat<V>(dy[i * width + o]), filter, acc[i]); });
      }
    }
    unroll<kPixelRows>(EMO_UNROLLED(i) { store(products + i * kLanesOf<T>, acc[i]); });
  }

  void store_row(int64_t n, int64_t y) const {
    const T* const from = l_.line + c_.padding * c_.C;
    S* const to = static_cast<S*>(c_.dx) + (n * c_.H + y) * c_.W * c_.C;
    each_lane_of<T>(c_.W * c_.C, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      store_as(to + i, load_as<V>(from + i, count), count);
    });
  }

  const Call& c_;
  const Layout<T>& l_;
};

template <class T>
void add_up_weights(const Call& call, const Layout<T>& l, const Share& share) {
  constexpr int64_t P = kConvPanel<T>;
  T* const dweight = static_cast<T*>(call.dweight);
  each_of_mine(call.O, share, [&](int64_t o) {
    const int64_t p = o / P, width = l.panels.width(p);
    const double* const totals = l.totals + p * l.padded_terms * P + o % P;
    for (int64_t t = 0; t < l.terms; ++t) {
      dweight[o * l.terms + t] = static_cast<T>(total(totals + t * width, share));
    }
  });
}

template <class T, class S>
void run(const Call& call, const Share& share) {
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<T> l(call, shared, own);
  const Gradient<T, S> gradient(call, l);
  each_of_mine(l.panels.count, share, [&](int64_t p) { gradient.pack(p); });
  l.ring.clear();
  fill_zero(l.totals, l.panels.count * l.padded_terms * kConvPanel<T>);
  fill_zero(l.dy, l.dy_rows * l.panels.count * l.dy_panel);
  team_barrier();
  if (call.dx) {
    each_band(call.N, call.H, share,
              [&](int64_t n, int64_t first, int64_t last) { gradient.image_rows(n, first, last); });
  }
  if (call.dweight == nullptr) return;
  each_band(call.N, l.Ho, share,
            [&](int64_t n, int64_t first, int64_t last) { gradient.weight_rows(n, first, last); });
  team_barrier();
  add_up_weights(call, l, share);
}

template <class T, class S>
constexpr Kernel<Call> kKernel = {scratch<T>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(ConvNormActBackwardCall, conv_norm_act_backward_kernel)

}  // namespace emo_kernels::cpu
