// The gradient of a depthwise convolution, row by row of one panel of channels: of its input, which
// at stride s falls into s phases, each a small dense convolution, and of its filters.
#pragma once

#include "cpu/depthwise_rings.h"

namespace emo_kernels::cpu {
namespace {

constexpr int64_t kRowsInOneGo = 8;  // whose share of dw is summed in the type it computes in

// The taps that meet the rows (or columns) i of dx with i % stride = phase, last tap first: tap t
// of `count` is last - t * step, and meets row origin + i / stride + t * reach of dy.
struct Phase {
  int64_t last, count, step, reach, origin;

  Phase(const DepthwiseBackwardCall& c, int64_t phase) {
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
EMO_INLINE int64_t taps_before(const DepthwiseBackwardCall& c, int64_t phase) {
  int64_t taps = 0;
  for (int64_t r = 0; r < phase; ++r) taps += Phase(c, r).count;
  return taps;
}

// Zero columns in front of a row of dy, and columns in all, that the phases of dx read.
struct DyColumns {
  int64_t before = 0, all;

  DyColumns(const DepthwiseBackwardCall& c, int64_t Wo) {
    const int64_t phases = min(c.stride, c.W);
    for (int64_t b = 0; b < phases; ++b) before = max(before, -Phase(c, b).origin);
    all = before + Wo;
    for (int64_t b = 0; b < phases; ++b) {
      const Phase phase(c, b);
      const int64_t columns = (c.W - b + c.stride - 1) / c.stride;
      all = max(all, before + phase.origin + columns + phase.count * phase.reach);
    }
  }
};

// Row q of dy, or of all images' in a row, into the ring: grad, or c1 grad + c2 (y - mean) + c3.
template <class T, class S>
void fill_dy_row(const DepthwiseBackwardCall& c, const Ring<T>& ring, int64_t q, int64_t map_row,
                 int64_t Wo, int64_t panel0, int64_t panels) {
  using V = Vec<T, kLanesOf<T>>;
  const S *grad = static_cast<const S*>(c.grad), *y = static_cast<const S*>(c.y);
  const T* const rows = static_cast<const T*>(c.coefficients);
  const int64_t C = c.C;
  if (rows == nullptr) {
    load_row(ring, q, Wo, map_row, C, panel0, panels, grad);
    return;
  }
  fill_row(ring, q, Wo, map_row, C, panel0, panels,
           [&](int64_t channel, int64_t count) __attribute__((always_inline)) {
             const T* const at = rows + channel;
             const V c1 = load_as<V>(at, count), c2 = load_as<V>(at + C, count);
             const V c3 = load_as<V>(at + 2 * C, count), mean = load_as<V>(at + 3 * C, count);
             return [=](int64_t at) __attribute__((always_inline)) {
               const V centred = load_as<V>(y + at, count) - mean;
               return fma(c1, load_as<V>(grad + at, count), fma(c2, centred, c3));
             };
           });
}

// The filters of panel p, phase by phase, last tap first.
template <class T>
void pack_phases(const DepthwiseBackwardCall& c, int64_t p, T* packed) {
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
DepthwiseRowFunction<T> dx_row_for(int64_t taps, int64_t reach) {
  using E = MapEpilogue<T, S, false>;
  if (reach == 1 && taps == 1) return depthwise_row<T, E, 1, 1>;
  if (reach == 1 && taps == 2) return depthwise_row<T, E, 2, 1>;
  if (reach == 1 && taps == 4) return depthwise_row<T, E, 4, 1>;
  return depthwise_row_for<T, E>(taps, 1, reach);
}

// Where a row of dx of one panel goes: its column 0, and from one column to the next.
template <class T, class S>
struct InputRow {
  const T *weights, *zeros;  // the panel's filters by phases, and no shift
  int64_t width, Ho;
  S* map;
  int64_t step;
  const S* add;  // laid out as the map, null: nothing
};

// Row y of dx; row_of(q) is the place of column 0 of row q of dy.
template <class T, class S, class F>
EMO_INLINE void dx_row(const DepthwiseBackwardCall& c, int64_t y, const InputRow<T, S>& to,
                       F row_of) {
  constexpr int64_t P = kPanel<T>;
  const int64_t phase_y = y % c.stride;
  const Phase rows(c, phase_y);
  const int64_t before = taps_before(c, phase_y) * c.K;
  for (int64_t b = 0, taps = 0; b < min(c.stride, c.W); ++b) {
    const Phase columns(c, b);
    MapRow<T, S> row{};
    row.K = columns.count;
    row.stride = 1;
    row.dilation = columns.reach;
    row.weights = to.weights + (before + rows.count * taps) * P;
    row.shift = to.zeros;
    row.columns = (c.W - b + c.stride - 1) / c.stride;
    row.panel = P;
    row.width = to.width;
    row.map = to.map + b * to.step;
    row.column_stride = c.stride * to.step;
    row.add = to.add ? to.add + b * to.step : nullptr;
    for (int64_t t = 0; t < rows.count && columns.count > 0; ++t) {
      const int64_t q = y / c.stride + rows.origin + t * rows.reach;
      if (q < 0 || q >= to.Ho) continue;
      if (row.taps == 0) row.first_tap = t;
      row.rows[row.taps++] = row_of(q) + columns.origin * P;
    }
    dx_row_for<T, S>(columns.count, columns.reach)(row);
    taps += columns.count;
  }
}

// ---- dw ----------------------------------------------------------------------------------------

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

template <class T>
void flush_taps(T* partial, int64_t taps, double* totals, int64_t stride) {
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t lane = 0; lane < kPanel<T>; lane += kLanesOf<T>) {
      T* const at = partial + t * kPanel<T> + lane;
      Doubles<T>(load<V>(at)).add_to(totals + t * stride + lane);
      store(at, V{});
    }
  }
}

template <class T>
void add_up_taps(const DepthwiseBackwardCall& c, const double* totals, int64_t stride,
                 const Share& share) {
  const int64_t taps = c.K * c.K;
  each_of_mine(c.C, share, [&](int64_t channel) {
    T* const dweight = static_cast<T*>(c.dweight) + channel * taps;
    for (int64_t t = 0; t < taps; ++t) {
      dweight[t] = static_cast<T>(total(totals + t * stride + channel, share));
    }
  });
}

}  // namespace
}  // namespace emo_kernels::cpu
