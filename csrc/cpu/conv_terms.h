// Tiles of a convolution's weight gradient: some terms of the kernel x one panel of output
// channels, in registers over a run of pixels.
#pragma once

#include "cpu/conv_rows.h"

namespace emo_kernels::cpu {
namespace {

constexpr int kTermRows = kRegisters == 32 ? 9 : 5;  // of a tile of any kernel

// What a tile of kTerms terms adds up over a run of pixels, in the element type:
// sum over pixels of at[i][pixel * step] dy[pixel][channel].
template <class T, class Shape, int kTerms>
struct TermSums {
  using Full = Vec<T, Shape::kLanes>;
  using Half = Vec<T, Shape::kLanes / 2>;
  Accumulators<T, kTerms, Shape> acc;
  Full full[Shape::kFull];
  Half half;

  EMO_INLINE TermSums() { acc.clear(); }
  EMO_INLINE void load_pixel(const T* dy) {
    unroll<Shape::kFull>(EMO_UNROLLED(j) { full[j] = load<Full>(dy + j * Shape::kLanes); });
    if constexpr (Shape::kHalf) half = load<Half>(dy + Shape::kFull * Shape::kLanes);
  }
  template <class I>
  EMO_INLINE void add(I i, Full value) {
    unroll<Shape::kFull>(EMO_UNROLLED(j) { acc.full[i][j] = fma(value, full[j], acc.full[i][j]); });
    if constexpr (Shape::kHalf) acc.half[i] = fma(low_half(value), half, acc.half[i]);
  }
  EMO_INLINE void add_to(double* totals) {
    T sums[kTerms * Shape::kWidth];
    acc.save_sums(sums);
    for (int i = 0; i < kTerms * Shape::kWidth; ++i) totals[i] += static_cast<double>(sums[i]);
  }
};

// Of any kernel.
struct AnyTerms {
  static constexpr int kTerms = kTermRows;

  template <class T, class Shape>
  static void add_run(const T* const* at, int64_t step, const T* dy, int64_t pixels, double* totals,
                      Ahead& wanted) {
    Ahead ahead = wanted;
    const T* from[kTerms];
    unroll<kTerms>(EMO_UNROLLED(i) { from[i] = at[i]; });
    TermSums<T, Shape, kTerms> sums;
    for (const T* const end = dy + pixels * Shape::kWidth; dy < end; dy += Shape::kWidth) {
      sums.load_pixel(dy);
      ahead.fetch();
      unroll<kTerms>(EMO_UNROLLED(i) {
        sums.add(i, splat<typename decltype(sums)::Full>(*from[i]));
        from[i] += step;
      });
    }
    sums.add_to(totals);
    wanted = ahead;
  }
};

// Three taps a row at stride 2, in columns kColumn apart: a column that two pixels see is loaded
// once.
template <int kColumn>
struct StemTerms {
  static constexpr int kTapRows = kRegisters == 32 ? 3 : 1, kTerms = 3 * kTapRows;

  template <class T, class Shape>
  static void add_run(const T* const* at, int64_t, const T* dy, int64_t pixels, double* totals,
                      Ahead& wanted) {
    Ahead ahead = wanted;
    using Full = Vec<T, Shape::kLanes>;
    const T* from[kTapRows];
    Full left[kTapRows];
    unroll<kTapRows>(EMO_UNROLLED(r) {
      from[r] = at[3 * r];
      left[r] = splat<Full>(*from[r]);
    });
    TermSums<T, Shape, kTerms> sums;
    for (const T* const end = dy + pixels * Shape::kWidth; dy < end; dy += Shape::kWidth) {
      sums.load_pixel(dy);
      ahead.fetch();
      unroll<kTapRows>(EMO_UNROLLED(r) {
        const Full middle = splat<Full>(from[r][kColumn]),
                   right = splat<Full>(from[r][2 * kColumn]);
        sums.add(Constant<3 * r>{}, left[r]);
        sums.add(Constant<3 * r + 1>{}, middle);
        sums.add(Constant<3 * r + 2>{}, right);
        left[r] = right;
        from[r] += 2 * kColumn;
      });
    }
    sums.add_to(totals);
    wanted = ahead;
  }
};

}  // namespace
}  // namespace emo_kernels::cpu
