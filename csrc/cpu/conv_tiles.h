// The convolution's tiles: up to 14 pixels x one panel of output channels over all terms of the
// kernel, in registers; then norm and activation, or the sums of a batch norm to come.
#pragma once

#include "cpu/activation.h"
#include "cpu/conv_rows.h"

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
  const T* pivot;          // (width,)
  double *sums, *squares;  // (width,), of what is written less the pivot; null: none
};

// act(scale sums + shift) for the tile's first `pixels`, `width` sums each.
template <class T, Activation kAct, class S>
void finish(const T* sums, int64_t width, int64_t pixels, const ConvRow<T, S>& row, S* out) {
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t i = 0; i < pixels; ++i, sums += width, out += row.stride) {
    for (int64_t c = 0; c < row.channels; c += kLanesOf<T>) {
      const V v = fma(load<V>(sums + c), load<V>(row.scale + c), load<V>(row.shift + c));
      store_as(out + c, activate<T, kAct>(v), row.channels - c);
    }
  }
}

// One vector of channels of a tile without an activation: written, and what is stored, less the
// pivot, summed up. sums(i) are those of pixel i.
template <int kRows, class T, class S, class F>
EMO_INLINE void finish_and_sum(F sums, int64_t channel, int64_t pixels, const ConvRow<T, S>& row,
                               S* out) {
  using V = decltype(sums(Constant<0>{}));
  const V scale = load<V>(row.scale + channel), shift = load<V>(row.shift + channel);
  const V pivot = load<V>(row.pivot + channel);
  V sum{}, square{};
  unroll<kRows>(EMO_UNROLLED(i) {
    if (i < pixels) {
      const V v = fma(sums(i), scale, shift);
      store_as(out + i * row.stride + channel, v, row.channels - channel);
      const V centred = as_stored<S>(v) - pivot;
      sum += centred;
      square = fma(centred, centred, square);
    }
  });
  const auto add = [&](V v, double* totals) {
    T lanes[kLanesOf<T>] = {};
    store(lanes, v);
    Doubles<T>(load<Vec<T, kLanesOf<T>>>(lanes)).add_to(totals + channel);
  };
  add(sum, row.sums);
  add(square, row.squares);
}

// What becomes of a tile, its first `pixels`.
template <class T, int kRows, class Shape, class S>
EMO_INLINE void finish_tile(Accumulators<T, kRows, Shape>& acc, int64_t pixels,
                            const ConvRow<T, S>& row, S* out) {
  if (row.sums) {
    unroll<Shape::kFull>(EMO_UNROLLED(j) {
      finish_and_sum<kRows>([&](auto i) __attribute__((always_inline)) { return acc.full[i][j]; },
                            j * Shape::kLanes, pixels, row, out);
    });
    if constexpr (Shape::kHalf) {
      finish_and_sum<kRows>([&](auto i) __attribute__((always_inline)) { return acc.half[i]; },
                            Shape::kFull * Shape::kLanes, pixels, row, out);
    }
  } else if (row.act == Activation::kNone) {
    acc.each([&](auto& v, auto i, auto channel) __attribute__((always_inline)) {
      using V = decltype(v + v);
      if (i < pixels) {
        const V scaled = fma(v, load<V>(row.scale + channel), load<V>(row.shift + channel));
        store_as(out + i * row.stride + channel, scaled, row.channels - channel);
      }
    });
  } else {
    alignas(64) T sums[kRows * Shape::kWidth + kLanesOf<T>];
    acc.save_sums(sums);
    with_activation(row.act,
                    [&](auto act) { finish<T, act.value>(sums, Shape::kWidth, pixels, row, out); });
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

// Any kernel: the terms of a row of taps, one by one.
struct AnyTaps {
  template <class T, class Shape>
  static constexpr int kRows = Shape::kRows;
  template <class T, class Shape>
  static constexpr int kFewRows = kRows<T, Shape>;

  template <class T, int kRows, class Shape, class S>
  static EMO_INLINE void add(Accumulators<T, kRows, Shape>& acc, const T* a, const T* b,
                             const ConvRow<T, S>& row) {
    for (int64_t k = 0; k < row.terms; ++k, b += Shape::kWidth) {
      add_term<T, kRows, Shape>(acc, a + row.offsets[k], row.step, b);
    }
  }
};

// Three taps at stride 2 in columns kColumn apart: a column that two pixels see is loaded once.
template <int kColumn>
struct StemTaps {
  static constexpr int kTaps = 3, kStride = 2;
  template <class T, class Shape>
  static constexpr int kRows = kRegisters == 32 ? 12 : (Shape::kFull == 2 ? 4 : 8);
  template <class T, class Shape>
  static constexpr int kFewRows = 4;

  template <class T, int kRows, class Shape, class S>
  static EMO_INLINE void add(Accumulators<T, kRows, Shape>& acc, const T* a, const T* b,
                             const ConvRow<T, S>& row) {
    for (int64_t k = 0; k < row.terms; k += kTaps, b += kTaps * Shape::kWidth) {
      add_channel<T, kRows, Shape>(acc, a + row.offsets[k], b);
    }
  }

  template <class T, int kRows, class Shape>
  static EMO_INLINE void add_channel(Accumulators<T, kRows, Shape>& acc, const T* a, const T* b) {
    using Full = Vec<T, Shape::kLanes>;
    using Half = Vec<T, Shape::kLanes / 2>;
    Full full[kTaps][Shape::kFull];
    Half half[kTaps];
    unroll<kTaps>(EMO_UNROLLED(t) {
      const T* const from = b + t * Shape::kWidth;
      unroll<Shape::kFull>(EMO_UNROLLED(j) { full[t][j] = load<Full>(from + j * Shape::kLanes); });
      if constexpr (Shape::kHalf) half[t] = load<Half>(from + Shape::kFull * Shape::kLanes);
    });
    unroll<(kRows - 1) * kStride + kTaps>(EMO_UNROLLED(column) {
      const Full value = splat<Full>(a[column * kColumn]);
      unroll<kTaps>(EMO_UNROLLED(t) {
        constexpr int kAt = decltype(column)::value - decltype(t)::value;
        constexpr int kPixel = kAt / kStride;
        if constexpr (kAt >= 0 && kAt % kStride == 0 && kPixel < kRows) {
          unroll<Shape::kFull>(EMO_UNROLLED(j) {
            acc.full[kPixel][j] = fma(value, full[t][j], acc.full[kPixel][j]);
          });
          if constexpr (Shape::kHalf) {
            acc.half[kPixel] = fma(low_half(value), half[t], acc.half[kPixel]);
          }
        }
      });
    });
  }
};

template <class T, class S, class Shape, class Taps, int kRows>
EMO_INLINE void convolve_tile(const ConvRow<T, S>& row, int64_t x0) {
  Accumulators<T, kRows, Shape> acc;
  acc.clear();
  const S* const below = row.out + (row.columns + x0) * row.stride;
  fetch_lines(below, below + kRows * row.stride);
  for (int64_t t = 0; t < row.taps; ++t) {
    Taps::template add<T, kRows, Shape>(acc, row.rows[t] + x0 * row.step, row.weights[t], row);
  }
  finish_tile(acc, min<int64_t>(kRows, row.columns - x0), row, row.out + x0 * row.stride);
}

template <class T, class S, class Shape, class Taps>
void convolve_row(const ConvRow<T, S>& row) {
  constexpr int kRows = Taps::template kRows<T, Shape>, kFew = Taps::template kFewRows<T, Shape>;
  int64_t x = 0;
  for (; row.columns - x > kRows - kFew; x += kRows) {
    convolve_tile<T, S, Shape, Taps, kRows>(row, x);
  }
  for (; x < row.columns; x += kFew) convolve_tile<T, S, Shape, Taps, kFew>(row, x);
}

}  // namespace
}  // namespace emo_kernels::cpu
