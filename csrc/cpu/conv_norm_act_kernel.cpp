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
//           are summed in the element type, as they are stored, those sums in double.
// Limits    fp32 and bf16 (fp64 at portable width); ungrouped; kernels up to 64 taps a side.
#include "cpu/conv_rows.h"
#include "cpu/params.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

// One output row's share of one panel of output channels.
template <class T, class S>
struct ConvRow {
  const T* rows[kMostTaps];  // input rows of the taps inside the map, from the first column's first
  const T* weights[kMostTaps];  // (terms, width) of each
  int64_t taps = 0;
  const int64_t* offsets;  // of the terms of a row of taps
  int64_t terms;
  int64_t step;             // from pixel to pixel of the output, in the input
  const T *scale, *shift;   // (width,)
  S* out;                   // at the panel's first channel
  int64_t columns, stride;  // output pixels, and from one to the next
  int64_t channels;         // of the panel that exist
  Activation act;
  const T* pivot;          // (width,)
  double *sums, *squares;  // (width,), of what is written less the pivot; null: none
};

// act(scale sums + shift) for the tile's first `pixels`, `width` sums each.
template <class T, Activation kAct, class S>
void finish(const T* sums, int64_t width, int64_t pixels, const ConvRow<T, S>& row, S* out) {
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t i = 0; i < pixels; ++i, sums += width, out += row.stride) {
    for (int64_t c = 0; c < row.channels; c += kLanesOf<T>) {
      const V v = fma(load<V>(sums + c), load<V>(row.scale + c), load<V>(row.shift + c));
      store_as(out + c, activate<T, kAct>(v), row.channels - c);
    }
  }
}

// The same without an activation, and what is stored, less the pivot, summed up.
template <class T, class S>
void finish_and_sum(const T* sums, int64_t width, int64_t pixels, const ConvRow<T, S>& row,
                    S* out) {
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t c = 0; c < row.channels; c += kLanesOf<T>) {
    const V scale = load<V>(row.scale + c), shift = load<V>(row.shift + c);
    const V pivot = load<V>(row.pivot + c);
    V sum{}, square{};
    for (int64_t i = 0; i < pixels; ++i) {
      const V v = fma(load<V>(sums + i * width + c), scale, shift);
      store_as(out + i * row.stride + c, v, row.channels - c);
      const V centred = as_stored<S>(v) - pivot;
      sum += centred;
      square = fma(centred, centred, square);
    }
    Doubles<T>(sum).add_to(row.sums + c);
    Doubles<T>(square).add_to(row.squares + c);
  }
}

template <class T, class S>
void finish_tile(const T* sums, int64_t width, int64_t pixels, const ConvRow<T, S>& row, S* out) {
  if (row.sums) return finish_and_sum(sums, width, pixels, row, out);
  with_activation(row.act, [&](auto act) { finish<T, act.value>(sums, width, pixels, row, out); });
}

// acc[i] += a[i * step] * b for every pixel i of the tile.
template <class T, int kRows, class Shape>
EMO_INLINE void add_term(Accumulators<T, kRows, Shape>& acc, const T* a, int64_t step, const T* b) {
  using Full = Vec<T, Shape::kLanes>;
  using Half = Vec<T, Shape::kLanes / 2>;
  unroll<kRows>(EMO_UNROLLED(i) {
    const Full value = splat<Full>(a[i * step]);
    unroll<Shape::kFull>(EMO_UNROLLED(j) {
      acc.full[i][j] = fma(value, load<Full>(b + j * Shape::kLanes), acc.full[i][j]);
    });
    if constexpr (Shape::kHalf) {
      acc.half[i] = fma(low_half(value), load<Half>(b + Shape::kFull * Shape::kLanes), acc.half[i]);
    }
  });
}

// Any kernel: the terms of a row of taps, one by one.
struct AnyTaps {
  template <class T, class Shape>
  static constexpr int kRows = Shape::kRows;
  template <class T, class Shape>
  static constexpr int kFewRows = kRows<T, Shape>;

  template <class T, int kRows, class Shape, class S>
  static EMO_INLINE void add(Accumulators<T, kRows, Shape>& acc, const T* a, const T* b,
                             const ConvRow<T, S>& row) {
    for (int64_t k = 0; k < row.terms; ++k, b += Shape::kWidth) {
      add_term<T, kRows, Shape>(acc, a + row.offsets[k], row.step, b);
    }
  }
};

// Three taps at stride 2 in columns kColumn apart: a column that two pixels see is loaded once.
template <int kColumn>
struct StemTaps {
  static constexpr int kTaps = 3, kStride = 2;
  template <class T, class Shape>
  static constexpr int kRows = kRegisters == 32 ? 12 : (Shape::kFull == 2 ? 4 : 8);
  template <class T, class Shape>
  static constexpr int kFewRows = 4;

  template <class T, int kRows, class Shape, class S>
  static EMO_INLINE void add(Accumulators<T, kRows, Shape>& acc, const T* a, const T* b,
                             const ConvRow<T, S>& row) {
    for (int64_t k = 0; k < row.terms; k += kTaps, b += kTaps * Shape::kWidth) {
      add_channel<T, kRows, Shape>(acc, a + row.offsets[k], b);
    }
  }

  template <class T, int kRows, class Shape>
  static EMO_INLINE void add_channel(Accumulators<T, kRows, Shape>& acc, const T* a, const T* b) {
    using Full = Vec<T, Shape::kLanes>;
    using Half = Vec<T, Shape::kLanes / 2>;
    Full full[kTaps][Shape::kFull];
    Half half[kTaps];
    unroll<kTaps>(EMO_UNROLLED(t) {
      const T* const from = b + t * Shape::kWidth;
      unroll<Shape::kFull>(EMO_UNROLLED(j) { full[t][j] = load<Full>(from + j * Shape::kLanes); });
      if constexpr (Shape::kHalf) half[t] = load<Half>(from + Shape::kFull * Shape::kLanes);
    });
    unroll<(kRows - 1) * kStride + kTaps>(EMO_UNROLLED(column) {
      const Full value = splat<Full>(a[column * kColumn]);
      unroll<kTaps>(EMO_UNROLLED(t) {
        constexpr int kAt = decltype(column)::value - decltype(t)::value;
        constexpr int kPixel = kAt / kStride;
        if constexpr (kAt >= 0 && kAt % kStride == 0 && kPixel < kRows) {
          unroll<Shape::kFull>(EMO_UNROLLED(j) {
            acc.full[kPixel][j] = fma(value, full[t][j], acc.full[kPixel][j]);
          });
          if constexpr (Shape::kHalf) {
            acc.half[kPixel] = fma(low_half(value), half[t], acc.half[kPixel]);
          }
        }
      });
    });
  }
};

template <class T, class S, class Shape, class Taps, int kRows>
EMO_INLINE void convolve_tile(const ConvRow<T, S>& row, int64_t x0) {
  constexpr int kWidth = Shape::kWidth;
  alignas(64) T sums[kRows * kWidth + kLanesOf<T>];
  Accumulators<T, kRows, Shape> acc;
  acc.clear();
  const S* const below = row.out + (row.columns + x0) * row.stride;
  fetch_lines(below, below + kRows * row.stride);
  for (int64_t t = 0; t < row.taps; ++t) {
    Taps::template add<T, kRows, Shape>(acc, row.rows[t] + x0 * row.step, row.weights[t], row);
  }
  acc.save_sums(sums);
  const int64_t pixels = min<int64_t>(kRows, row.columns - x0);
  finish_tile<T>(sums, kWidth, pixels, row, row.out + x0 * row.stride);
}

template <class T, class S, class Shape, class Taps>
void convolve_row(const ConvRow<T, S>& row) {
  constexpr int kRows = Taps::template kRows<T, Shape>, kFew = Taps::template kFewRows<T, Shape>;
  int64_t x = 0;
  for (; row.columns - x > kRows - kFew; x += kRows) {
    convolve_tile<T, S, Shape, Taps, kRows>(row, x);
  }
  for (; x < row.columns; x += kFew) convolve_tile<T, S, Shape, Taps, kFew>(row, x);
}

template <class T>
struct Layout {
  ConvPanels<T> panels;
  int64_t Ho, Wo, terms;               // terms: of a row of taps
  T *weights, *scale, *shift, *pivot;  // shared: panels of kConvPanel channels
  int64_t* offsets;                    // shared
  double* totals;                      // own, as what follows: [2][channels]
  ImageRows<T> ring;

  Layout(const ConvNormActCall& c, Places& shared, Places& own)
      : panels(c.O),
        Ho(output_side(c, c.H)),
        Wo(output_side(c, c.W)),
        terms(c.C * c.K),
        weights(shared.take<T>(channels() * c.K * terms)),
        scale(shared.take<T>(channels())),
        shift(shared.take<T>(channels())),
        pivot(shared.take<T>(channels())),
        offsets(shared.take<int64_t>(terms)),
        totals(own.take<double>(2 * channels())),
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
  Convolution(const ConvNormActCall& call, const Layout<T>& layout) : c_(call), l_(layout) {}

  // Panel p's weights as (tap row, channel, tap column, width), its scale and its shift.
  void pack(int64_t p) const {
    const int64_t first = p * P, channels = l_.panels.channels(p), width = l_.panels.width(p);
    const int64_t K = c_.K;
    T* to = l_.weights + p * K * l_.terms * P;
    for (int64_t ky = 0; ky < K; ++ky) {
      for (int64_t k = 0; k < l_.terms; ++k, to += width) {
        const int64_t term = (k / K * K + ky) * K + k % K;
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
    l_.pivot[o] = c_.pivot && o < c_.O ? static_cast<const T*>(c_.pivot)[o] : T(0);
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
    row.pivot = l_.pivot + p * P;
    row.sums = c_.sums ? l_.totals + p * P : nullptr;
    row.squares = l_.totals + l_.channels() + p * P;
    row.stride = c_.O;
    row.out = static_cast<S*>(c_.out) + (n * l_.Ho + y) * l_.Wo * c_.O + p * P;
    row.columns = l_.Wo;
    row.act = c_.act;
    with_conv_shape<T>(row.channels, [&](auto shape) { convolve<decltype(shape)>(row); });
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
};

template <class T, class S>
void run(const ConvNormActCall& call, const Share& share) {
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<T> l(call, shared, own);
  const Convolution<T, S> convolution(call, l);
  each_of_mine(l.panels.count, share, [&](int64_t p) { convolution.pack(p); });
  if (share.thread == 0) convolution.pack_offsets();
  l.ring.clear();
  fill_zero(l.totals, 2 * l.channels());
  team_barrier();
  each_band(call.N, l.Ho, share,
            [&](int64_t n, int64_t first, int64_t last) { convolution.rows(n, first, last); });
  if (call.sums == nullptr) return;
  team_barrier();
  each_of_mine(2 * call.O, share, [&](int64_t i) {
    call.sums[i] = total(l.totals + i / call.O * l.channels() + i % call.O, share);
  });
}

template <class T, class S>
constexpr Kernel<ConvNormActCall> kKernel = {scratch<T>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(ConvNormActCall, conv_norm_act_kernel)

}  // namespace emo_kernels::cpu
