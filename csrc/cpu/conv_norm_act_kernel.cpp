// Computes  out = act(BN(W * x + b)): a dense K x K convolution of a map of few channels, the
// image,
//           with its batch norm (known statistics) and activation: stage 0 of EMO, SPEC section 2.
// Tiling    a thread walks its output rows; the input rows they need lie zero-padded in a ring, in
//           the image's own layout; a tile of up to 14 pixels x 2 vectors of output channels stays
//           in registers over all C K K terms.
// Traffic   reads x once (plus halo rows between threads), writes out once: EMO at 224, batch 1:
//           1.8 MB for 16.3 MFLOP, 9 FLOP/byte.
// Numerics  a sum over rows, channels and columns of taps, in that order, in the element type;
//           bias and batch norm as one scale and shift, made in fp64, behind it.
// Limits    fp32 and bf16 (fp64 at portable width); ungrouped; kernels up to 64 taps a side.
#include "cpu/blocked.h"
#include "cpu/conv_norm_act.h"
#include "cpu/gemm.h"
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
};

template <class T, Activation kAct, class S>
void finish_pixel(const T* sums, const ConvRow<T, S>& row, S* out) {
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t c = 0; c < row.channels; c += kLanesOf<T>) {
    const V v = fma(load<V>(sums + c), load<V>(row.scale + c), load<V>(row.shift + c));
    store_as(out + c, activate<T, kAct>(v), row.channels - c);
  }
}

// act(scale sums + shift) for the tile's first `pixels`, `width` sums each.
template <class T, Activation kAct, class S>
void finish(const T* sums, int64_t width, int64_t pixels, const ConvRow<T, S>& row, S* out) {
  for (int64_t i = 0; i < pixels; ++i) {
    finish_pixel<T, kAct>(sums + i * width, row, out + i * row.stride);
  }
}

template <class T, class S>
void finish_tile(const T* sums, int64_t width, int64_t pixels, const ConvRow<T, S>& row, S* out) {
  switch (row.act) {
    case Activation::kRelu:
      return finish<T, Activation::kRelu>(sums, width, pixels, row, out);
    case Activation::kGelu:
      return finish<T, Activation::kGelu>(sums, width, pixels, row, out);
    case Activation::kSilu:
      return finish<T, Activation::kSilu>(sums, width, pixels, row, out);
    default:
      return finish<T, Activation::kNone>(sums, width, pixels, row, out);
  }
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

template <class T, class S, class Shape>
void convolve_row(const ConvRow<T, S>& row) {
  constexpr int kRows = Shape::kRows, kWidth = Shape::kWidth;
  alignas(64) T sums[kRows * kWidth + kLanesOf<T>];
  for (int64_t x0 = 0; x0 < row.columns; x0 += kRows) {
    Accumulators<T, kRows, Shape> acc;
    acc.clear();
    for (int64_t t = 0; t < row.taps; ++t) {
      const T *const a = row.rows[t] + x0 * row.step, *const b = row.weights[t];
      for (int64_t k = 0; k < row.terms; ++k) {
        add_term<T, kRows, Shape>(acc, a + row.offsets[k], row.step, b + k * kWidth);
      }
    }
    acc.each([&](auto& v, auto i, auto channel)
                 __attribute__((always_inline)) { store(sums + i * kWidth + channel, v); });
    const int64_t pixels = min<int64_t>(kRows, row.columns - x0);
    finish_tile<T>(sums, kWidth, pixels, row, row.out + x0 * row.stride);
  }
}

template <class T, class S>
struct RowFunction {
  void (*run)(const ConvRow<T, S>& row);
  int64_t width;
};

template <class T, class S, int kFull, bool kHalf>
RowFunction<T, S> row_function() {
  using Shape = PanelShape<T, kFull, kHalf>;
  return {convolve_row<T, S, Shape>, Shape::kWidth};
}

// The narrowest that holds the channels.
template <class T, class S>
RowFunction<T, S> row_function_for(int64_t channels) {
  constexpr int kLanes = kLanesOf<T>;
  if constexpr (kHalfVectors && sizeof(T) == 4) {
    if (channels > kLanes && channels <= kLanes + kLanes / 2) return row_function<T, S, 1, true>();
  }
  return channels <= kLanes ? row_function<T, S, 1, false>() : row_function<T, S, 2, false>();
}

template <class T>
struct Layout {
  static constexpr int64_t kWidest = 2 * kLanesOf<T>;
  int64_t Ho, Wo, panels, terms;
  int64_t columns, column_stride, channel_stride;  // of a row in the ring
  int64_t ring_rows, row_elements;
  T *weights, *scale, *shift;  // shared: panels of kWidest channels
  int64_t* offsets;            // shared
  T* ring;                     // own

  Layout(const ConvNormActCall& c, Places& shared, Places& own) {
    const int64_t reach = (c.K - 1) * c.dilation;
    Ho = (c.H + 2 * c.padding - reach - 1) / c.stride + 1;
    Wo = (c.W + 2 * c.padding - reach - 1) / c.stride + 1;
    panels = ceil_div(c.O, kWidest);
    terms = c.C * c.K;
    columns = max(c.W + 2 * c.padding, (Wo + kMostGemmRows) * c.stride + reach + 1);
    column_stride = c.channels_last ? c.C : 1;
    channel_stride = c.channels_last ? 1 : columns;
    ring_rows = reach + 1;
    row_elements = columns * c.C;
    weights = shared.take<T>(panels * c.K * terms * kWidest);
    scale = shared.take<T>(panels * kWidest);
    shift = shared.take<T>(panels * kWidest);
    offsets = shared.take<int64_t>(terms);
    ring = own.take<T>(ring_rows * row_elements + kLanesOf<T>);
  }
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
    const int64_t first = p * kWidest, channels = min(kWidest, c_.O - first);
    const int64_t width = row_function_for<T, S>(channels).width, K = c_.K;
    T* to = l_.weights + p * K * l_.terms * kWidest;
    for (int64_t ky = 0; ky < K; ++ky) {
      for (int64_t k = 0; k < l_.terms; ++k, to += width) {
        const int64_t term = (k / K * K + ky) * K + k % K;
        for (int64_t o = 0; o < width; ++o) {
          const int64_t at = (first + o) * c_.C * K * K + term;
          to[o] = o < channels ? static_cast<T>(value_of(weight_[at])) : T(0);
        }
      }
    }
    for (int64_t o = 0; o < kWidest; ++o) pack_affine(first + o);
  }

  void pack_offsets() const {
    for (int64_t k = 0; k < l_.terms; ++k) {
      const int64_t column = k % c_.K * c_.dilation;
      l_.offsets[k] = k / c_.K * l_.channel_stride + column * l_.column_stride;
    }
  }

  // Output rows [y0, y1) of image n.
  void rows(int64_t n, int64_t y0, int64_t y1) const {
    int64_t loaded = 0;
    for (int64_t y = y0; y < y1; ++y) {
      const int64_t top = y * c_.stride - c_.padding;
      const int64_t end = min(c_.H, top + l_.ring_rows);
      for (int64_t r = max(loaded, max<int64_t>(0, top)); r < end; ++r) load_row(n, r);
      loaded = max(loaded, end);
      for (int64_t p = 0; p < l_.panels; ++p) row(n, y, top, p);
    }
  }

 private:
  static constexpr int64_t kWidest = Layout<T>::kWidest;

  void pack_affine(int64_t o) const {
    double scale = 0.0, shift = 0.0;
    if (o < c_.O) {
      const auto at = [&](const void* values, double absent) {
        return values ? static_cast<double>(value_of(static_cast<const S*>(values)[o])) : absent;
      };
      const bool norm = c_.norm_mean != nullptr;
      scale = norm ? at(c_.norm_weight, 1.0) / __builtin_sqrt(at(c_.norm_var, 1.0) + c_.eps) : 1.0;
      shift = at(c_.bias, 0.0);
      if (norm) shift = (shift - at(c_.norm_mean, 0.0)) * scale + at(c_.norm_bias, 0.0);
    }
    l_.scale[o] = static_cast<T>(scale);
    l_.shift[o] = static_cast<T>(shift);
  }

  T* ring_row(int64_t r) const { return l_.ring + r % l_.ring_rows * l_.row_elements; }

  // Input row r of image n between its margins, which are zero from the start.
  void load_row(int64_t n, int64_t r) const {
    const S* const x = static_cast<const S*>(c_.x);
    if (c_.channels_last) {
      copy(x + (n * c_.H + r) * c_.W * c_.C, c_.W * c_.C, ring_row(r) + c_.padding * c_.C);
      return;
    }
    for (int64_t c = 0; c < c_.C; ++c) {
      const S* const from = x + ((n * c_.C + c) * c_.H + r) * c_.W;
      copy(from, c_.W, ring_row(r) + c * l_.columns + c_.padding);
    }
  }

  static void copy(const S* from, int64_t count, T* to) {
    using V = Vec<T, kLanesOf<T>>;
    int64_t i = 0;
    for (; i + kLanesOf<T> <= count; i += kLanesOf<T>) store(to + i, load_as<V>(from + i));
    for (; i < count; ++i) to[i] = static_cast<T>(value_of(from[i]));
  }

  void row(int64_t n, int64_t y, int64_t top, int64_t p) const {
    ConvRow<T, S> row;
    row.channels = min(kWidest, c_.O - p * kWidest);
    const RowFunction<T, S> function = row_function_for<T, S>(row.channels);
    const T* const weights = l_.weights + p * c_.K * l_.terms * kWidest;
    for (int64_t t = 0; t < c_.K; ++t) {
      const int64_t r = top + t * c_.dilation;
      if (r < 0 || r >= c_.H) continue;
      row.rows[row.taps] = ring_row(r);
      row.weights[row.taps++] = weights + t * l_.terms * function.width;
    }
    row.offsets = l_.offsets;
    row.terms = l_.terms;
    row.step = c_.stride * l_.column_stride;
    row.scale = l_.scale + p * kWidest;
    row.shift = l_.shift + p * kWidest;
    row.stride = c_.O;
    row.out = static_cast<S*>(c_.out) + (n * l_.Ho + y) * l_.Wo * c_.O + p * kWidest;
    row.columns = l_.Wo;
    row.act = c_.act;
    function.run(row);
  }

  const ConvNormActCall& c_;
  const Layout<T>& l_;
  const S* const weight_ = static_cast<const S*>(c_.weight);
};

template <class T, class S>
void run(const ConvNormActCall& call, const Share& share) {
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<T> l(call, shared, own);
  const Convolution<T, S> convolution(call, l);
  each_of_mine(l.panels, share, [&](int64_t p) { convolution.pack(p); });
  if (share.thread == 0) convolution.pack_offsets();
  fill_zero(l.ring, l.ring_rows * l.row_elements);
  team_barrier();
  const int64_t total = call.N * l.Ho, end = share_of(total, share.thread + 1, share.threads);
  for (int64_t row = share_of(total, share.thread, share.threads); row < end;) {
    const int64_t n = row / l.Ho, first = row - n * l.Ho, stop = min(l.Ho, first + end - row);
    convolution.rows(n, first, stop);
    row += stop - first;
  }
}

template <class T, class S>
constexpr Kernel<ConvNormActCall> kKernel = {scratch<T>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(ConvNormActCall, conv_norm_act_kernel)

}  // namespace emo_kernels::cpu
