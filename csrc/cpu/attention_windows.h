// The attention of a training step: windows of pixels gathered into rows, and one head of them.
#pragma once

#include "cpu/norm_rows.h"
#include "cpu/row_sum.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

constexpr int64_t kQueries = 112;     // of a window that attend at a time
constexpr int64_t kWindowRows = 196;  // small windows are gathered up to as many rows

// Windows of one call; both calls have the fields it reads.
struct WindowPlan {
  int64_t H, W, wh, ww, n1, n2, tokens, windows, group, rows;
  bool grid;

  template <class Call>
  EMO_INLINE explicit WindowPlan(const Call& c) {
    H = c.H;
    W = c.W;
    wh = c.window_size > 0 ? c.window_size : H;
    ww = c.window_size > 0 ? c.window_size : W;
    n1 = ceil_div(H, wh);
    n2 = ceil_div(W, ww);
    tokens = wh * ww;
    windows = c.N * n1 * n2;
    group = max<int64_t>(1, kWindowRows / tokens);
    rows = group * tokens;
    grid = c.windows != Windows::kBlock;
  }

  // The pixel of token t of a window in this partition, -1 for padding.
  EMO_INLINE int64_t pixel(int64_t window, int64_t t) const {
    const int64_t image = window / (n1 * n2), i = window / n2 % n1, j = window % n2;
    const int64_t a = t / ww, b = t % ww;
    const int64_t y = grid ? a * n1 + i : i * wh + a, x = grid ? b * n2 + j : j * ww + b;
    return y < H && x < W ? (image * H + y) * W + x : -1;
  }
};

// f(partition's plan, whether it is the first, the last) for one or both partitions.
template <class Call, class F>
EMO_INLINE void each_partition(const Call& c, WindowPlan plan, F f) {
  const bool both = c.windows == Windows::kBoth;
  f(plan, true, !both);
  if (!both) return;
  team_barrier();
  plan.grid = false;
  f(plan, false, true);
}

// Projections packed for use: of every head its q and its k columns, as (C, d) each.
template <class T>
struct HeadWeights {
  Blocked<T> first;  // of slot 0; the others follow
  T* bias;
  int64_t d, heads, slot_size, bias_size;

  static HeadWeights at(Places& shared, int64_t C, int64_t d, bool present) {
    HeadWeights w;
    w.d = d;
    w.heads = C / d;
    w.bias_size = ceil_div(d, kPanel<T>) * kPanel<T>;
    const int64_t slots = present ? 2 * w.heads : 0, before = shared.used;
    w.slot_size = 0;
    w.first = Blocked<T>::at(shared, C, d);
    w.slot_size = (shared.used - before) / static_cast<int64_t>(sizeof(T));
    for (int64_t s = 1; s < slots; ++s) Blocked<T>::at(shared, C, d);
    w.bias = shared.take<T>(slots * w.bias_size);
    return w;
  }
  Blocked<T> slot(int64_t head, int64_t k) const {
    Blocked<T> map = first;
    map.data += (2 * head + k) * slot_size;
    return map;
  }
  T* bias_of(int64_t head, int64_t k) const { return bias + (2 * head + k) * bias_size; }

  void pack(const T* weight, const T* biases, int64_t C, int64_t head) const {
    for (int64_t k = 0; k < 2; ++k) {
      const Blocked<T> to = slot(head, k);
      const int64_t row = k * C + head * d;
      for (int64_t p = 0; p < to.panels(); ++p) pack_transposed(weight + row * C, C, to, p);
      copy_padded<T>(biases ? biases + row : nullptr, d, bias_of(head, k), bias_size);
    }
  }
};

// A run of channels that lies in one panel on both sides: f(from, to, count).
template <class T, class F>
EMO_INLINE void each_slice_run(int64_t channel, int64_t count, F f) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t c = 0; c < count;) {
    const int64_t run = min(count - c, min(P - c % P, P - (channel + c) % P));
    f(channel + c, c, run);
    c += run;
  }
}

// Channels [channel, channel + slice.columns) of a blocked map, into a map of their own.
template <class T>
void take_slice(const Blocked<T>& map, int64_t channel, int64_t rows, const Blocked<T>& slice) {
  constexpr int64_t P = kPanel<T>;
  each_slice_run<T>(channel, slice.columns, [&](int64_t from, int64_t to, int64_t run) {
    const T* a = map.panel(from / P) + from % P;
    T* b = slice.panel(to / P) + to % P;
    for (int64_t i = 0; i < rows; ++i, a += P, b += P) {
      for (int64_t j = 0; j < run; ++j) b[j] = a[j];
    }
  });
}

template <class T>
void add_slice(const Blocked<T>& slice, int64_t channel, int64_t rows, const Blocked<T>& map) {
  constexpr int64_t P = kPanel<T>;
  each_slice_run<T>(channel, slice.columns, [&](int64_t to, int64_t from, int64_t run) {
    const T* a = slice.panel(from / P) + from % P;
    T* b = map.panel(to / P) + to % P;
    for (int64_t i = 0; i < rows; ++i, a += P, b += P) {
      for (int64_t j = 0; j < run; ++j) b[j] += a[j];
    }
  });
}

template <class T>
EMO_INLINE Blocked<T> from_row(Blocked<T> map, int64_t row) {
  map.data += row * kPanel<T>;
  return map;
}

// Tokens that a product takes by panels: all but one that would have a panel to itself, as the last
// of 7 x 7 has.
template <class T>
EMO_INLINE int64_t tokens_in_panels(int64_t tokens) {
  return tokens % kPanel<T> == 1 && tokens > 1 ? tokens - 1 : tokens;
}

// `tokens` rows of a map from `row` on, transposed: (channels, tokens).
template <class T>
void transpose_rows(const Blocked<T>& map, int64_t row, int64_t tokens, const Blocked<T>& to) {
  constexpr int64_t P = kPanel<T>;
  tokens = tokens_in_panels<T>(tokens);
  for (int64_t t = 0; t < tokens; t += P) {
    for (int64_t p = 0; p < map.panels(); ++p) {
      pack_panel<T>(map.panel(p) + (row + t) * P, min(P, tokens - t), map.channels(p),
                    to.panel(t / P) + p * P * P, P, P);
    }
  }
}

// The pixels of `count` windows from `first` on.
EMO_INLINE void list_pixels(const WindowPlan& plan, int64_t first, int64_t count, int64_t* pixels) {
  for (int64_t i = 0; i < count * plan.tokens; ++i) {
    pixels[i] = plan.pixel(first + i / plan.tokens, i % plan.tokens);
  }
}

constexpr int64_t kPixelsAhead = 4;  // of the one at hand: a fetch from memory lasts about as long

// Asks for the pixel that comes kPixelsAhead behind pixel i of a window: its neighbours in memory
// are those of another window, the hardware fetches none of them ahead.
template <class S>
EMO_INLINE void fetch_pixel(const S* map, int64_t C, const int64_t* pixels, int64_t i,
                            int64_t rows) {
  if (i + kPixelsAhead >= rows || pixels[i + kPixelsAhead] < 0) return;
  const S* const from = map + pixels[i + kPixelsAhead] * C;
  for (int64_t c = 0; c < C; c += 64 / sizeof(S)) fetch(from + c);
}

// Columns [channel, channel + slice.columns) of a dense map, row by row as `pixels` says; padding
// from `padding`, or zero. Asks for the columns behind them, the next head's.
template <class T, class S>
void gather(const S* map, int64_t C, int64_t channel, const int64_t* pixels, int64_t rows,
            const T* padding, const Blocked<T>& slice) {
  using V = Vec<T, kLanesOf<T>>;
  constexpr int64_t P = kPanel<T>;
  for (int64_t i = 0; i < rows; ++i) {
    const S* const from = pixels[i] >= 0 ? map + pixels[i] * C + channel : nullptr;
    each_lane_of<T>(slice.columns, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      T* const to = slice.panel(c / P) + i * P + c % P;
      if (from) fetch(from + slice.columns + c);
      store(to, from      ? load_as<V>(from + c, count)
                : padding ? load_as<V>(padding + channel + c, count)
                          : V{});
    });
  }
}

// The reverse; padding is dropped.
template <class T, class S>
void scatter(const Blocked<T>& slice, const int64_t* pixels, int64_t rows, bool add,
             int64_t channel, S* map, int64_t C) {
  using V = Vec<T, kLanesOf<T>>;
  constexpr int64_t P = kPanel<T>;
  for (int64_t i = 0; i < rows; ++i) {
    if (pixels[i] < 0) continue;
    S* const to = map + pixels[i] * C + channel;
    each_lane_of<T>(slice.columns, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
      V v = load<V>(slice.panel(c / P) + i * P + c % P);
      if (add) v += load_as<V>(to + c, count);
      store_as(to + c, v, count);
    });
  }
}

// f(lane of the row, count) for a row of scores over `tokens`, which lie in panels.
template <class T, class F>
EMO_INLINE void each_score(int64_t tokens, int64_t stride, F f) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t panel = 0; tokens > 0; tokens -= P, panel += stride) {
    each_lane_of<T>(min(P, tokens), [&](int64_t lane, int64_t) __attribute__((always_inline)) {
      f(panel + lane, tokens - lane);
    });
  }
}

// softmax(scale s) of one row in place, zero up to a whole vector.
template <class T>
void softmax_row(T* scores, int64_t tokens, int64_t stride, T scale) {
  constexpr int kLanes = kLanesOf<T>;
  using V = Vec<T, kLanes>;
  const V lowest = splat<V>(-static_cast<T>(__builtin_inff()));
  V most = lowest;
  each_score<T>(tokens, stride, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
    V v = load<V>(scores + at);
    if (count < kLanes) v = first_lanes<V, T>(v, count, lowest);
    most = max(most, v);
  });
  const T largest = max_lanes<V, T>(most);
  RowSum<T> sum;
  each_score<T>(tokens, stride, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
    V e = exponential<T>((load<V>(scores + at) - largest) * scale);
    if (count < kLanes) e = first_lanes<V, T>(e, count);
    sum.next() += e;
    store(scores + at, e);
  });
  const T inverse = T(1) / sum.total();
  each_score<T>(tokens, stride, [&](int64_t at, int64_t) __attribute__((always_inline)) {
    store(scores + at, load<V>(scores + at) * inverse);
  });
}

// ds = p (dp - sum p dp) scale of one row, into dp.
template <class T>
void softmax_row_backward(const T* p, T* dp, int64_t tokens, int64_t stride, T scale) {
  constexpr int kLanes = kLanesOf<T>;
  using V = Vec<T, kLanes>;
  RowSum<T> sum;
  each_score<T>(tokens, stride, [&](int64_t at, int64_t count) __attribute__((always_inline)) {
    V d = load<V>(dp + at);
    if (count < kLanes) d = first_lanes<V, T>(d, count);
    V& part = sum.next();
    part = fma(load<V>(p + at), d, part);
  });
  const T dot = sum.total();
  each_score<T>(tokens, stride, [&](int64_t at, int64_t) __attribute__((always_inline)) {
    store(dp + at, load<V>(p + at) * (load<V>(dp + at) - dot) * scale);
  });
}

// scores = a b^T for `queries` rows of a from `row` on and `tokens` rows of b from `key` on, which
// transpose_rows has put into `transposed`.
template <class T>
void scores_of(const Blocked<T>& a, int64_t row, int64_t queries, const Blocked<T>& b, int64_t key,
               int64_t tokens, const Blocked<T>& transposed, const Blocked<T>& scores) {
  using V = Vec<T, kLanesOf<T>>;
  constexpr int64_t P = kPanel<T>;
  Blocked<T> whole = scores;
  whole.columns = tokens_in_panels<T>(tokens);
  multiply_all(a.data + row * P, a.stride(), a.columns, queries, transposed, 0, whole, false);
  for (int64_t t = whole.columns; t < tokens; ++t) {
    for (int64_t i = 0; i < queries; ++i) {
      V sum{};
      each_lane_of<T>(a.columns, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        const int64_t at = c / P * a.stride() + c % P;
        const V product =
            load<V>(a.data + at + (row + i) * P) * load<V>(b.data + at + (key + t) * P);
        sum += count < kLanesOf<T> ? first_lanes<V, T>(product, count) : product;
      });
      scores.panel(t / P)[i * P + t % P] = sum_lanes<V, T>(sum);
    }
  }
}

}  // namespace
}  // namespace emo_kernels::cpu
