// The GEMM micro-kernel of the 1x1 convolutions: kRows pixels x one panel of output channels.
//
// A is a panel-blocked map [K / kPanel][pixels][kPanel] (kPanel = 2 vectors of channels), B a
// packed panel [K][width]. All accumulators stay in registers over the whole of K; every output is
// the sum over k = 0, 1, ... in that order, whatever the tile, so that no split of the work changes
// a bit.
#pragma once

#include "cpu/activation.h"
#include "cpu/simd.h"

namespace emo_kernels::cpu {
namespace {

template <class T>
constexpr int kPanel = 3 * kLanesOf<T>;

// Pixels of a tile by its vectors a row. 8 x 3 vectors reach 115 of 116 GFLOP/s on a Zen 4 core with
// AVX-512, 14 x 2 reach 106: a broadcast load there takes about 1.5 cycles.
constexpr int gemm_rows(int vectors) {
  return kRegisters == 32 ? (vectors == 3 ? 8 : 14) : (vectors == 3 ? 4 : vectors == 2 ? 6 : 8);
}
constexpr int kMostGemmRows = kRegisters == 32 ? 14 : 8;

// Vectors that hold the channels of a panel: kFull whole ones, then perhaps a half one.
template <class T, int kFullVectors, bool kHalfVector>
struct PanelShape {
  static constexpr int kLanes = kLanesOf<T>;
  static constexpr int kFull = kFullVectors;
  static constexpr bool kHalf = kHalfVector;
  static constexpr int kRows = gemm_rows(kFull + (kHalf ? 1 : 0));
  static constexpr int kWidth = kLanes * kFull + (kHalf ? kLanes / 2 : 0);
};

template <class T, int kRows, class Shape>
struct Accumulators {
  using Full = Vec<T, Shape::kLanes>;
  using Half = Vec<T, Shape::kLanes / 2>;
  Full full[kRows][Shape::kFull > 0 ? Shape::kFull : 1];
  Half half[kRows];

  // f(vector, row, channel) for every vector of the tile.
  template <class F>
  EMO_INLINE void each(F f) {
    unroll<kRows>(EMO_UNROLLED(i) {
      unroll<Shape::kFull>(EMO_UNROLLED(j) { f(full[i][j], i, Constant<j * Shape::kLanes>{}); });
      if constexpr (Shape::kHalf) f(half[i], i, Constant<Shape::kFull * Shape::kLanes>{});
    });
  }

  EMO_INLINE void step(const T* a, const T* b) {
    Full b_full[Shape::kFull > 0 ? Shape::kFull : 1];
    Half b_half;
    unroll<Shape::kFull>(EMO_UNROLLED(j) { b_full[j] = load<Full>(b + j * Shape::kLanes); });
    if constexpr (Shape::kHalf) b_half = load<Half>(b + Shape::kFull * Shape::kLanes);
    unroll<kRows>(EMO_UNROLLED(i) {
      const T value = a[i * kPanel<T>];
      unroll<Shape::kFull>(
          EMO_UNROLLED(j) { full[i][j] = fma(splat<Full>(value), b_full[j], full[i][j]); });
      if constexpr (Shape::kHalf) half[i] = fma(low_half(splat<Full>(value)), b_half, half[i]);
    });
  }

  EMO_INLINE void multiply(const T* a, int64_t a_panel_stride, const T* b, int64_t K) {
    for (; K > 0; K -= kPanel<T>) {
      const int depth = static_cast<int>(min<int64_t>(K, kPanel<T>));
      int k = 0;
      for (; k + 4 <= depth; k += 4, b += 4 * Shape::kWidth) {
        step(a + k, b);
        step(a + k + 1, b + Shape::kWidth);
        step(a + k + 2, b + 2 * Shape::kWidth);
        step(a + k + 3, b + 3 * Shape::kWidth);
      }
      for (; k < depth; ++k, b += Shape::kWidth) step(a + k, b);
      a += a_panel_stride;
    }
  }
};

// ring[offsets[i]...] = act(bias + a_i . B)
template <class T>
struct ExpandTile {
  const T* a;
  int64_t a_panel_stride;
  const T* b;
  int64_t K;
  const T* bias;           // (width,)
  T* ring;                 // the panel's rows
  const int64_t* offsets;  // of the pixels in the ring
};

template <class T, int kRows, class Shape, Activation kAct>
void expand_tile(const ExpandTile<T>& tile) {
  Accumulators<T, kRows, Shape> acc;
  acc.each([&](auto& v, auto i, auto channel) __attribute__((always_inline)) {
    (void)i;
    v = load<decltype(v + v)>(tile.bias + channel);
  });
  acc.multiply(tile.a, tile.a_panel_stride, tile.b, tile.K);
  acc.each([&](auto& v, auto i, auto channel) __attribute__((always_inline)) {
    store(tile.ring + tile.offsets[i] + channel, activate<T, kAct>(v));
  });
}

// out[offsets[i]...] (+)= d_i . B, and at the last group of channels times gamma, plus residual.
template <class T>
struct ShrinkTile {
  const T* a;
  int64_t a_panel_stride;
  const T* b;
  int64_t K;
  T* out;                  // at the panel's first channel
  const T* residual;       // likewise; null: none
  const T* gamma;          // (width,), null: none
  const int64_t* offsets;  // of the pixels in out
  int64_t pixels;          // rows of the tile that exist
  int64_t channels;        // channels of the panel that exist
  bool first, last;        // of the groups of channels the sum runs over
};

template <class T, class V>
EMO_INLINE V shrink_epilogue(const ShrinkTile<T>& tile, V v, int64_t at, int64_t channel,
                             int64_t count) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  const bool whole = count >= kLanes;
  if (tile.gamma) v *= load<V>(tile.gamma + channel);
  if (tile.residual) {
    const T* r = tile.residual + at;
    v += whole ? load<V>(r) : load_first<V>(r, count);
  }
  return v;
}

template <class T, int kRows, class Shape>
void shrink_tile(const ShrinkTile<T>& tile) {
  Accumulators<T, kRows, Shape> acc;
  acc.each([&](auto& v, auto i, auto channel) __attribute__((always_inline)) {
    using V = decltype(v + v);
    constexpr int kLanes = sizeof(V) / sizeof(T);
    v = V{};
    if (!tile.first && i < tile.pixels && channel < tile.channels) {
      const T* p = tile.out + tile.offsets[i] + channel;
      const int64_t count = tile.channels - channel;
      v = count >= kLanes ? load<V>(p) : load_first<V>(p, count);
    }
  });
  acc.multiply(tile.a, tile.a_panel_stride, tile.b, tile.K);
  acc.each([&](auto& v, auto i, auto channel) __attribute__((always_inline)) {
    using V = decltype(v + v);
    constexpr int kLanes = sizeof(V) / sizeof(T);
    const int64_t count = tile.channels - channel;
    if (i < tile.pixels && count > 0) {
      const int64_t at = tile.offsets[i] + channel;
      const V result = tile.last ? shrink_epilogue<T>(tile, v, at, channel, count) : v;
      if (count >= kLanes) {
        store(tile.out + at, result);
      } else {
        store_first(tile.out + at, result, count);
      }
    }
  });
}

}  // namespace
}  // namespace emo_kernels::cpu
