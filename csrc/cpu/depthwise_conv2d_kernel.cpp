// Computes  y = w * x, one K x K filter a channel, and with it the sums of y and its square around
//           a pivot: the statistics of the batch norm behind.
// Tiling    a thread walks its output rows; input rows come into a ring of padded rows in panels
//           of channels, as many panels at a time as keep the ring in the L2 cache.
// Traffic   reads x once (plus halo rows between threads), writes y once; bound by memory at K = 3.
// Numerics  a sum over the taps in row-major order in the type it computes in; up to 8 columns are
//           summed in it, as they are stored and around a mean (moments.h), those sums in double;
//           threads in order.
// Limits    kernels up to 64 taps a side.
#include "cpu/depthwise_rings.h"
#include "cpu/moments.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

template <class T>
struct Layout {
  int64_t Ho, Wo, panels, group;  // panels of channels in all, and at a time
  T *weights, *zeros;             // shared
  Ring<T> ring;                   // own, as what follows
  Moments<T> moments;

  Layout(const DepthwiseCall& c, Places& shared, Places& own)
      : Ho(output_rows(c)), Wo(output_columns(c)), panels(ceil_div(c.C, kPanel<T>)) {
    constexpr int64_t P = kPanel<T>;
    weights = shared.take<T>(panels * c.K * c.K * P);
    zeros = shared.take<T>(P);
    ring.before = c.padding;
    ring.rows = (c.K - 1) * c.dilation + 1;
    ring.columns = max(c.W + 2 * c.padding, (Wo - 1) * c.stride + ring.rows);
    const int64_t bytes = ring.panel_stride() * static_cast<int64_t>(sizeof(T));
    group = max<int64_t>(1, min(panels, kRingBytes / bytes));
    moments = Moments<T>::at(own, panels * P);
    ring.data = own.take<T>(group * ring.panel_stride() + P);
  }
};

template <class T>
ScratchBytes scratch(const DepthwiseCall& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<T> layout(call, shared, own);
  return {shared.used, own.used};
}

template <class T, class S>
class Convolution {
 public:
  // Of rows from `first` on, counted over all images.
  Convolution(const DepthwiseCall& call, const Layout<T>& layout, int64_t first)
      : c_(call),
        l_(layout),
        first_(first),
        plain_(depthwise_row_for<T, MapEpilogue<T, S, false>>(c_.K, c_.stride, c_.dilation)),
        summed_(depthwise_row_for<T, MapEpilogue<T, S, true>>(c_.K, c_.stride, c_.dilation)) {
    l_.moments.clear(l_.panels * P);
    fill_zero(l_.ring.data, l_.group * l_.ring.panel_stride() + P);
  }

  // Output rows [y0, y1) of image n, panels [p0, p1).
  void rows(int64_t n, int64_t y0, int64_t y1, int64_t p0, int64_t p1) {
    const S* const x = static_cast<const S*>(c_.x);
    int64_t loaded = 0;
    for (int64_t y = y0; y < y1; ++y) {
      const int64_t top = y * c_.stride - c_.padding;
      const int64_t end = min(c_.H, top + l_.ring.rows);
      for (int64_t r = max(loaded, max<int64_t>(0, top)); r < end; ++r) {
        load_row(l_.ring, r, c_.W, (n * c_.H + r) * c_.W, c_.C, p0, p1 - p0, x);
      }
      loaded = max(loaded, end);
      const int64_t next = min(c_.H, end + c_.stride);
      for (int64_t p = p0; p < p1; ++p) {
        for (int64_t r = end; r < next && y + 1 < y1; ++r) {
          prefetch_row<T>(x + (n * c_.H + r) * c_.W * c_.C, c_.W, c_.C, p);
        }
        if (y + 1 < y1) {
          const S* const out = static_cast<const S*>(c_.y) + (n * l_.Ho + y + 1) * l_.Wo * c_.C;
          prefetch_row<T>(out, l_.Wo, c_.C, p);
        }
        row(n, y, p, p - p0);
      }
    }
  }

 private:
  static constexpr int64_t P = kPanel<T>;

  void row(int64_t n, int64_t y, int64_t p, int64_t g) {
    MapRow<T, S> row{};
    row.K = c_.K;
    row.stride = c_.stride;
    row.dilation = c_.dilation;
    row.weights = l_.weights + p * c_.K * c_.K * P;
    row.shift = l_.zeros;
    row.columns = l_.Wo;
    row.panel = P;
    row.width = min<int64_t>(P, c_.C - p * P);
    row.map = static_cast<S*>(c_.y) + (n * l_.Ho + y) * l_.Wo * c_.C + p * P;
    row.column_stride = c_.C;
    row.pivot = l_.moments.pivot + p * P;
    row.sums = l_.moments.sums + p * P;
    row.squares = l_.moments.squares + p * P;
    for (int64_t t = 0; t < c_.K; ++t) {
      const int64_t in_y = y * c_.stride - c_.padding + t * c_.dilation;
      if (in_y < 0 || in_y >= c_.H) continue;
      if (row.taps == 0) row.first_tap = t;
      row.rows[row.taps++] = l_.ring.row(g, in_y);
    }
    const bool first = n * l_.Ho + y == first_;
    (c_.sums && !first ? summed_ : plain_)(row);
    if (c_.sums && first) l_.moments.begin(row.map, l_.Wo, c_.C, p * P, row.width);
  }

  const DepthwiseCall& c_;
  const Layout<T>& l_;
  const int64_t first_;
  const DepthwiseRowFunction<T> plain_, summed_;
};

template <class T, class S>
void run(const DepthwiseCall& call, const Share& share) {
  constexpr int64_t P = kPanel<T>;
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<T> l(call, shared, own);
  const T* const weight = static_cast<const T*>(call.weight);
  const int64_t last = share_of(l.panels, share.thread + 1, share.threads);
  for (int64_t p = share_of(l.panels, share.thread, share.threads); p < last; ++p) {
    pack_taps<T>(weight, call.C, call.K, p * P, call.K * call.K,
                 l.weights + p * call.K * call.K * P, [](int64_t t) { return t; });
  }
  if (share.thread == 0) fill_zero(l.zeros, P);
  const int64_t total = call.N * l.Ho, end = share_of(total, share.thread + 1, share.threads);
  const int64_t begin = share_of(total, share.thread, share.threads);
  Convolution<T, S> convolution(call, l, begin);
  team_barrier();
  for (int64_t row = begin; row < end;) {
    const int64_t n = row / l.Ho, first = row - n * l.Ho, stop = min(l.Ho, first + end - row);
    for (int64_t p = 0; p < l.panels; p += l.group) {
      convolution.rows(n, first, stop, p, min(l.panels, p + l.group));
    }
    row += stop - first;
  }
  if (call.sums == nullptr) return;
  team_barrier();
  l.moments.publish(call.C, call.pivot, call.sums, total, l.Wo, share);
}

template <class T, class S>
constexpr Kernel<DepthwiseCall> kKernel = {scratch<T>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(DepthwiseCall, depthwise_conv2d_kernel)

}  // namespace emo_kernels::cpu
