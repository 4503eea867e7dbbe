// Computes  out = act(BN(W * x + b)): a dense K x K convolution of a map of few channels, the
//           image, with its batch norm (known statistics) and activation: stage 0 of EMO, SPEC
//           section 2; or, without a norm, the sums that give a training batch norm its statistics.
// Tiling    a thread walks its output rows; the input rows they need lie zero-padded in a ring, in
//           the image's own layout; a tile of up to 14 pixels x 2 vectors of output channels stays
//           in registers over all C K K terms.
// Traffic   reads x once (plus halo rows between threads), writes out once: EMO at 224, batch 1:
//           1.8 MB for 16.3 MFLOP, 9 FLOP/byte.
// Numerics  a sum over rows, channels and columns of taps, in that order, in the element type;
//           bias and batch norm as one scale and shift, made in fp64, behind it. Up to 14 pixels
//           are summed in the element type, as they are stored and around a mean (moments.h),
//           those sums in double.
// Limits    fp32 and bf16 (fp64 at portable width); ungrouped; kernels up to 64 taps a side.
#include "cpu/conv_tiles.h"
#include "cpu/moments.h"
#include "cpu/params.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

template <class T>
struct Layout {
  ConvPanels<T> panels;
  int64_t Ho, Wo, terms;       // terms: of a row of taps
  T *weights, *scale, *shift;  // shared: panels of kConvPanel channels
  int64_t* offsets;            // shared
  Moments<T> moments;          // own, as what follows
  ImageRows<T> ring;

  Layout(const ConvNormActCall& c, Places& shared, Places& own)
      : panels(c.O),
        Ho(output_side(c, c.H)),
        Wo(output_side(c, c.W)),
        terms(c.C * c.K),
        weights(shared.take<T>(channels() * c.K * terms)),
        scale(shared.take<T>(channels())),
        shift(shared.take<T>(channels())),
        offsets(shared.take<int64_t>(terms)),
        moments(Moments<T>::at(own, channels())),
        ring(c, own) {}
  int64_t channels() const { return panels.count * kConvPanel<T>; }
};

template <class T>
ScratchBytes scratch(const ConvNormActCall& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<T> layout(call, shared, own);
  return {shared.used, own.used};
}

template <class T, class S>
class Convolution {
 public:
  // Of rows from `first` on, counted over all images.
  Convolution(const ConvNormActCall& call, const Layout<T>& layout, int64_t first)
      : c_(call), l_(layout), first_(first) {}

  // Panel p's weights as (tap row, channel, tap column, width), its scale and its shift.
  void pack(int64_t p) const {
    const int64_t first = p * P, channels = l_.panels.channels(p), width = l_.panels.width(p);
    const int64_t K = c_.K;
    T* to = l_.weights + p * K * l_.terms * P;
    for (int64_t ky = 0; ky < K; ++ky) {
      for (int64_t k = 0; k < l_.terms; ++k, to += width) {
        const int64_t c = k / K, kx = k % K;
        const int64_t term =
            c_.weight_channels_last ? (ky * K + kx) * c_.C + c : (c * K + ky) * K + kx;
        for (int64_t o = 0; o < width; ++o) {
          const int64_t at = (first + o) * c_.C * K * K + term;
          to[o] = o < channels ? element<T>(c_.weight, at, T(0)) : T(0);
        }
      }
    }
    for (int64_t o = 0; o < P; ++o) pack_affine(first + o);
  }

  void pack_offsets() const {
    for (int64_t k = 0; k < l_.terms; ++k) {
      l_.offsets[k] = l_.ring.place(k / c_.K, k % c_.K * c_.dilation);
    }
  }

  // Output rows [y0, y1) of image n.
  void rows(int64_t n, int64_t y0, int64_t y1) const {
    int64_t loaded = 0;
    for (int64_t y = y0; y < y1; ++y) {
      loaded = l_.ring.template load_for<S>(c_, n, y, loaded);
      l_.ring.template prefetch<S>(c_, n, loaded);
      for (int64_t p = 0; p < l_.panels.count; ++p) row(n, y, p);
    }
  }

 private:
  static constexpr int64_t P = kConvPanel<T>;

  void pack_affine(int64_t o) const {
    double scale = 0.0, shift = 0.0;
    if (o < c_.O) {
      const auto at = [&](const Param& values, T absent) -> double {
        return element<T>(values, o, absent);
      };
      const bool norm = c_.norm_mean.data != nullptr;
      scale = norm ? at(c_.norm_weight, 1) / __builtin_sqrt(at(c_.norm_var, 1) + c_.eps) : 1.0;
      shift = at(c_.bias, 0);
      if (norm) shift = (shift - at(c_.norm_mean, 0)) * scale + at(c_.norm_bias, 0);
    }
    l_.scale[o] = static_cast<T>(scale);
    l_.shift[o] = static_cast<T>(shift);
  }

  void row(int64_t n, int64_t y, int64_t p) const {
    ConvRow<T, S> row;
    row.channels = l_.panels.channels(p);
    const T* const weights = l_.weights + p * c_.K * l_.terms * P;
    const int64_t top = y * c_.stride - c_.padding, tap = l_.terms * l_.panels.width(p);
    for (int64_t t = 0; t < c_.K; ++t) {
      const int64_t r = top + t * c_.dilation;
      if (r < 0 || r >= c_.H) continue;
      row.rows[row.taps] = l_.ring.row(r);
      row.weights[row.taps++] = weights + t * tap;
    }
    row.offsets = l_.offsets;
    row.terms = l_.terms;
    row.step = c_.stride * l_.ring.column_stride;
    row.scale = l_.scale + p * P;
    row.shift = l_.shift + p * P;
    const bool first = n * l_.Ho + y == first_;
    row.pivot = l_.moments.pivot + p * P;
    row.sums = c_.sums && !first ? l_.moments.sums + p * P : nullptr;
    row.squares = l_.moments.squares + p * P;
    row.stride = c_.O;
    row.out = static_cast<S*>(c_.out) + (n * l_.Ho + y) * l_.Wo * c_.O + p * P;
    row.columns = l_.Wo;
    row.act = c_.act;
    with_conv_shape<T>(row.channels, [&](auto shape) { convolve<decltype(shape)>(row); });
    if (c_.sums && first) l_.moments.begin(row.out, l_.Wo, c_.O, p * P, row.channels);
  }

  template <class Shape>
  void convolve(const ConvRow<T, S>& row) const {
    const bool stem = c_.K == 3 && c_.stride == 2 && c_.dilation == 1;
    if (stem && l_.ring.column_stride == 1) return convolve_row<T, S, Shape, StemTaps<1>>(row);
    if (stem && l_.ring.column_stride == 3) return convolve_row<T, S, Shape, StemTaps<3>>(row);
    convolve_row<T, S, Shape, AnyTaps>(row);
  }

  const ConvNormActCall& c_;
  const Layout<T>& l_;
  const int64_t first_;
};

template <class T, class S>
void run(const ConvNormActCall& call, const Share& share) {
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<T> l(call, shared, own);
  const int64_t rows = call.N * l.Ho;
  const Convolution<T, S> convolution(call, l, share_of(rows, share.thread, share.threads));
  each_of_mine(l.panels.count, share, [&](int64_t p) { convolution.pack(p); });
  if (share.thread == 0) convolution.pack_offsets();
  l.ring.clear();
  l.moments.clear(l.channels());
  team_barrier();
  each_band(call.N, l.Ho, share,
            [&](int64_t n, int64_t first, int64_t last) { convolution.rows(n, first, last); });
  if (call.sums == nullptr) return;
  team_barrier();
  l.moments.publish(call.O, call.pivot, call.sums, rows, l.Wo, share);
}

template <class T, class S>
constexpr Kernel<ConvNormActCall> kKernel = {scratch<T>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(ConvNormActCall, conv_norm_act_kernel)

}  // namespace emo_kernels::cpu
