// Rows of a dense (N, H, W, C) map in panels of channels with zero columns at both sides: what the
// depthwise convolutions of a training step read, a ring of rows that follows them down the map.
#pragma once

#include "cpu/blocked.h"
#include "cpu/depthwise.h"
#include "cpu/launch.h"

namespace emo_kernels::cpu {
namespace {

constexpr int64_t kRingBytes = 384
                               << 10;  // of a group of channels, beside the rest in the L2 cache

template <class T>
struct Ring {
  T* data;
  int64_t rows, columns, before;  // columns in all, and zero ones in front of the map's

  EMO_INLINE int64_t panel_stride() const { return rows * columns * kPanel<T>; }
  EMO_INLINE T* row(int64_t panel, int64_t y) const {
    return data + panel * panel_stride() + y % rows * columns * kPanel<T>;
  }
  // The place of the map's column 0.
  EMO_INLINE T* first(int64_t panel, int64_t y) const { return row(panel, y) + before * kPanel<T>; }
};

// Brings in a row: f(channel, count) gives a function of the offset in the map, which gives the
// vector of a pixel there.
template <class T, class F>
EMO_INLINE void fill_row(const Ring<T>& ring, int64_t y, int64_t W, int64_t map_row, int64_t C,
                         int64_t panel0, int64_t panels, F f) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t g = 0; g < panels; ++g) {
    T* const to = ring.first(g, y);
    const int64_t channel = (panel0 + g) * P;
    each_lane_of<T>(min<int64_t>(P, C - channel),
                    [&](int64_t lane, int64_t count) __attribute__((always_inline)) {
                      const auto vector_at = f(channel + lane, count);
                      const int64_t begin = map_row * C + channel + lane;
                      for (int64_t column = 0; column < W; ++column) {
                        store(to + column * P + lane, vector_at(begin + column * C));
                      }
                    });
  }
}

// Brings in a row as it is.
template <class T, class S>
EMO_INLINE void load_row(const Ring<T>& ring, int64_t y, int64_t W, int64_t map_row, int64_t C,
                         int64_t panel0, int64_t panels, const S* map) {
  using V = Vec<T, kLanesOf<T>>;
  fill_row(ring, y, W, map_row, C, panel0, panels,
           [=](int64_t, int64_t count) __attribute__((always_inline)) {
             return [=](int64_t at)
                        __attribute__((always_inline)) { return load_as<V>(map + at, count); };
           });
}

// One output row of one panel, written into a dense map.
template <class T, class S>
struct MapRow : DepthwiseRow<T> {
  S* map;                  // at the first column
  int64_t column_stride;   // elements between neighbouring columns
  const S* add;            // laid out as the map, null: nothing
  const T* pivot;          // [panel]
  double *sums, *squares;  // [panel], of what is written less the pivot
};

template <class T, class S, bool kSums>
struct MapEpilogue {
  using V = Vec<T, kLanesOf<T>>;
  static constexpr int64_t kColumns = 8;  // summed in the element type
  const MapRow<T, S>& row;
  const int64_t lane, count;
  V pivot{}, sum{}, square{};

  EMO_INLINE MapEpilogue(const DepthwiseRow<T>& r, int64_t l)
      : row(static_cast<const MapRow<T, S>&>(r)), lane(l), count(r.width - l) {
    if constexpr (kSums) pivot = load<V>(row.pivot + lane);
  }
  EMO_INLINE void operator()(V y, int64_t column) {
    const int64_t at = column * row.column_stride + lane;
    if constexpr (!kSums) {
      if (row.add) y += load_as<V>(row.add + at, count);
    }
    store_as(row.map + at, y, count);
    if constexpr (kSums) {
      const V centred = as_stored<S>(y) - pivot;
      sum += centred;
      square = fma(centred, centred, square);
      if (column % kColumns == kColumns - 1) finish();
    }
  }
  EMO_INLINE void finish() {
    if constexpr (kSums) {
      Doubles<T>(sum).add_to(row.sums + lane);
      Doubles<T>(square).add_to(row.squares + lane);
      sum = square = V{};
    }
  }
};

// Asks for the pixels of one panel of a row of a dense map, while another row is worked on.
template <class T, class S>
EMO_INLINE void prefetch_row(const S* row, int64_t W, int64_t C, int64_t panel) {
  constexpr int64_t P = kPanel<T>, kLine = 64 / static_cast<int64_t>(sizeof(S));
  const int64_t width = min<int64_t>(P, C - panel * P);
  for (int64_t column = 0; column < W; ++column) {
    const S* const at = row + column * C + panel * P;
    for (int64_t i = 0; i < width; i += kLine) __builtin_prefetch(at + i, 0, 2);
  }
}

// Weights (C, K, K) of channels [channel, channel + P) as [taps][P]: those at the places `tap`
// gives for t = 0, 1, ...
template <class T, class F>
void pack_taps(const T* weight, int64_t C, int64_t K, int64_t channel, int64_t taps, T* packed,
               F tap) {
  constexpr int64_t P = kPanel<T>;
  const int64_t channels = min<int64_t>(P, C - channel);
  for (int64_t t = 0; t < taps; ++t) {
    const int64_t from = tap(t);
    for (int64_t i = 0; i < P; ++i) {
      packed[t * P + i] = i < channels ? weight[(channel + i) * K * K + from] : T(0);
    }
  }
}

template <class Call>
EMO_INLINE int64_t output_rows(const Call& c) {
  return (c.H + 2 * c.padding - c.dilation * (c.K - 1) - 1) / c.stride + 1;
}
template <class Call>
EMO_INLINE int64_t output_columns(const Call& c) {
  return (c.W + 2 * c.padding - c.dilation * (c.K - 1) - 1) / c.stride + 1;
}

}  // namespace
}  // namespace emo_kernels::cpu
