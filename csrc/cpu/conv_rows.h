// What a convolution of a few input channels and its gradient share: rows of the image with zero
// margins, in the image's own layout, and the panels of output channels.
#pragma once

#include "cpu/blocked.h"

namespace emo_kernels::cpu {
namespace {

// Output channels of a panel at most: two vectors, which leave registers for nine terms or more.
template <class T>
constexpr int64_t kConvPanel = 2 * kLanesOf<T>;

// f(shape) of the narrowest panel that holds the channels.
template <class T, class F>
EMO_INLINE auto with_conv_shape(int64_t channels, F f) {
  constexpr int kLanes = kLanesOf<T>;
  if constexpr (kHalfVectors && sizeof(T) == 4) {
    if (channels > kLanes && channels <= kLanes + kLanes / 2) return f(PanelShape<T, 1, true>{});
  }
  return channels <= kLanes ? f(PanelShape<T, 1, false>{}) : f(PanelShape<T, 2, false>{});
}

// Panels of `O` output channels.
template <class T>
struct ConvPanels {
  int64_t O, count;

  explicit ConvPanels(int64_t channels) : O(channels), count(ceil_div(channels, kConvPanel<T>)) {}
  EMO_INLINE int64_t channels(int64_t p) const {
    return min<int64_t>(kConvPanel<T>, O - p * kConvPanel<T>);
  }
  EMO_INLINE int64_t width(int64_t p) const {
    return with_conv_shape<T>(channels(p), [](auto shape) -> int64_t { return shape.kWidth; });
  }
};

template <class Call>
EMO_INLINE int64_t reach_of(const Call& c) {
  return (c.K - 1) * c.dilation;
}
template <class Call>
EMO_INLINE int64_t output_side(const Call& c, int64_t side) {
  return (side + 2 * c.padding - reach_of(c) - 1) / c.stride + 1;
}

EMO_INLINE void fetch_lines(const void* begin, const void* end) {
  for (auto at = static_cast<const char*>(begin); at < end; at += 64) __builtin_prefetch(at, 0, 2);
}

// A ring of as many rows as a kernel covers, and one that stays zero.
template <class T>
struct ImageRows {
  int64_t rows, columns, column_stride, channel_stride, elements;  // the last: of one row
  T* data;

  template <class Call>
  ImageRows(const Call& c, Places& own) : rows(reach_of(c) + 1) {
    const int64_t past = output_side(c, c.W) + kMostGemmRows;  // a tile may run past the end
    columns = max(c.W + 2 * c.padding, past * c.stride + rows);
    column_stride = c.channels_last ? c.C : 1;
    channel_stride = c.channels_last ? 1 : columns;
    elements = columns * c.C;
    data = own.take<T>((rows + 1) * elements + kLanesOf<T>);
  }
  void clear() const { fill_zero(data, (rows + 1) * elements); }
  EMO_INLINE const T* row(int64_t r) const { return data + r % rows * elements; }
  EMO_INLINE const T* zeros() const { return data + rows * elements; }
  // Where a term (channel, tap column) of the first output pixel lies in a row.
  EMO_INLINE int64_t place(int64_t channel, int64_t column) const {
    return channel * channel_stride + column * column_stride;
  }

  // Input row r of image n between the margins.
  template <class S, class Call>
  void load_row(const Call& c, int64_t n, int64_t r) const {
    const S* const x = static_cast<const S*>(c.x);
    T* const to = data + r % rows * elements;
    if (c.channels_last) {
      copy(x + (n * c.H + r) * c.W * c.C, c.W * c.C, to + c.padding * c.C);
      return;
    }
    for (int64_t i = 0; i < c.C; ++i) {
      copy(x + ((n * c.C + i) * c.H + r) * c.W, c.W, to + i * columns + c.padding);
    }
  }

  // Asks for the rows that come after `loaded` while others are worked on.
  template <class S, class Call>
  void prefetch(const Call& c, int64_t n, int64_t loaded) const {
    const S* const x = static_cast<const S*>(c.x);
    const int64_t last = min(c.H, loaded + c.stride), planes = c.channels_last ? 1 : c.C;
    const int64_t row = c.channels_last ? c.W * c.C : c.W;
    for (int64_t i = 0; i < planes && loaded < last; ++i) {
      const S* const plane = x + (n * planes + i) * c.H * row;
      fetch_lines(plane + loaded * row, plane + last * row);
    }
  }

  // The rows that output row y reads and `loaded` is not past; returns what it is past then.
  template <class S, class Call>
  int64_t load_for(const Call& c, int64_t n, int64_t y, int64_t loaded) const {
    const int64_t top = y * c.stride - c.padding, end = min(c.H, top + rows);
    for (int64_t r = max(loaded, max<int64_t>(0, top)); r < end; ++r) load_row<S>(c, n, r);
    return max(loaded, end);
  }

 private:
  template <class S>
  static void copy(const S* from, int64_t count, T* to) {
    using V = Vec<T, kLanesOf<T>>;
    int64_t i = 0;
    for (; i + kLanesOf<T> <= count; i += kLanesOf<T>) store(to + i, load_as<V>(from + i));
    for (; i < count; ++i) to[i] = static_cast<T>(value_of(from[i]));
  }
};

// f(image, first, last) for the runs of rows within one image of a thread's share.
template <class F>
EMO_INLINE void each_band(int64_t images, int64_t rows, const Share& share, F f) {
  const int64_t end = share_of(images * rows, share.thread + 1, share.threads);
  for (int64_t row = share_of(images * rows, share.thread, share.threads); row < end;) {
    const int64_t n = row / rows, first = row - n * rows, stop = min(rows, first + end - row);
    f(n, first, stop);
    row += stop - first;
  }
}

}  // namespace
}  // namespace emo_kernels::cpu
