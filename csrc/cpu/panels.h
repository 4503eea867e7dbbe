// Any number of pixels times one panel of channels, out of the GEMM tiles of gemm.h.
#pragma once

#include "cpu/gemm.h"

namespace emo_kernels::cpu {
namespace {

// Channels of a packed panel: the vectors that cover what is left, in half vectors where there are.
template <class T>
EMO_INLINE int64_t panel_width(int64_t channels_left) {
  constexpr int64_t kGrain = kHalfVectors ? kLanesOf<T> / 2 : kLanesOf<T>;
  return min<int64_t>(kPanel<T>, ceil_div(channels_left, kGrain) * kGrain);
}

// Panel p of `channels` output channels. One vector or less over is shared by the last two panels:
// a GEMM tile one vector wide reaches 70 % of the speed of one two wide.
template <class T>
struct OutputPanel {
  OutputPanel(int64_t p, int64_t total) {
    const int64_t P = kPanel<T>, panels = ceil_div(total, P), over = total - (panels - 1) * P;
    const bool shared = panels > 1 && over <= kLanesOf<T>;
    const int64_t early =
        shared ? kLanesOf<T> : 0;  // channels the last panel takes from its neighbour
    start = p * P - (p == panels - 1 ? early : 0);
    const int64_t end = p == panels - 1 ? total : (p + 1) * P - (p == panels - 2 ? early : 0);
    channels = end - start;
    width = panel_width<T>(channels);
  }
  int64_t start, channels, width;
};

// f(shape) for the PanelShape of a width.
template <class T, class F>
EMO_INLINE void with_shape(int64_t width, F f) {
  constexpr int kLanes = kLanesOf<T>;
  if (width == 3 * kLanes) return f(PanelShape<T, 3, false>{});
  if (width == 2 * kLanes) return f(PanelShape<T, 2, false>{});
  if (width == kLanes) return f(PanelShape<T, 1, false>{});
  if constexpr (kHalfVectors) {
    if (width > 2 * kLanes) return f(PanelShape<T, 2, true>{});
    if (width > kLanes) return f(PanelShape<T, 1, true>{});
    return f(PanelShape<T, 0, true>{});
  }
}

template <class T>
void copy_padded(const T* src, int64_t count, T* dst, int64_t padded) {
  for (int64_t i = 0; i < padded; ++i) dst[i] = src && i < count ? src[i] : T(0);
}

// Clears the lane that fills up a pair beside the last of an odd number of channels: what comes of
// the zeros of an operand is not zero beside an infinity.
template <class E>
void clear_channel(E* at, int64_t pixels) {
  for (int64_t i = 0; i < pixels; ++i) at[i * kPanel<SumOf<E>>] = E{};
}

template <class E, class R, Activation kAct, class Shape>
void expand_pixels(ExpandTile<E, R> tile, int64_t pixels) {
  constexpr int kRows = Shape::kRows, kFewRows = kRows / 2;
  for (int64_t i = 0; i < pixels;) {
    const bool many = pixels - i > kFewRows;
    if (many) {
      expand_tile<E, R, kRows, Shape, kAct>(tile);
    } else {
      expand_tile<E, R, kFewRows, Shape, kAct>(tile);
    }
    const int64_t step = many ? kRows : kFewRows;
    tile.a += step * kPanel<SumOf<E>>;
    tile.offsets += step;
    i += step;
  }
}

template <class Shape, class E, class R>
void expand_pixels(Activation act, const ExpandTile<E, R>& tile, int64_t pixels) {
  switch (act) {
    case Activation::kNone:
      return expand_pixels<E, R, Activation::kNone, Shape>(tile, pixels);
    case Activation::kRelu:
      return expand_pixels<E, R, Activation::kRelu, Shape>(tile, pixels);
    case Activation::kGelu:
      return expand_pixels<E, R, Activation::kGelu, Shape>(tile, pixels);
    case Activation::kSilu:
      return expand_pixels<E, R, Activation::kSilu, Shape>(tile, pixels);
  }
}

template <class Shape, class E, class S>
void shrink_pixels(ShrinkTile<E, S> tile, int64_t pixels) {
  constexpr int kRows = Shape::kRows, kFewRows = kRows / 2;
  for (int64_t i = 0; i < pixels;) {
    const bool many = pixels - i > kFewRows;
    const int64_t step = many ? kRows : kFewRows;
    tile.pixels = min(step, pixels - i);
    if (many) {
      shrink_tile<E, S, kRows, Shape>(tile);
    } else {
      shrink_tile<E, S, kFewRows, Shape>(tile);
    }
    tile.a += step * kPanel<SumOf<E>>;
    tile.offsets += step;
    i += step;
  }
}

}  // namespace
}  // namespace emo_kernels::cpu
