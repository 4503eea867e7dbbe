// Computes  dx = w^T * dy (+ local_grad) and dw = dy * x of the depthwise convolution, for dy =
//           grad or c1 grad + c2 (y - mean) + c3: the batch norm behind, taken back in the loads.
// Tiling    one walk down the rows of dy: dy and x come into rings of padded rows in panels of
//           channels; a row of dy gives its share of dw, and the rows of dx it completes.
//           At stride s the columns of dx fall into s phases, each a small dense convolution.
// Traffic   reads grad, y and x once (plus halo rows between threads), writes dx once.
// Numerics  sums over taps in the type it computes in; of dw, up to 8 rows in it, those sums
//           in double; threads in order.
// Limits    kernels up to 64 taps a side.
#include "cpu/depthwise_rings.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

constexpr int64_t kRowsInOneGo = 8;
using Call = DepthwiseBackwardCall;

// The taps that meet the rows (or columns) i of dx with i % stride = phase, last tap first: tap t
// of `count` is last - t * step, and meets row origin + i / stride + t * reach of dy.
struct Phase {
  int64_t last, count, step, reach, origin;

  Phase(const Call& c, int64_t phase) {
    int64_t a = c.stride, b = c.dilation;
    while (b != 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    step = c.stride / a;
    reach = c.dilation / a;
    last = c.K - 1;
    while (last >= 0 && (phase + c.padding - last * c.dilation) % c.stride != 0) --last;
    count = last < 0 ? 0 : last / step + 1;
    origin = last < 0 ? 0 : (phase + c.padding - last * c.dilation) / c.stride;
  }
};

// Taps of the phases before this one.
EMO_INLINE int64_t taps_before(const Call& c, int64_t phase) {
  int64_t taps = 0;
  for (int64_t r = 0; r < phase; ++r) taps += Phase(c, r).count;
  return taps;
}

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
    dy.rows = dy.before = 0;
    for (int64_t q = 0; q < Ho; ++q) {
      const Rows rows = dy_rows(c, Ho, q);
      dy.rows = max(dy.rows, rows.last - rows.first);
    }
    const int64_t phases = min(c.stride, c.W);
    for (int64_t b = 0; b < phases; ++b) dy.before = max(dy.before, -Phase(c, b).origin);
    dy.columns = dy.before + Wo;
    for (int64_t b = 0; b < phases; ++b) {
      const Phase phase(c, b);
      const int64_t columns = (c.W - b + c.stride - 1) / c.stride;
      dy.columns = max(dy.columns, dy.before + phase.origin + columns + phase.count * phase.reach);
    }
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

// sums[tap] += sum over columns of dy[column] x[column * stride + tap], one panel wide.
template <class T>
struct WeightRow {
  const T *dy, *x;
  int64_t columns, width, K, stride, dilation;
  T* sums;  // [K][P]
};

template <class T, int kTaps, int kStride, int kColumns>
EMO_INLINE void weight_block(const WeightRow<T>& row, int64_t column, int64_t lane,
                             Vec<T, kLanesOf<T>>* acc) {
  using V = Vec<T, kLanesOf<T>>;
  constexpr int64_t P = kPanel<T>;
  V dy[kColumns];
  unroll<kColumns>(EMO_UNROLLED(x) { dy[x] = load<V>(row.dy + (column + x) * P + lane); });
  const T* const in = row.x + column * kStride * P + lane;
  unroll<(kColumns - 1) * kStride + kTaps>(EMO_UNROLLED(j) {
    const V value = load<V>(in + j * P);
    unroll<kColumns>(EMO_UNROLLED(x) {
      constexpr int kTap = j.value - x.value * kStride;
      if constexpr (kTap >= 0 && kTap < kTaps) acc[kTap] = fma(value, dy[x], acc[kTap]);
    });
  });
}

template <class T, int kTaps, int kStride>
void weight_row(const WeightRow<T>& row) {
  using V = Vec<T, kLanesOf<T>>;
  constexpr int64_t P = kPanel<T>;
  constexpr int kColumns = 7;
  for (int64_t lane = 0; lane < row.width; lane += kLanesOf<T>) {
    V acc[kTaps];
    unroll<kTaps>(EMO_UNROLLED(j) { acc[j] = V{}; });
    int64_t column = 0;
    for (; column + kColumns <= row.columns; column += kColumns) {
      weight_block<T, kTaps, kStride, kColumns>(row, column, lane, acc);
    }
    for (; column < row.columns; ++column) {
      weight_block<T, kTaps, kStride, 1>(row, column, lane, acc);
    }
    unroll<kTaps>(EMO_UNROLLED(j) {
      T* const at = row.sums + j * P + lane;
      store(at, load<V>(at) + acc[j]);
    });
  }
}

template <class T>
void weight_row_any(const WeightRow<T>& row) {
  using V = Vec<T, kLanesOf<T>>;
  constexpr int64_t P = kPanel<T>;
  for (int64_t lane = 0; lane < row.width; lane += kLanesOf<T>) {
    for (int64_t j = 0; j < row.K; ++j) {
      V acc{};
      for (int64_t column = 0; column < row.columns; ++column) {
        acc = fma(load<V>(row.x + (column * row.stride + j * row.dilation) * P + lane),
                  load<V>(row.dy + column * P + lane), acc);
      }
      T* const at = row.sums + j * P + lane;
      store(at, load<V>(at) + acc);
    }
  }
}

template <class T>
void (*weight_row_for(int64_t K, int64_t stride, int64_t dilation))(const WeightRow<T>&) {
  if (dilation == 1 && (stride == 1 || stride == 2)) {
    const bool one = stride == 1;
    if (K == 3) return one ? weight_row<T, 3, 1> : weight_row<T, 3, 2>;
    if (K == 5) return one ? weight_row<T, 5, 1> : weight_row<T, 5, 2>;
    if (K == 7) return one ? weight_row<T, 7, 1> : weight_row<T, 7, 2>;
  }
  return weight_row_any<T>;
}

template <class T, class S>
DepthwiseRowFunction<T> dx_row_for(int64_t taps, int64_t reach) {
  using E = MapEpilogue<T, S, false>;
  if (reach == 1 && taps == 1) return depthwise_row<T, E, 1, 1>;
  if (reach == 1 && taps == 2) return depthwise_row<T, E, 2, 1>;
  if (reach == 1 && taps == 4) return depthwise_row<T, E, 4, 1>;
  return depthwise_row_for<T, E>(taps, 1, reach);
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
          flush(p0, p1);
          summed = 0;
        }
      }
      for (int64_t p = p0; p < p1; ++p) {
        if (q + 1 < q1) prefetch(n, q + 1, dy_loaded, x_loaded, p);
        for (int64_t y = dx.first; c_.dx && y < dx.last; ++y) dx_row(n, y, p, p - p0);
      }
    }
  }

 private:
  static constexpr int64_t P = kPanel<T>;
  using V = Vec<T, kLanesOf<T>>;

  void load_dy(int64_t n, int64_t q, int64_t p0, int64_t p1) {
    const S *grad = static_cast<const S*>(c_.grad), *y = static_cast<const S*>(c_.y);
    const T* const rows = static_cast<const T*>(c_.coefficients);
    const int64_t C = c_.C, map_row = (n * l_.Ho + q) * l_.Wo;
    if (rows == nullptr) {
      fill_row(l_.dy, q, l_.Wo, map_row, C, p0, p1 - p0,
               [&](int64_t at, int64_t count, int64_t)
                   __attribute__((always_inline)) { return load_as<V>(grad + at, count); });
      return;
    }
    fill_row(l_.dy, q, l_.Wo, map_row, C, p0, p1 - p0,
             [&](int64_t at, int64_t count, int64_t channel) __attribute__((always_inline)) {
               const T* const c = rows + channel;
               const V centred = load_as<V>(y + at, count) - load_as<V>(c + 3 * C, count);
               return fma(load_as<V>(c, count), load_as<V>(grad + at, count),
                          fma(load_as<V>(c + C, count), centred, load_as<V>(c + 2 * C, count)));
             });
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
    fill_row(l_.x, r, c_.W, (n * c_.H + r) * c_.W, c_.C, p0, p1 - p0,
             [&](int64_t at, int64_t count, int64_t)
                 __attribute__((always_inline)) { return load_as<V>(x + at, count); });
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

  void flush(int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) {
      for (int64_t t = 0; t < l_.taps; ++t) {
        for (int64_t lane = 0; lane < P; lane += kLanesOf<T>) {
          T* const partial = l_.partial + ((p - p0) * l_.taps + t) * P + lane;
          Doubles<T>(load<V>(partial)).add_to(l_.totals + (t * l_.panels + p) * P + lane);
          store(partial, V{});
        }
      }
    }
  }

  void dx_row(int64_t n, int64_t y, int64_t p, int64_t g) {
    const int64_t phase_y = y % c_.stride, begin = (n * c_.H + y) * c_.W * c_.C + p * P;
    const Phase rows(c_, phase_y);
    const T* const weights = l_.weights + p * l_.taps * P;
    const int64_t before = taps_before(c_, phase_y) * c_.K;
    for (int64_t b = 0, taps = 0; b < min(c_.stride, c_.W); ++b) {
      const Phase columns(c_, b);
      MapRow<T, S> row{};
      row.K = columns.count;
      row.stride = 1;
      row.dilation = columns.reach;
      row.weights = weights + (before + rows.count * taps) * P;
      row.shift = l_.zeros;
      row.columns = (c_.W - b + c_.stride - 1) / c_.stride;
      row.panel = P;
      row.width = min<int64_t>(P, c_.C - p * P);
      row.map = static_cast<S*>(c_.dx) + begin + b * c_.C;
      row.column_stride = c_.stride * c_.C;
      row.add = c_.local_grad ? static_cast<const S*>(c_.local_grad) + begin + b * c_.C : nullptr;
      for (int64_t t = 0; t < rows.count && columns.count > 0; ++t) {
        const int64_t q = y / c_.stride + rows.origin + t * rows.reach;
        if (q < 0 || q >= l_.Ho) continue;
        if (row.taps == 0) row.first_tap = t;
        row.rows[row.taps++] = l_.dy.first(g, q) + columns.origin * P;
      }
      dx_row_for<T, S>(columns.count, columns.reach)(row);
      taps += columns.count;
    }
  }

  const Call& c_;
  const Layout<T>& l_;
  void (*const weight_row_)(const WeightRow<T>&);
};

// The filters of panel p, phase by phase, last tap first.
template <class T>
void pack_phases(const Call& c, int64_t p, T* packed) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t a = 0; a < c.stride; ++a) {
    const Phase rows(c, a);
    for (int64_t b = 0; b < min(c.stride, c.W); ++b) {
      const Phase columns(c, b);
      const int64_t taps = rows.count * columns.count;
      if (taps == 0) continue;
      const int64_t at = taps_before(c, a) * c.K + rows.count * taps_before(c, b);
      pack_taps<T>(static_cast<const T*>(c.weight), c.C, c.K, p * P, taps, packed + at * P,
                   [&](int64_t t) {
                     const int64_t i = rows.last - t / columns.count * rows.step;
                     return i * c.K + columns.last - t % columns.count * columns.step;
                   });
    }
  }
}

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
  T* const dweight = static_cast<T*>(call.dweight);
  const int64_t channels = share_of(call.C, share.thread + 1, share.threads);
  for (int64_t c = share_of(call.C, share.thread, share.threads); c < channels; ++c) {
    for (int64_t t = 0; t < l.taps; ++t) {
      double sum = 0.0;
      for (int other = 0; other < share.threads; ++other) {
        const char* const at = share.own + other * share.own_bytes;
        sum += reinterpret_cast<const double*>(at)[t * l.panels * P + c];
      }
      dweight[c * l.taps + t] = static_cast<T>(sum);
    }
  }
}

template <class T, class S>
constexpr Kernel<Call> kKernel = {scratch<T>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(DepthwiseBackwardCall, depthwise_conv2d_backward_kernel)

}  // namespace emo_kernels::cpu
