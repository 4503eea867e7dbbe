// The norm in front of the block, applied while pixels are copied into channel panels.
#pragma once

#include "cpu/bf16.h"
#include "cpu/gemm.h"
#include "cpu/params.h"

namespace emo_kernels::cpu {
namespace {

// The affine of the norm in front: batch norm's from its statistics, layer norm's as it is given.
template <class T>
void norm_affine(const IrmbCall& call, T* scale, T* shift) {
  if (call.norm == Norm::kNone) return;
  for (int64_t c = 0; c < call.C; ++c) {
    double a = element<T>(call.norm_weight, c, 1), b = element<T>(call.norm_bias, c, 0);
    if (call.norm == Norm::kAffine) {
      a /= __builtin_sqrt(element<T>(call.norm_var, c, 1) + call.norm_eps);
      b -= element<T>(call.norm_mean, c, 0) * a;
    }
    scale[c] = static_cast<T>(a);
    shift[c] = static_cast<T>(b);
  }
  for (int64_t c = call.C; c < ceil_div(call.C, kPanel<T>) * kPanel<T>; ++c) {
    scale[c] = shift[c] = T(0);
  }
}

// One pixel's C channels, a vector at a time: f(vector, channel).
template <class T, class S, class F>
EMO_INLINE void each_channel(const S* x, int64_t C, F f) {
  constexpr int kLanes = kLanesOf<T>;
  using V = Vec<T, kLanes>;
  int64_t c = 0;
  for (; c + kLanes <= C; c += kLanes) f(load_as<V>(x + c), c);
  if (c < C) f(load_as<V>(x + c, C - c), c);
}

// (x - mean) / sqrt(var + eps) as scale * ((x - near) - rest): near is the mean up to its rounding
// and rest the mean of x - near, so that a common offset of the channels costs no digits.
template <class T>
struct PixelMoments {
  T near, rest, scale;
};

template <class T, class S>
EMO_INLINE PixelMoments<T> pixel_moments(const S* x, int64_t C, T eps) {
  constexpr int kLanes = kLanesOf<T>;
  using V = Vec<T, kLanes>;
  V total{}, sum{}, squares{};
  each_channel<T>(x, C, [&](V v, int64_t) __attribute__((always_inline)) { total += v; });
  const T near = sum_lanes<V, T>(total) / static_cast<T>(C);
  each_channel<T>(x, C, [&](V v, int64_t c) __attribute__((always_inline)) {
    V centred = v - near;
    if (c + kLanes > C) centred = first_lanes<V, T>(centred, C - c);
    sum += centred;
    squares = fma(centred, centred, squares);
  });
  const T rest = sum_lanes<V, T>(sum) / static_cast<T>(C);
  const T square = sum_lanes<V, T>(squares) / static_cast<T>(C);
  return {near, rest, T(1) / square_root(max(square - rest * rest, T(0)) + eps)};
}

// One vector of channels of norm(x).
template <Norm kNorm, class T, class V>
EMO_INLINE V normalize(V v, const PixelMoments<T>& moments, V scale, V shift) {
  if constexpr (kNorm == Norm::kLayer) v = ((v - moments.near) - moments.rest) * moments.scale;
  if constexpr (kNorm != Norm::kNone) v = fma(v, scale, shift);
  return v;
}

// dst[c / panel][.][c % panel] = norm(x)[c], zero in the lanes past C; x and dst of any type.
template <class T, Norm kNorm, class S, class D>
EMO_INLINE void normalize_pixel(const S* x, int64_t C, const T* scale, const T* shift, T eps,
                                D* dst, int64_t panel_stride) {
  using V = Vec<T, kLanesOf<T>>;
  PixelMoments<T> moments{};
  if constexpr (kNorm == Norm::kLayer) moments = pixel_moments<T>(x, C, eps);
  for (int64_t c = 0; c < C; c += kPanel<T>, dst += panel_stride) {
    each_channel<T>(x + c, min<int64_t>(kPanel<T>, C - c),
                    [&](V v, int64_t lane) __attribute__((always_inline)) {
                      store_as(dst + lane, normalize<kNorm>(v, moments, load<V>(scale + c + lane),
                                                            load<V>(shift + c + lane)));
                    });
  }
}

constexpr int64_t kNormPixels = 16;  // whose moments are kept while a vector runs down them

// Panels [panel0, panel1) of `pixels` neighbouring pixels: dst[panel - panel0][pixel][channel].
template <class T, Norm kNorm, class S, class D>
void normalize_pixels(const S* x, int64_t pixels, int64_t C, int64_t panel0, int64_t panel1,
                      const T* scale, const T* shift, T eps, D* dst, int64_t panel_stride) {
  using V = Vec<T, kLanesOf<T>>;
  constexpr int64_t P = kPanel<T>;
  const int64_t end = min(C, panel1 * P);
  for (; pixels > 0; pixels -= kNormPixels, x += kNormPixels * C, dst += kNormPixels * P) {
    const int64_t here = min(kNormPixels, pixels);
    PixelMoments<T> moments[kNormPixels];
    if constexpr (kNorm == Norm::kLayer) {
      for (int64_t i = 0; i < here; ++i) moments[i] = pixel_moments<T>(x + i * C, C, eps);
    }
    D* panel = dst;
    for (int64_t p = panel0 * P; p < end; p += P, panel += panel_stride) {
      for (int64_t c = p; c < min(end, p + P); c += kLanesOf<T>) {
        const V gain = load<V>(scale + c), offset = load<V>(shift + c);
        D* const out = panel + c - p;
        const int64_t count = C - c;
        if (count >= kLanesOf<T>) {
          for (int64_t i = 0; i < here; ++i) {
            store_as(out + i * P,
                     normalize<kNorm>(load_as<V>(x + i * C + c), moments[i], gain, offset));
          }
        } else {
          for (int64_t i = 0; i < here; ++i) {
            store_as(out + i * P,
                     normalize<kNorm>(load_as<V>(x + i * C + c, count), moments[i], gain, offset));
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace emo_kernels::cpu
