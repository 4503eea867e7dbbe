// The norm in front of a product, for a panel of pixels: into a blocked map, and back.
#pragma once

#include "cpu/blocked.h"
#include "cpu/normalize.h"
#include "cpu/written_map.h"

namespace emo_kernels::cpu {
namespace {

// Pixels worked on at a time: whole GEMM tiles, at most kChunk (a weight's gradient sums over them
// in one go), as many as keep `elements` of scratch a pixel within part of the L2 cache.
template <class T>
EMO_INLINE int64_t most_pixels(int64_t elements) {
  constexpr int64_t kGrain = 56, kMost = 224, kBytes = 448 << 10;
  const int64_t fit = kBytes / (elements * static_cast<int64_t>(sizeof(T))) / kGrain * kGrain;
  return min(kMost, max(kGrain, fit));
}

// A thread's share of the pixels in equal steps of at most `most`: f(first, count).
template <class F>
EMO_INLINE void each_step(int64_t pixels, int64_t most, int thread, int threads, F f) {
  const int64_t begin = share_of(pixels, thread, threads);
  const int64_t end = share_of(pixels, thread + 1, threads);
  if (begin == end) return;
  const int64_t steps = ceil_div(end - begin, most), step = ceil_div(end - begin, steps);
  for (int64_t p = begin; p < end; p += step) f(p, min(step, end - p));
}

// From panel p of `rows` pixels of an M wide map to what comes after it: the next panel, or the
// first one of the next pixels. Its lines are asked for while those of panel p are worked on: far
// apart as they lie, the hardware fetches none of them ahead.
template <class T>
EMO_INLINE int64_t next_panel(int64_t p, int64_t M, int64_t rows) {
  return (p + 1) * kPanel<T> < M ? kPanel<T> : rows * M - p * kPanel<T>;
}

template <class T>
struct NormRows {
  Norm norm = Norm::kNone;
  int64_t C = 0;
  T eps{};
  T *scale = nullptr, *shift = nullptr;  // (C,) padded, shared
  T *mean = nullptr, *invstd = nullptr;  // (C,) padded, shared: of the batch norm's statistics
  PixelMoments<T>* moments = nullptr;    // of the pixels at hand, own

  static NormRows at(Norm norm, int64_t C, double eps, int64_t pixels, Places& shared,
                     Places& own) {
    NormRows rows;
    rows.norm = norm;
    rows.C = C;
    rows.eps = static_cast<T>(eps);
    const int64_t padded = ceil_div(C, kPanel<T>) * kPanel<T>;
    rows.scale = shared.take<T>(padded);
    rows.shift = shared.take<T>(padded);
    rows.mean = shared.take<T>(padded);
    rows.invstd = shared.take<T>(padded);
    rows.moments = own.take<PixelMoments<T>>(pixels);
    return rows;
  }

  // By one thread, before the others read.
  void fill(const void* weight, const void* bias, const void* means, const void* invstds) const {
    const int64_t padded = ceil_div(C, kPanel<T>) * kPanel<T>;
    const auto copy = [&](const void* from, T* to, T otherwise) {
      const T* const values = static_cast<const T*>(from);
      for (int64_t c = 0; c < padded; ++c) {
        to[c] = c >= C ? T(0) : values ? values[c] : otherwise;
      }
    };
    copy(weight, scale, T(1));
    copy(bias, shift, T(0));
    copy(means, mean, T(0));
    copy(invstds, invstd, T(1));
  }

  template <class S, class E>
  void pixel(const S* x, int64_t i, E* to, int64_t panel_stride) const {
    using V = Vec<T, kLanesOf<T>>;
    constexpr int64_t P = kPanel<T>;
    if (norm == Norm::kNone) {
      normalize_pixel<T, Norm::kNone>(x, C, scale, shift, eps, to, panel_stride);
    } else if (norm == Norm::kAffine) {
      normalize_pixel<T, Norm::kAffine>(x, C, scale, shift, eps, to, panel_stride);
    } else {
      const PixelMoments<T> m = pixel_moments<T>(x, C, eps);
      moments[i] = m;
      each_channel<T>(x, C, [&](V v, int64_t c) __attribute__((always_inline)) {
        v = ((v - m.near) - m.rest) * m.scale;
        store_as(to + c / P * panel_stride + c % P, fma(v, load<V>(scale + c), load<V>(shift + c)));
      });
    }
  }

  // The `rows` pixels at x, normalised.
  template <class S, class E>
  void forward(const S* x, int64_t rows, const Blocked<E>& to) const {
    for (int64_t i = 0; i < rows; ++i) {
      pixel(x + i * C, i, to.data + i * kPanel<T>, to.stride());
    }
  }

  // h of one vector of pixel i: what multiplies the gradient of the norm's weight.
  EMO_INLINE Vec<T, kLanesOf<T>> factor(Vec<T, kLanesOf<T>> x, int64_t i, int64_t c) const {
    using V = Vec<T, kLanesOf<T>>;
    if (norm == Norm::kLayer) {
      const PixelMoments<T>& m = moments[i];
      return ((x - m.near) - m.rest) * m.scale;
    }
    return (x - load<V>(mean + c)) * load<V>(invstd + c);
  }

  // sums += sum dn, sum dn h over the pixels; they are (2, padded) doubles.
  template <class S>
  void add_sums(const S* x, int64_t rows, const Blocked<T>& dn, double* sums) const {
    using V = Vec<T, kLanesOf<T>>;
    constexpr int64_t P = kPanel<T>;
    const int64_t padded = ceil_div(C, P) * P;
    for (int64_t p = 0; p < dn.panels(); ++p) {
      const T* const panel = dn.panel(p);
      sum_rows<T>(rows, dn.channels(p), sums + p * P, sums + padded + p * P,
                  [&](int64_t i, int64_t lane, int64_t count, V& a, V& b)
                      __attribute__((always_inline)) {
                        const int64_t c = p * P + lane;
                        const V v = load<V>(panel + i * P + lane);
                        a = v;
                        b = factor(load_as<V>(x + i * C + c, count), i, c);
                      });
    }
  }

  // out = the gradient at x, or at norm(x) if `behind`, plus residual: pixel i, from dn's row.
  template <class X, class S>
  void pixel_backward(const X* x, int64_t i, const T* dn, int64_t panel_stride, bool behind,
                      const S* residual, S* out) const {
    using V = Vec<T, kLanesOf<T>>;
    constexpr int64_t P = kPanel<T>;
    const T inverse = T(1) / static_cast<T>(C);
    const auto at = [&](int64_t c) __attribute__((always_inline)) {
      return load<V>(dn + c / P * panel_stride + c % P);
    };
    const bool layer = norm == Norm::kLayer && !behind;
    V sum{}, product{};
    if (layer) {
      each_lane_of<T>(C, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        V g = at(c);
        if (count < kLanesOf<T>) g = first_lanes<V, T>(g, count);
        g *= load<V>(scale + c);
        sum += g;
        product = fma(g, factor(load_as<V>(x + c, count), i, c), product);
      });
    }
    const T first = layer ? sum_lanes<V, T>(sum) * inverse : T(0);
    const T second = layer ? sum_lanes<V, T>(product) * inverse : T(0);
    each_lane_of<T>(C, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      V v = at(c);
      if (!behind && norm != Norm::kNone) v *= load<V>(scale + c);
      if (layer) {
        v = ((v - first) - factor(load_as<V>(x + c, count), i, c) * second) * moments[i].scale;
      }
      if (residual) v += load_as<V>(residual + c, count);
      store_as(out + c, v, count);
    });
  }
};

}  // namespace
}  // namespace emo_kernels::cpu
