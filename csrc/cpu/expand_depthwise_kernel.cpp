// Computes  y = w * e, e = act(a), a = W norm(x) + b, and with it the sums of y and its square
//           around a pivot; e and act'(a) where they are kept.
// Tiling    bands of whole rows of e, over the images in a row. Of each panel of expanded channels
//           a band comes into the L2 cache, as rows with zero columns, and the rows of y that it
//           completes are written; the last rows of every panel wait for the band behind.
// Traffic   reads x once (plus halo rows between threads), writes y once, and where they are kept e
//           and act'(a); the packed weight passes once a band.
// Numerics  as expand_kernel.cpp and depthwise_conv2d_kernel.cpp; maps have the same bits for any
//           split.
// Limits    ungrouped; kernels up to 64 taps a side.
#include "cpu/depthwise_rings.h"
#include "cpu/moments.h"
#include "cpu/norm_rows.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

using Call = ExpandDepthwiseCall;

// Of rows of all images, one behind the other: e's that row `y` of y begins with; those in front
// of it need not be at hand for it.
EMO_INLINE int64_t first_row(const DepthwiseCall& c, int64_t Ho, int64_t y) {
  return y / Ho * c.H + max<int64_t>(0, min(c.H, y % Ho * c.stride - c.padding));
}

// The end of those that it needs.
EMO_INLINE int64_t last_row(const DepthwiseCall& c, int64_t Ho, int64_t y) {
  const int64_t end = y % Ho * c.stride - c.padding + (c.K - 1) * c.dilation + 1;
  return y / Ho * c.H + max<int64_t>(0, min(c.H, end));
}

template <class E>
struct Layout {
  using T = SumOf<E>;
  static constexpr int64_t P = kPanel<T>;
  int64_t Ho, Wo, taps, rows, panels;  // rows: of a band, at most
  Blocked<E> weight;                   // shared, as what follows: the transpose, (C, M)
  T *bias, *filters, *zeros;
  NormRows<T> norm;
  Moments<T> moments;  // own, as what follows
  Blocked<E> n;
  T* tile;
  Ring<T> band, above;  // of one panel; of each, the rows in front of the band

  static int64_t band_rows(const Call& call) {
    constexpr int64_t kMost = 336, kBytes = 448 << 10;
    const int64_t H = call.depthwise.H;
    const int64_t elements = ceil_div(call.expand.C, P) * P + 4 * P;
    const int64_t pixels = min(kMost, kBytes / (elements * static_cast<int64_t>(sizeof(T))));
    const int64_t rows = max<int64_t>(1, pixels / call.depthwise.W);
    return min(call.N * H, rows < H ? rows : rows / H * H);
  }

  Layout(const Call& call, Places& shared, Places& own)
      : Ho(output_rows(call.depthwise)),
        Wo(output_columns(call.depthwise)),
        taps(call.depthwise.K * call.depthwise.K),
        rows(band_rows(call)),
        panels(ceil_div(call.expand.M, P)) {
    const DepthwiseCall& c = call.depthwise;
    const int64_t C = call.expand.C, pixels = rows * c.W, reach = (c.K - 1) * c.dilation;
    weight = Blocked<E>::at(shared, C, call.expand.M);
    bias = shared.take<T>(panels * P);
    filters = shared.take<T>(panels * taps * P);
    zeros = shared.take<T>(P);
    moments = Moments<T>::at(own, panels * P);
    norm = NormRows<T>::at(call.expand.norm, C, call.expand.eps, pixels, shared, own);
    n = Blocked<E>::at(own, pixels, C);
    tile = own.take<T>((pixels + kMostGemmRows) * P);
    band.before = above.before = c.padding;
    band.columns = above.columns = max(c.W + 2 * c.padding, (Wo - 1) * c.stride + reach + 1);
    band.rows = rows;
    above.rows = max<int64_t>(1, reach);
    band.data = own.take<T>(band.panel_stride() + P);
    above.data = own.take<T>(panels * above.panel_stride() + P);
  }
};

template <class E>
ScratchBytes scratch(const Call& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<E> layout(call, shared, own);
  return {shared.used, own.used};
}

template <class T, class S, class E>
class Convolution {
 public:
  Convolution(const Call& call, const Layout<E>& layout)
      : x_(call.expand),
        c_(call.depthwise),
        l_(layout),
        plain_(depthwise_row_for<T, MapEpilogue<T, S, false>>(c_.K, c_.stride, c_.dilation)),
        summed_(depthwise_row_for<T, MapEpilogue<T, S, true>>(c_.K, c_.stride, c_.dilation)) {
    l_.moments.clear(l_.panels * P);
    fill_zero(l_.band.data, l_.band.panel_stride() + P);
    fill_zero(l_.above.data, l_.panels * l_.above.panel_stride() + P);
  }

  // Rows [y0, y1) of all images' y.
  void rows(int64_t y0, int64_t y1) {
    if (y0 == y1) return;
    first_ = y0;
    const bool last = y1 == c_.N * l_.Ho;
    mine_ = last ? c_.N * c_.H : first_row(c_, l_.Ho, y1);
    const int64_t begin = y0 == 0 ? 0 : first_row(c_, l_.Ho, y0);
    const int64_t end = max(mine_, last_row(c_, l_.Ho, y1 - 1));
    // One at least: rows of y may see nothing but the zeros around e.
    const int64_t bands = max<int64_t>(1, ceil_div(end - begin, l_.rows));
    const int64_t step = ceil_div(end - begin, bands);
    for (int64_t i = 0, r = begin; i < bands; ++i, r += step) {
      begin_ = r;
      end_ = min(end, r + step);
      int64_t y = y0;
      while (y < y1 && last_row(c_, l_.Ho, y) <= end_) ++y;
      band(y0, y);
      y0 = y;
    }
  }

 private:
  static constexpr int64_t P = kPanel<T>;
  using V = Vec<T, kLanesOf<T>>;

  // Rows [begin_, end_) of e, and the rows [y0, y1) of y that they complete.
  void band(int64_t y0, int64_t y1) {
    const int64_t first = begin_ * c_.W, pixels = (end_ - begin_) * c_.W;
    l_.norm.forward(static_cast<const S*>(x_.x) + first * x_.C, pixels, l_.n);
    for (int64_t p = 0; p < l_.panels; ++p) {
      product<E, false>({l_.n.data, l_.n.stride(), l_.weight.panel(p), x_.C, l_.tile, pixels,
                         l_.bias + p * P, false},
                        l_.weight.width(p));
      with_activation(x_.act, [&](auto act) { expand<decltype(act)::value>(p, y0, y1); });
      for (int64_t y = y0; y < y1; ++y) row(y, p);
      for (int64_t r = max(begin_, end_ - l_.above.rows); r < end_ && c_.K > 1; ++r) {
        const T* const from = l_.band.first(0, r);
        T* const to = l_.above.first(p, r);
        for (int64_t i = 0; i < c_.W * P; i += kLanesOf<T>) store(to + i, load<V>(from + i));
      }
    }
  }

  // The band's e of panel p, from the tile; asks for the rows [y0, y1) of y meanwhile.
  template <Activation kAct>
  void expand(int64_t p, int64_t y0, int64_t y1) {
    const int64_t channels = min<int64_t>(P, c_.C - p * P), pixels = (end_ - begin_) * c_.W;
    const int64_t next = next_panel<T>(p, c_.C, pixels);
    const T* a = l_.tile;
    int64_t y = y0;
    for (int64_t r = begin_; r < end_; ++r) {
      for (; y < y0 + (y1 - y0) * (r + 1 - begin_) / (end_ - begin_); ++y) {
        prefetch_row<T>(static_cast<const S*>(c_.y) + y * l_.Wo * c_.C, l_.Wo, c_.C, p);
      }
      const int64_t at = r * c_.W * c_.C + p * P;
      S* const out = r < mine_ && x_.out ? static_cast<S*>(x_.out) + at : nullptr;
      S* const slope = r < mine_ && x_.slope ? static_cast<S*>(x_.slope) + at : nullptr;
      T* const to = l_.band.first(0, r);
      for (int64_t i = 0; i < c_.W; ++i, a += P) {
        each_lane_of<T>(channels, [&](int64_t lane, int64_t count) __attribute__((always_inline)) {
          V value, derivative;
          const int64_t place = i * c_.C + lane;
          // The same function for all rows: an e that is not written has the bits of its owner's.
          if (x_.slope) {
            activate_and_slope<T, kAct>(load<V>(a + lane), value, derivative);
          } else {
            value = activate<T, kAct>(load<V>(a + lane));
          }
          if (slope) {
            fetch(slope + place + next);
            store_as(slope + place, derivative, count);
          }
          if (out) {
            fetch(out + place + next);
            store_as(out + place, value, count);
          }
          store(to + i * P + lane, as_stored<S>(value));
        });
      }
    }
  }

  // Row y of all images' y, panel p.
  void row(int64_t y, int64_t p) {
    const int64_t image = y / l_.Ho, top = y % l_.Ho * c_.stride - c_.padding;
    MapRow<T, S> row{};
    row.K = c_.K;
    row.stride = c_.stride;
    row.dilation = c_.dilation;
    row.weights = l_.filters + p * l_.taps * P;
    row.shift = l_.zeros;
    row.columns = l_.Wo;
    row.panel = P;
    row.width = min<int64_t>(P, c_.C - p * P);
    row.map = static_cast<S*>(c_.y) + y * l_.Wo * c_.C + p * P;
    row.column_stride = c_.C;
    row.pivot = l_.moments.pivot + p * P;
    row.sums = l_.moments.sums + p * P;
    row.squares = l_.moments.squares + p * P;
    for (int64_t t = 0; t < c_.K; ++t) {
      const int64_t in_y = top + t * c_.dilation, r = image * c_.H + in_y;
      if (in_y < 0 || in_y >= c_.H) continue;
      if (row.taps == 0) row.first_tap = t;
      row.rows[row.taps++] = r < begin_ ? l_.above.row(p, r) : l_.band.row(0, r);
    }
    (c_.sums && y != first_ ? summed_ : plain_)(row);
    if (c_.sums && y == first_) l_.moments.begin(row.map, l_.Wo, c_.C, p * P, row.width);
  }

  const ExpandCall& x_;
  const DepthwiseCall& c_;
  const Layout<E>& l_;
  const DepthwiseRowFunction<T> plain_, summed_;
  int64_t first_ = 0;                       // row of y
  int64_t begin_ = 0, end_ = 0, mine_ = 0;  // the band; e behind `mine_` is another thread's
};

template <class T, class S>
void run(const Call& call, const Share& share) {
  constexpr int64_t P = kPanel<T>;
  using E = TermOf<S>;
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<E> l(call, shared, own);
  const ExpandCall& x = call.expand;
  const DepthwiseCall& c = call.depthwise;
  const T* const bias = static_cast<const T*>(x.bias);
  each_of_mine(l.panels, share, [&](int64_t p) {
    pack_transposed(static_cast<const T*>(x.weight), x.C, l.weight, p);
    copy_padded<T>(bias ? bias + p * P : nullptr, l.weight.channels(p), l.bias + p * P, P);
    pack_taps<T>(static_cast<const T*>(c.weight), c.C, c.K, p * P, l.taps,
                 l.filters + p * l.taps * P, [](int64_t t) { return t; });
  });
  if (share.thread == 0) {
    l.norm.fill(x.norm_weight, x.norm_bias, nullptr, nullptr);
    fill_zero(l.zeros, P);
  }
  Convolution<T, S, E> convolution(call, l);
  team_barrier();
  const int64_t rows = call.N * l.Ho;
  convolution.rows(share_of(rows, share.thread, share.threads),
                   share_of(rows, share.thread + 1, share.threads));
  if (c.sums == nullptr) return;
  team_barrier();
  l.moments.publish(c.C, c.pivot, c.sums, rows, l.Wo, share);
}

template <class T, class S>
constexpr Kernel<Call> kKernel = {scratch<TermOf<S>>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(ExpandDepthwiseCall, expand_depthwise_kernel)

}  // namespace emo_kernels::cpu
