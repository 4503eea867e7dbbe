// Computes  dx = w^T * dy (+ local_grad) and dw = dy * x of the depthwise convolution, for dy =
//           grad or c1 grad + c2 (y - mean) + c3: the batch norm behind, taken back in the loads.
// Tiling    one walk down the rows of dy: dy and x come into rings of padded rows in panels of
//           channels; a row of dy gives its share of dw, and the rows of dx it completes.
//           At stride s the columns of dx fall into s phases, each a small dense convolution.
// Traffic   reads grad, y and x once (plus halo rows between threads), writes dx once.
// Numerics  sums over taps in the type it computes in; of dw, up to 8 rows in it, those sums
//           in double; threads in order.
// Limits    kernels up to 64 taps a side.
#include "cpu/depthwise_gradient.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

using Call = DepthwiseBackwardCall;

struct Rows {
  int64_t first, last;
};

// Rows of dx that are done with row q of dy.
EMO_INLINE Rows dx_rows(const Call& c, int64_t Ho, int64_t q) {
  return {min(c.H, q * c.stride), q + 1 == Ho ? c.H : min(c.H, (q + 1) * c.stride)};
}

// Rows of dy that must be at hand for row q.
EMO_INLINE Rows dy_rows(const Call& c, int64_t Ho, int64_t q) {
  const Rows dx = dx_rows(c, Ho, q);
  if (c.dx == nullptr || dx.first >= dx.last) return {q, q + 1};
  const int64_t above = dx.first + c.padding - (c.K - 1) * c.dilation;
  const int64_t below = min(Ho - 1, (dx.last - 1 + c.padding) / c.stride);
  return {min(q, above > 0 ? above / c.stride : 0), max(q, below) + 1};
}

template <class T>
struct Layout {
  int64_t Ho, Wo, panels, group, taps;
  T *weights, *zeros;  // shared
  double* totals;      // own, as what follows: [taps][panels * P]
  T* partial;          // [group][taps][P]
  Ring<T> dy, x;

  Layout(const Call& c, Places& shared, Places& own)
      : Ho(output_rows(c)), Wo(output_columns(c)), panels(ceil_div(c.C, P)), taps(c.K * c.K) {
    weights = shared.take<T>(panels * taps * P);
    zeros = shared.take<T>(P);
    x.before = c.padding;
    x.rows = (c.K - 1) * c.dilation + 1;
    x.columns = max(c.W + 2 * c.padding, (Wo - 1) * c.stride + x.rows);
    dy.rows = 0;
    for (int64_t q = 0; q < Ho; ++q) {
      const Rows rows = dy_rows(c, Ho, q);
      dy.rows = max(dy.rows, rows.last - rows.first);
    }
    const DyColumns columns(c, Wo);
    dy.before = columns.before;
    dy.columns = columns.all;
    const int64_t elements = dy.panel_stride() + (c.dweight ? x.panel_stride() + taps * P : 0);
    group = max<int64_t>(1, min(panels, kRingBytes / (elements * static_cast<int64_t>(sizeof(T)))));
    totals = own.take<double>(c.dweight ? taps * panels * P : 0);
    partial = own.take<T>(c.dweight ? group * taps * P : 0);
    dy.data = own.take<T>(group * dy.panel_stride() + P);
    x.data = own.take<T>(c.dweight ? group * x.panel_stride() + P : 0);
  }
  static constexpr int64_t P = kPanel<T>;
};

template <class T>
ScratchBytes scratch(const Call& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<T> layout(call, shared, own);
  return {shared.used, own.used};
}

template <class T, class S>
class Gradient {
 public:
  Gradient(const Call& call, const Layout<T>& layout)
      : c_(call), l_(layout), weight_row_(weight_row_for<T>(c_.K, c_.stride, c_.dilation)) {
    fill_zero(l_.dy.data, l_.group * l_.dy.panel_stride() + P);
    if (c_.dweight == nullptr) return;
    fill_zero(l_.x.data, l_.group * l_.x.panel_stride() + P);
    fill_zero(l_.totals, l_.taps * l_.panels * P);
    fill_zero(l_.partial, l_.group * l_.taps * P);
  }

  // Rows [q0, q1) of dy of image n, panels [p0, p1).
  void rows(int64_t n, int64_t q0, int64_t q1, int64_t p0, int64_t p1) {
    int64_t dy_loaded = dy_rows(c_, l_.Ho, q0).first, x_loaded = 0, summed = 0;
    for (int64_t q = q0; q < q1; ++q) {
      const Rows wanted = dy_rows(c_, l_.Ho, q), dx = dx_rows(c_, l_.Ho, q);
      for (; dy_loaded < wanted.last; ++dy_loaded) load_dy(n, dy_loaded, p0, p1);
      if (c_.dweight) {
        const int64_t top = q * c_.stride - c_.padding, end = min(c_.H, top + l_.x.rows);
        for (int64_t r = max(x_loaded, max<int64_t>(0, top)); r < end; ++r) load_x(n, r, p0, p1);
        x_loaded = max(x_loaded, end);
        for (int64_t p = p0; p < p1; ++p) add_weight_rows(q, p, p - p0);
        if (++summed == kRowsInOneGo || q + 1 == q1) {
          for (int64_t p = p0; p < p1; ++p) {
            flush_taps(l_.partial + (p - p0) * l_.taps * P, l_.taps, l_.totals + p * P,
                       l_.panels * P);
          }
          summed = 0;
        }
      }
      for (int64_t p = p0; p < p1; ++p) {
        if (q + 1 < q1) prefetch(n, q + 1, dy_loaded, x_loaded, p);
        for (int64_t y = dx.first; c_.dx && y < dx.last; ++y) row_of_dx(n, y, p, p - p0);
      }
    }
  }

 private:
  static constexpr int64_t P = kPanel<T>;

  void load_dy(int64_t n, int64_t q, int64_t p0, int64_t p1) {
    fill_dy_row<T, S>(c_, l_.dy, q, (n * l_.Ho + q) * l_.Wo, l_.Wo, p0, p1 - p0);
  }

  // Asks for what row `next` of dy will bring in and write, while the one before is worked on.
  void prefetch(int64_t n, int64_t next, int64_t q, int64_t r, int64_t p) {
    const int64_t row = c_.W * c_.C;
    if (q < l_.Ho) {
      const int64_t at = (n * l_.Ho + q) * l_.Wo * c_.C;
      prefetch_row<T>(static_cast<const S*>(c_.grad) + at, l_.Wo, c_.C, p);
      if (c_.coefficients) prefetch_row<T>(static_cast<const S*>(c_.y) + at, l_.Wo, c_.C, p);
    }
    for (int64_t i = r; c_.dweight && i < min(c_.H, r + c_.stride); ++i) {
      prefetch_row<T>(static_cast<const S*>(c_.x) + (n * c_.H + i) * row, c_.W, c_.C, p);
    }
    const Rows dx = dx_rows(c_, l_.Ho, next);
    for (int64_t i = dx.first; c_.dx && i < dx.last; ++i) {
      const int64_t at = (n * c_.H + i) * row;
      prefetch_row<T>(static_cast<const S*>(c_.dx) + at, c_.W, c_.C, p);
      if (c_.local_grad) prefetch_row<T>(static_cast<const S*>(c_.local_grad) + at, c_.W, c_.C, p);
    }
  }

  void load_x(int64_t n, int64_t r, int64_t p0, int64_t p1) {
    const S* const x = static_cast<const S*>(c_.x);
    load_row(l_.x, r, c_.W, (n * c_.H + r) * c_.W, c_.C, p0, p1 - p0, x);
  }

  void add_weight_rows(int64_t q, int64_t p, int64_t g) {
    WeightRow<T> row{l_.dy.first(g, q), nullptr,     l_.Wo,  min<int64_t>(P, c_.C - p * P), c_.K,
                     c_.stride,         c_.dilation, nullptr};
    for (int64_t t = 0; t < c_.K; ++t) {
      const int64_t y = q * c_.stride - c_.padding + t * c_.dilation;
      if (y < 0 || y >= c_.H) continue;
      row.x = l_.x.row(g, y);
      row.sums = l_.partial + (g * l_.taps + t * c_.K) * P;
      weight_row_(row);
    }
  }

  void row_of_dx(int64_t n, int64_t y, int64_t p, int64_t g) {
    const int64_t begin = (n * c_.H + y) * c_.W * c_.C + p * P;
    const InputRow<T, S> to{
        l_.weights + p * l_.taps * P,
        l_.zeros,
        min<int64_t>(P, c_.C - p * P),
        l_.Ho,
        static_cast<S*>(c_.dx) + begin,
        c_.C,
        c_.local_grad ? static_cast<const S*>(c_.local_grad) + begin : nullptr,
    };
    dx_row<T, S>(c_, y, to, [&](int64_t q) { return l_.dy.first(g, q); });
  }

  const Call& c_;
  const Layout<T>& l_;
  void (*const weight_row_)(const WeightRow<T>&);
};

template <class T, class S>
void run(const Call& call, const Share& share) {
  constexpr int64_t P = kPanel<T>;
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<T> l(call, shared, own);
  const int64_t last = share_of(l.panels, share.thread + 1, share.threads);
  for (int64_t p = share_of(l.panels, share.thread, share.threads); p < last; ++p) {
    pack_phases<T>(call, p, l.weights + p * l.taps * P);
  }
  if (share.thread == 0) fill_zero(l.zeros, P);
  Gradient<T, S> gradient(call, l);
  team_barrier();
  const int64_t total = call.N * l.Ho, end = share_of(total, share.thread + 1, share.threads);
  for (int64_t row = share_of(total, share.thread, share.threads); row < end;) {
    const int64_t n = row / l.Ho, first = row - n * l.Ho, stop = min(l.Ho, first + end - row);
    for (int64_t p = 0; p < l.panels; p += l.group) {
      gradient.rows(n, first, stop, p, min(l.panels, p + l.group));
    }
    row += stop - first;
  }
  if (call.dweight == nullptr) return;
  team_barrier();
  add_up_taps<T>(call, l.totals, l.panels * P, share);
}

template <class T, class S>
constexpr Kernel<Call> kKernel = {scratch<T>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(DepthwiseBackwardCall, depthwise_conv2d_backward_kernel)

}  // namespace emo_kernels::cpu
