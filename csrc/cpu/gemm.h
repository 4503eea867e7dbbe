// The GEMM micro-kernel of the 1x1 convolutions: kRows pixels x one panel of output channels.
//
// A is a panel-blocked map [K / kPanel][pixels][kPanel] (kPanel = 3 vectors of channels), B a
// packed panel [K][width], or in pairs of bfloat16 [K / 2][width][2]; an odd K is filled up with
// zeros in both. All accumulators stay in registers over the whole of K; every output is the sum
// over k = 0, 1, ... in that order, whatever the tile, so that no split of the work changes a bit.
#pragma once

#include "cpu/activation.h"
#include "cpu/bf16.h"
#include "cpu/simd.h"

namespace emo_kernels::cpu {
namespace {

template <class T>
constexpr int kPanel = 3 * kLanesOf<T>;

// Terms of a sum that are added in one go: a multiple of every kPanel. Products of bfloat16 are all
// added in one go: their rounding is far above that of the sum.
constexpr int64_t kChunk = 240;

// Pixels of a tile by its vectors a row. 8 x 3 vectors reach 115 of 116 GFLOP/s on a Zen 4 core
// with AVX-512, 14 x 2 reach 106: a broadcast load there takes about 1.5 cycles.
constexpr int gemm_rows(int vectors) {
  return kRegisters == 32 ? (vectors == 3 ? 8 : 14) : (vectors == 3 ? 4 : vectors == 2 ? 6 : 8);
}
constexpr int kMostGemmRows = kRegisters == 32 ? 14 : 8;

// Memory to bring into the L2 cache while a GEMM computes: weights that are packed after it. At two
// cache lines per four terms, 49 pixels fetch a panel as large as the one they multiply.
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;

  Ahead() = default;
  Ahead(const void* begin, const void* stop)
      : at(static_cast<const char*>(begin)), end(static_cast<const char*>(stop)) {}

  EMO_INLINE void fetch() {
    __builtin_prefetch(at, 0, 2);
    __builtin_prefetch(at + 64, 0, 2);
    at = min(at + 128, end);
  }
  EMO_INLINE void fetch_all() {
    while (at < end) fetch();
  }
};

// Vectors that hold the channels of a panel: kFull whole ones, then perhaps a half one.
template <class T, int kFullVectors, bool kHalfVector>
struct PanelShape {
  static constexpr int kLanes = kLanesOf<T>;
  static constexpr int kFull = kFullVectors;
  static constexpr bool kHalf = kHalfVector;
  static constexpr int kRows = gemm_rows(kFull + (kHalf ? 1 : 0));
  static constexpr int kWidth = kLanes * kFull + (kHalf ? kLanes / 2 : 0);
};

template <class E, int kRows, class Shape>
struct Accumulators {
  using T = SumOf<E>;
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

  // Adds the products of the kTerms<E> terms at a and b.
  EMO_INLINE void step(const E* a, const E* b) {
    constexpr int kStride = Shape::kLanes * kTerms<E>;
    Full b_full[Shape::kFull > 0 ? Shape::kFull : 1];
    Half b_half;
    unroll<Shape::kFull>(EMO_UNROLLED(j) { b_full[j] = load<Full>(b + j * kStride); });
    if constexpr (Shape::kHalf) b_half = load<Half>(b + Shape::kFull * kStride);
    unroll<kRows>(EMO_UNROLLED(i) {
      const Full value = splat_terms<Full>(a + i * kPanel<T>);
      unroll<Shape::kFull>(
          EMO_UNROLLED(j) { full[i][j] = add_products<E>(full[i][j], value, b_full[j]); });
      if constexpr (Shape::kHalf) half[i] = add_products<E>(half[i], low_half(value), b_half);
    });
  }

  // The rows of a that the next tile reads, which another core may have written: at 8 rows of
  // three vectors, two cache lines per four terms are all of them.
  EMO_INLINE static void fetch_next_rows(const E* a, int64_t k) {
    constexpr int kBytes = 4 * kTerms<E> * kRows * static_cast<int>(sizeof(E));
    const char* const next = reinterpret_cast<const char*>(a + kRows * (kPanel<T> + k));
    unroll<(kBytes + 63) / 64>(EMO_UNROLLED(i) { __builtin_prefetch(next + 64 * i, 0, 2); });
  }

  // Adds the products of K terms.
  EMO_INLINE void multiply(const E* a, int64_t a_panel_stride, const E* b, int64_t K,
                           Ahead& ahead) {
    constexpr int kT = kTerms<E>, kRow = Shape::kWidth * kT;
    for (; K > 0; K -= kPanel<T>) {
      const int64_t depth = min<int64_t>(K, kPanel<T>);
      int64_t k = 0;
      for (; k + 4 * kT <= depth; k += 4 * kT, b += 4 * kRow) {
        step(a + k, b);
        step(a + k + kT, b + kRow);
        step(a + k + 2 * kT, b + 2 * kRow);
        step(a + k + 3 * kT, b + 3 * kRow);
        ahead.fetch();
        fetch_next_rows(a, k);
      }
      for (; k < depth; k += kT, b += kRow) step(a + k, b);
      a += a_panel_stride;
    }
  }

  EMO_INLINE void clear() {
    each([&](auto& v, auto, auto) __attribute__((always_inline)) { v = decltype(v + v){}; });
  }

  // acc = sums + acc, where there are sums.
  EMO_INLINE void add_sums(const T* sums) {
    each([&](auto& v, auto i, auto channel) __attribute__((always_inline)) {
      v = load<decltype(v + v)>(sums + i * Shape::kWidth + channel) + v;
    });
  }

  EMO_INLINE void save_sums(T* sums) {
    each([&](auto& v, auto i, auto channel)
             __attribute__((always_inline)) { store(sums + i * Shape::kWidth + channel, v); });
  }

  // Adds the products of K terms, chunk by chunk, to `sums` if have_sums, else to the start values.
  EMO_INLINE void multiply_chunks(const E* a, int64_t a_panel_stride, const E* b, int64_t K,
                                  T* sums, bool have_sums, Ahead* wanted) {
    Ahead ahead = wanted && wanted->at ? *wanted : Ahead(b, b);
    if constexpr (kTerms<E> > 1) {
      if (have_sums) add_sums(sums);
      multiply(a, a_panel_stride, b, K, ahead);
      if (wanted) *wanted = ahead;
      return;
    }
    for (; K > kChunk; K -= kChunk) {
      multiply(a, a_panel_stride, b, kChunk, ahead);
      if (have_sums) add_sums(sums);
      save_sums(sums);
      have_sums = true;
      clear();
      a += kChunk / kPanel<T> * a_panel_stride;
      b += kChunk * Shape::kWidth;
    }
    multiply(a, a_panel_stride, b, K, ahead);
    if (wanted) *wanted = ahead;
    if (have_sums) add_sums(sums);
  }
};

// ring[offsets[i]...] = act(bias + a_i . B), in whatever type R the ring has.
template <class E, class R>
struct ExpandTile {
  const E* a;
  int64_t a_panel_stride;
  const E* b;
  int64_t K;
  const SumOf<E>* bias;    // (width,)
  R* ring;                 // the panel's rows
  const int64_t* offsets;  // of the pixels in the ring
  Ahead* ahead = nullptr;
};

template <class E, class R, int kRows, class Shape, Activation kAct>
void expand_tile(const ExpandTile<E, R>& tile) {
  using T = SumOf<E>;
  Accumulators<E, kRows, Shape> acc;
  acc.each([&](auto& v, auto i, auto channel) __attribute__((always_inline)) {
    (void)i;
    v = load<decltype(v + v)>(tile.bias + channel);
  });
  alignas(64) T sums[kRows * Shape::kWidth];
  acc.multiply_chunks(tile.a, tile.a_panel_stride, tile.b, tile.K, sums, false, tile.ahead);
  acc.each([&](auto& v, auto i, auto channel) __attribute__((always_inline)) {
    store_as(tile.ring + tile.offsets[i] + channel, activate<T, kAct, kTerms<E> == 2>(v));
  });
}

// partial[offsets[i]...] (+)= d_i . B, and at the last group of channels, times gamma and plus
// residual, out. Maps lie in memory as S; where that is the type of the sums, partial may be out.
template <class E, class S>
struct ShrinkTile {
  const E* a;
  int64_t a_panel_stride;
  const E* b;
  int64_t K;
  SumOf<E>* partial;       // at the panel's first channel; unused where all channels are one group
  S* out;                  // likewise
  const S* residual;       // likewise; null: none
  const SumOf<E>* gamma;   // (width,), null: none
  const int64_t* offsets;  // of the pixels in out
  int64_t pixels;          // rows of the tile that exist
  int64_t channels;        // channels of the panel that exist
  bool first, last;        // of the groups of channels the sum runs over
  Ahead* ahead = nullptr;
};

template <class E, class S, class V>
EMO_INLINE V shrink_epilogue(const ShrinkTile<E, S>& tile, V v, int64_t at, int64_t channel,
                             int64_t count) {
  if (tile.gamma) v *= load<V>(tile.gamma + channel);
  if (tile.residual) v += load_as<V>(tile.residual + at, count);
  return v;
}

// What the groups of channels before this one left.
template <class E, class S, int kRows, class Shape>
EMO_INLINE void load_partial_sums(const ShrinkTile<E, S>& tile, SumOf<E>* sums) {
  using T = SumOf<E>;
  for (int i = 0; i < kRows; ++i) {
    T* row = sums + i * Shape::kWidth;
    for (int j = 0; j < Shape::kWidth; ++j) row[j] = T(0);
    if (i >= tile.pixels) continue;
    const T* partial = tile.partial + tile.offsets[i];
    if (tile.channels == Shape::kWidth) {
      for (int j = 0; j < Shape::kWidth; ++j) row[j] = partial[j];
    } else {
      for (int j = 0; j < tile.channels; ++j) row[j] = partial[j];
    }
  }
}

template <class E, class S, int kRows, class Shape>
void shrink_tile(const ShrinkTile<E, S>& tile) {
  Accumulators<E, kRows, Shape> acc;
  alignas(64) SumOf<E> sums[kRows * Shape::kWidth];
  if (!tile.first) load_partial_sums<E, S, kRows, Shape>(tile, sums);
  acc.clear();
  acc.multiply_chunks(tile.a, tile.a_panel_stride, tile.b, tile.K, sums, !tile.first, tile.ahead);
  acc.each([&](auto& v, auto i, auto channel) __attribute__((always_inline)) {
    const int64_t count = tile.channels - channel;
    if (i < tile.pixels && count > 0) {
      const int64_t at = tile.offsets[i] + channel;
      if (tile.last) {
        store_as(tile.out + at, shrink_epilogue(tile, v, at, channel, count), count);
      } else {
        store_as(tile.partial + at, v, count);
      }
    }
  });
}

}  // namespace
}  // namespace emo_kernels::cpu
