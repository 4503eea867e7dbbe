// Maps in scratch, cut into panels of channels: [channels / kPanel][pixels][kPanel].
//
// Every operand of the products lies so, in pairs where those are multiplied (gemm.h). A last panel
// keeps the full stride; of its lanes those up to panel_width are computed with, zero or the like.
#pragma once

#include "cpu/bf16.h"
#include "cpu/gemm.h"
#include "cpu/launch.h"
#include "cpu/pack.h"
#include "cpu/panels.h"

namespace emo_kernels::cpu {
namespace {

constexpr int64_t kSumRows = 32;  // pixels whose channels are summed vector by vector
constexpr int64_t kSumTerms = 8;  // of them in the type of the terms, before those sums are widened
enum class Sums { kGradients, kMoments };  // moments: every term in double

// Pixels whose products are added in one go: fewer of a narrow map, where the time is elsewhere.
template <class Shape>
constexpr int64_t kPixelChunk = Shape::kWidth > Shape::kLanes ? 56 : 16;

// Hands out 64-byte aligned places of a buffer one after the other; of a null buffer it counts.
struct Places {
  char* base;
  int64_t used = 0;

  template <class E>
  EMO_INLINE E* take(int64_t count) {
    E* const place = reinterpret_cast<E*>(reinterpret_cast<uintptr_t>(base) + used);
    used += ceil_div(count * static_cast<int64_t>(sizeof(E)), 64) * 64;
    return place;
  }
};

// A blocked map of up to `rows` pixels, with room for the tiles that run past its end; of what a
// product takes as operands, or of its sums.
template <class E>
struct Blocked {
  using T = SumOf<E>;
  E* data = nullptr;
  int64_t rows = 0, columns = 0;

  static EMO_INLINE Blocked at(Places& places, int64_t rows, int64_t columns) {
    Blocked map;
    map.rows = rows + kMostGemmRows;
    map.columns = columns;
    map.data = places.take<E>(ceil_div(columns, kPanel<T>) * map.rows * kPanel<T> + 64);
    return map;
  }
  EMO_INLINE int64_t panels() const { return ceil_div(columns, kPanel<T>); }
  EMO_INLINE int64_t stride() const { return rows * kPanel<T>; }
  EMO_INLINE E* panel(int64_t p) const { return data + p * stride(); }
  EMO_INLINE int64_t width(int64_t p) const { return panel_width<T>(columns - p * kPanel<T>); }
  EMO_INLINE int64_t channels(int64_t p) const {
    return min<int64_t>(kPanel<T>, columns - p * kPanel<T>);
  }
};

template <class T>
void fill_zero(T* data, int64_t count) {
  for (int64_t i = 0; i < count; ++i) data[i] = T(0);
}

// f(lane, count) for the vectors of one panel; count: channels from lane on.
template <class T, class F>
EMO_INLINE void each_lane_of(int64_t channels, F f) {
  for (int64_t lane = 0; lane < channels; lane += kLanesOf<T>) f(lane, channels - lane);
}

// `rows` pixels of a dense (pixels, C) map into panels, scaled row by row where there is a scale.
template <class E, class S, class F>
void load_rows(const S* map, int64_t C, int64_t rows, const Blocked<E>& to, F scale_of) {
  using T = SumOf<E>;
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t i = 0; i < rows; ++i, map += C) {
    const T scale = scale_of(i);
    for (int64_t p = 0; p < to.panels(); ++p) {
      E* const row = to.panel(p) + i * kPanel<T>;
      const S* const from = map + p * kPanel<T>;
      each_lane_of<T>(to.channels(p),
                      [&](int64_t lane, int64_t count) __attribute__((always_inline)) {
                        store_as(row + lane, load_as<V>(from + lane, count) * scale);
                      });
    }
  }
}

// ---- sums over pixels -------------------------------------------------------------------------

// The lanes of a vector in double: two vectors of half the lanes, where the type is float.
template <class T>
struct Doubles {
  static constexpr int kParts = sizeof(T) == 8 ? 1 : 2, kLanes = kLanesOf<T> / kParts;
  using D = Vec<double, kLanes>;
  D part[kParts];

  EMO_INLINE explicit Doubles(Vec<T, kLanesOf<T>> v) {
#if defined(EMO_ISA_AVX512) || defined(EMO_ISA_AVX2)
    // Not by way of memory: GCC leaves a sum there that is read there, and additions wait for it.
    part[0] = __builtin_convertvector(low_half(v), D);
    part[1] = __builtin_convertvector(high_half(v), D);
#else
    using H = Vec<T, kLanes>;
    T lanes[kLanesOf<T>];
    store(lanes, v);
    unroll<kParts>(
        EMO_UNROLLED(i) { part[i] = __builtin_convertvector(load<H>(lanes + i * kLanes), D); });
#endif
  }
  EMO_INLINE void add(const Doubles& a) {
    unroll<kParts>(EMO_UNROLLED(i) { part[i] += a.part[i]; });
  }
  EMO_INLINE void add_product(const Doubles& a, const Doubles& b) {
    unroll<kParts>(EMO_UNROLLED(i) { part[i] = fma(a.part[i], b.part[i], part[i]); });
  }
  EMO_INLINE void add_to(double* totals) const {
    unroll<kParts>(EMO_UNROLLED(i) {
      double* const at = totals + i * kLanes;
      store(at, load<D>(at) + part[i]);
    });
  }
};

// first[lane] += sum over rows of value, second[lane] += sum over rows of value * factor, in
// double; of gradients, sums of kSumTerms of them. f(row, lane, count, value, factor) gives one
// vector of each. Null: not wanted.
template <class T, Sums kSums = Sums::kGradients, class F>
EMO_INLINE void sum_rows(int64_t rows, int64_t channels, double* first, double* second, F f) {
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t begin = 0; begin < rows; begin += kSumRows) {
    const int64_t end = min(rows, begin + kSumRows);
    each_lane_of<T>(channels, [&](int64_t lane, int64_t count) __attribute__((always_inline)) {
      Doubles<T> sum(V{}), products(V{});
      for (int64_t i = begin; i < end;) {
        V some{}, some_products{};
        for (const int64_t stop = min(end, i + kSumTerms); i < stop; ++i) {
          V value{}, factor{};
          f(i, lane, count, value, factor);
          if constexpr (kSums == Sums::kGradients) {
            some += value;
            some_products = fma(value, factor, some_products);
          } else {
            const Doubles<T> wide(value);
            sum.add(wide);
            products.add_product(wide, Doubles<T>(factor));
          }
        }
        if constexpr (kSums == Sums::kGradients) {
          if (first) sum.add(Doubles<T>(some));
          if (second) products.add(Doubles<T>(some_products));
        }
      }
      if (first) sum.add_to(first + lane);
      if (second) products.add_to(second + lane);
    });
  }
}

// A thread's share [begin, end) of `count` things.
EMO_INLINE int64_t share_of(int64_t count, int thread, int threads) {
  return count * thread / threads;
}

// f(i) for this thread's share of `count` things.
template <class F>
EMO_INLINE void each_of_mine(int64_t count, const Share& share, F f) {
  const int64_t end = share_of(count, share.thread + 1, share.threads);
  for (int64_t i = share_of(count, share.thread, share.threads); i < end; ++i) f(i);
}

// The same place in the buffer of thread t.
template <class E>
EMO_INLINE const E* of_thread(const E* place, int t, const Share& share) {
  const char* const mine = reinterpret_cast<const char*>(place);
  return reinterpret_cast<const E*>(mine + (t - share.thread) * share.own_bytes);
}

// The sum of what the threads have there, in their order.
EMO_INLINE double total(const double* place, const Share& share) {
  double sum = 0.0;
  for (int t = 0; t < share.threads; ++t) sum += *of_thread(place, t, share);
  return sum;
}

// out (rows, columns), dense = the threads' blocked maps added up; this thread's share of the rows.
template <class T>
void add_up(const Blocked<T>& map, int64_t rows, T* out, const Share& share) {
  using V = Vec<T, kLanesOf<T>>;
  each_of_mine(rows, share, [&](int64_t i) {
    each_lane_of<T>(map.columns, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      const T* const at = map.panel(c / kPanel<T>) + i * kPanel<T> + c % kPanel<T>;
      V sum = load<V>(of_thread(at, 0, share));
      for (int t = 1; t < share.threads; ++t) sum += load<V>(of_thread(at, t, share));
      store_as(out + i * map.columns + c, sum, count);
    });
  });
}

// ---- packing ----------------------------------------------------------------------------------

// Rows [k0, k1) of to = the transpose of a (columns, K) weight matrix, for column panel p.
template <class E>
void pack_transposed(const SumOf<E>* weight, int64_t K, const Blocked<E>& to, int64_t p) {
  using T = SumOf<E>;
  pack_panel<E>(weight + p * kPanel<T> * K, to.channels(p), K, to.panel(p), kPanel<T>);
}

// One panel's `channels` of K rows, in pairs where the operand is so.
template <class E, class S>
void pack_rows_of(const S* from, int64_t stride, int64_t K, int64_t channels, E* to) {
  using T = SumOf<E>;
  using V = Vec<T, kLanesOf<T>>;
  constexpr int kT = kTerms<E>;
  for (int64_t k = 0; k < K; k += kT, from += kT * stride, to += kT * kPanel<T>) {
    const S* const second = k + 1 < K ? from + stride : nullptr;
    each_lane_of<T>(channels, [&](int64_t lane, int64_t count) __attribute__((always_inline)) {
      if constexpr (kT == 1) {
        store(to + lane, load_as<V>(from + lane, count));
      } else {
        const S* const other = second ? second + lane : nullptr;
        store(to + kT * lane, load_pairs<V>(from + lane, other, count));
      }
    });
  }
}

// Column panel p of a (K, columns) matrix.
template <class E>
void pack_straight(const SumOf<E>* weight, int64_t K, const Blocked<E>& to, int64_t p) {
  using T = SumOf<E>;
  pack_rows_of<E>(weight + p * kPanel<T>, to.columns, K, to.channels(p), to.panel(p));
}

// A panel's rows, pixels or not, as a transposed product takes them on both sides: as they are, or
// two and two of them in pairs, in `pairs`.
template <class E, class S>
EMO_INLINE const E* across(const S* panel, int64_t rows, int64_t channels, E* pairs) {
  if constexpr (kTerms<E> == 1) {
    return panel;
  } else {
    pack_rows_of<E>(panel, kPanel<SumOf<E>>, rows, channels, pairs);
    return pairs;
  }
}

template <class E>
EMO_INLINE Blocked<E> across(const Blocked<E>& map, int64_t rows, const Blocked<E>& pairs) {
  if constexpr (kTerms<E> == 1) return map;
  for (int64_t p = 0; p < map.panels(); ++p) {
    across<E>(map.panel(p), rows, map.channels(p), pairs.panel(p));
  }
  return pairs;
}

// ---- products ---------------------------------------------------------------------------------

// Pixels of some maps, one panel of each, to bring into the L2 cache while products are computed: a
// pixel every four terms. Of many requests at once the processor drops all but two dozen.
class PixelsAhead {
 public:
  // The pixels of maps of `channels` in S, their first panel at a multiple of P from the start.
  template <class S>
  static PixelsAhead of(int64_t channels) {
    constexpr int64_t kBytes = kPanel<SumOf<S>> * static_cast<int64_t>(sizeof(S));
    PixelsAhead ahead;
    ahead.stride_ = channels * static_cast<int64_t>(sizeof(S));
    ahead.lines_ = ceil_div(kBytes, 64) + (ahead.stride_ % 64 == 0 ? 0 : 1);
    return ahead;
  }
  // `count` pixels from `at` on, which null: of no map.
  void add(const void* at, int64_t count) {
    if (at != nullptr && count > 0) runs_[used_++] = {static_cast<const char*>(at), count};
  }
  EMO_INLINE void fetch() {
    if (current_ == used_) return;
    Run& run = runs_[current_];
    for (int64_t i = 0; i < lines_; ++i) __builtin_prefetch(run.at + 64 * i, 0, 2);
    run.at += stride_;
    if (--run.count == 0) ++current_;
  }
  void fetch_rest() {
    while (current_ < used_) fetch();
  }

 private:
  struct Run {
    const char* at;
    int64_t count;
  };
  static constexpr int kMostMaps = 5;
  Run runs_[kMostMaps];
  int used_ = 0, current_ = 0;
  int64_t stride_ = 0, lines_ = 0;
};

// C (+)= A B (+ bias) for one panel of columns.
//   straight    A is rows of a blocked map: element (i, k) at a[k / P * stride + i * P + k % P]
//   transposed  A is columns of one panel: element (i, k) at a[k * P + i]; i + lane < kPanel
// Of pairs, B is [K / 2][P][2], and so is A where it is transposed.
template <class E>
struct Product {
  using T = SumOf<E>;
  const E* a;
  int64_t a_stride;  // of its panels
  const E* b;        // [K][P]
  int64_t K;
  T* c;  // [rows][P]
  int64_t rows;
  const T* bias;  // (P,), null: none
  bool add;
  PixelsAhead* ahead = nullptr;
};

template <class E, int kRows, class Shape, bool kTransposed>
EMO_INLINE void product_step(Accumulators<E, kRows, Shape>& acc, const E* a, const E* b) {
  using Acc = Accumulators<E, kRows, Shape>;
  using Full = typename Acc::Full;
  using Half = typename Acc::Half;
  constexpr int kT = kTerms<E>;
  constexpr int64_t kStride = kTransposed ? kT : kPanel<SumOf<E>>;
  Full b_full[Shape::kFull > 0 ? Shape::kFull : 1];
  Half b_half;
  unroll<Shape::kFull>(EMO_UNROLLED(j) { b_full[j] = load<Full>(b + j * Shape::kLanes * kT); });
  if constexpr (Shape::kHalf) b_half = load<Half>(b + Shape::kFull * Shape::kLanes * kT);
  unroll<kRows>(EMO_UNROLLED(i) {
    const Full value = splat_terms<Full>(a + i * kStride);
    unroll<Shape::kFull>(
        EMO_UNROLLED(j) { acc.full[i][j] = add_products<E>(acc.full[i][j], value, b_full[j]); });
    if constexpr (Shape::kHalf) {
      acc.half[i] = add_products<E>(acc.half[i], low_half(value), b_half);
    }
  });
}

// Adds the products of `depth` terms.
template <class E, int kRows, class Shape, bool kTransposed>
EMO_INLINE void product_run(Accumulators<E, kRows, Shape>& acc, const E* a, const E* b,
                            int64_t depth, PixelsAhead* ahead) {
  constexpr int kT = kTerms<E>;
  constexpr int64_t P = kPanel<SumOf<E>>, kStep = kTransposed ? P : 1;
  for (; depth >= 4 * kT; depth -= 4 * kT, a += 4 * kT * kStep, b += 4 * kT * P) {
    if (ahead) ahead->fetch();
    unroll<4>(EMO_UNROLLED(u) {
      product_step<E, kRows, Shape, kTransposed>(acc, a + u * kT * kStep, b + u * kT * P);
    });
  }
  for (; depth > 0; depth -= kT, a += kT * kStep, b += kT * P) {
    product_step<E, kRows, Shape, kTransposed>(acc, a, b);
  }
}

// The first `valid` rows of the tile are written; K is at most kChunk.
template <class E, int kRows, class Shape, bool kTransposed>
void product_tile(const Product<E>& t, const E* a, SumOf<E>* c, int64_t valid) {
  using T = SumOf<E>;
  constexpr int64_t P = kPanel<T>;
  Accumulators<E, kRows, Shape> acc;
  acc.clear();
  const E* b = t.b;
  if constexpr (kTransposed) {
    alignas(64) T sums[kRows * Shape::kWidth];
    constexpr int64_t kChunkNow = kPixelChunk<Shape>;
    int64_t left = t.K;
    for (; left > kChunkNow; left -= kChunkNow, a += kChunkNow * P, b += kChunkNow * P) {
      product_run<E, kRows, Shape, true>(acc, a, b, kChunkNow, t.ahead);
      if (left < t.K) acc.add_sums(sums);
      acc.save_sums(sums);
      acc.clear();
    }
    product_run<E, kRows, Shape, true>(acc, a, b, left, t.ahead);
    if (t.K > kChunkNow) acc.add_sums(sums);
  } else {
    for (int64_t left = t.K; left > 0; left -= P, a += t.a_stride, b += P * P) {
      product_run<E, kRows, Shape, false>(acc, a, b, min<int64_t>(left, P), t.ahead);
    }
  }
  acc.each([&](auto& v, auto i, auto channel) __attribute__((always_inline)) {
    using V = decltype(v + v);
    if (i < valid) {
      V result = v;
      if (t.bias) result += load<V>(t.bias + channel);
      if (t.add) result += load<V>(c + i * P + channel);
      store(c + i * P + channel, result);
    }
  });
}

// Rows of a tile: of the straight ones as in gemm.h; transposed tiles must divide a panel evenly.
template <class T, class Shape, bool kTransposed>
constexpr int product_rows() {
  if (!kTransposed) return Shape::kRows;
  const int most = Shape::kRows;
  for (int rows = most; rows > 1; --rows) {
    if (kPanel<T> % rows == 0) return rows;
  }
  return 1;
}

template <class E, class Shape, bool kTransposed>
void product_chunk(const Product<E>& t) {
  using T = SumOf<E>;
  constexpr int kRows = product_rows<T, Shape, kTransposed>(), kFewRows = (kRows + 1) / 2;
  constexpr int64_t kStride = kTransposed ? kTerms<E> : kPanel<T>;
  for (int64_t i = 0; i < t.rows;) {
    const int64_t left = t.rows - i;
    const E* const a = t.a + i * kStride;
    T* const c = t.c + i * kPanel<T>;
    if (left > kFewRows) {
      product_tile<E, kRows, Shape, kTransposed>(t, a, c, min<int64_t>(kRows, left));
      i += kRows;
    } else {
      product_tile<E, kFewRows, Shape, kTransposed>(t, a, c, left);
      i += kFewRows;
    }
  }
}

// Sums of more than kChunk terms are added chunk by chunk: less rounding, and the same bits
// wherever a row stands.
template <class E, bool kTransposed>
void product(Product<E> t, int64_t width) {
  using T = SumOf<E>;
  constexpr int64_t P = kPanel<T>;
  for (int64_t left = t.K; left > 0; left -= kChunk) {
    t.K = min<int64_t>(left, kChunk);
    with_shape<T>(width, [&](auto shape) { product_chunk<E, decltype(shape), kTransposed>(t); });
    t.a += kTransposed ? kChunk * P : kChunk / P * t.a_stride;
    t.b += kChunk * P;
    t.bias = nullptr;
    t.add = true;
  }
}

// c (+)= A B over all columns of B, A being `rows` rows and K columns of a blocked map.
template <class E>
void multiply_all(const E* a, int64_t a_stride, int64_t K, int64_t rows, const Blocked<E>& b,
                  int64_t b_row, const Blocked<SumOf<E>>& c, bool add,
                  PixelsAhead* ahead = nullptr) {
  for (int64_t p = 0; p < c.panels(); ++p) {
    product<E, false>({a, a_stride, b.panel(p) + b_row * kPanel<SumOf<E>>, K, c.panel(p), rows,
                       nullptr, add, ahead},
                      c.width(p));
  }
}

// c[row..] += A^T B over all columns of B: A one panel of `pixels` rows, `channels` of it used.
template <class E>
void multiply_transposed(const E* a, int64_t pixels, int64_t channels, const Blocked<E>& b,
                         const Blocked<SumOf<E>>& c, int64_t c_row, PixelsAhead* ahead = nullptr) {
  for (int64_t p = 0; p < c.panels(); ++p) {
    product<E, true>({a, 0, b.panel(p), pixels, c.panel(p) + c_row * kPanel<SumOf<E>>, channels,
                      nullptr, true, ahead},
                     c.width(p));
  }
}

}  // namespace
}  // namespace emo_kernels::cpu
