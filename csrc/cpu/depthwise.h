// The depthwise convolution inside a block: one output row of one panel, batch norm, SiLU, skip.
//
// Rows come from the ring of expanded rows, zero columns included; rows outside the map are left
// out. Every output is the sum over the taps in row-major order, whatever the blocking.
#pragma once

#include "cpu/activation.h"
#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace emo_kernels::cpu {
namespace {

template <class T>
struct DepthwiseRow {
  const T* rows[64];        // the ring row under each tap row that lies inside the map
  int64_t first_tap, taps;  // tap rows [first_tap, first_tap + taps) of K
  int64_t K, stride, dilation;
  const T* weights;  // [K * K][panel], batch norm's scale folded in
  const T* shift;    // [panel], batch norm's shift
  int64_t columns, panel;
  int64_t width;  // channels of the panel that exist
};

// A row of the block, written as an operand E of the GEMM behind it.
template <class T, class E>
struct BlockRow : DepthwiseRow<T> {
  const T* gate;   // [panel] squeeze-excite, null: none
  const T* local;  // the expanded map at the output's first pixel, null: no skip
  E* out;          // [columns][panel]
};

// What becomes of the sums of one vector of channels, column by column.
template <class T, class E>
struct BlockEpilogue {
  using V = Vec<T, kLanesOf<T>>;
  const BlockRow<T, E>& row;
  const int64_t lane;

  EMO_INLINE BlockEpilogue(const DepthwiseRow<T>& r, int64_t l)
      : row(static_cast<const BlockRow<T, E>&>(r)), lane(l) {}
  EMO_INLINE void operator()(V sum, int64_t column) {
    V y = silu<T, kTerms<E> == 2>(sum);
    if (row.gate) y *= load<V>(row.gate + lane);
    if (row.local) y += load<V>(row.local + column * row.panel + lane);
    store_as(row.out + column * row.panel + lane, y);
  }
  EMO_INLINE void finish() {}
};

// kColumns neighbouring outputs of one vector of channels; dilation 1.
template <class T, int kTaps, int kStride, int kColumns, class Epilogue>
EMO_INLINE void depthwise_block(const DepthwiseRow<T>& row, int64_t column, int64_t lane,
                                Epilogue& epilogue) {
  using V = Vec<T, kLanesOf<T>>;
  constexpr int kPanelWidth = kPanel<T>;
  V acc[kColumns];
  const V shift = load<V>(row.shift + lane);
  unroll<kColumns>(EMO_UNROLLED(x) { acc[x] = shift; });
  for (int64_t t = 0; t < row.taps; ++t) {
    const T* w = row.weights + (row.first_tap + t) * kTaps * kPanelWidth + lane;
    const T* in = row.rows[t] + column * kStride * kPanelWidth + lane;
    V weight[kTaps];
    unroll<kTaps>(EMO_UNROLLED(j) { weight[j] = load<V>(w + j * kPanelWidth); });
    unroll<(kColumns - 1) * kStride + kTaps>(EMO_UNROLLED(j) {
      const V value = load<V>(in + j * kPanelWidth);
      unroll<kColumns>(EMO_UNROLLED(x) {
        constexpr int kTap = j.value - x.value * kStride;
        if constexpr (kTap >= 0 && kTap < kTaps) acc[x] = fma(value, weight[kTap], acc[x]);
      });
    });
  }
  unroll<kColumns>(EMO_UNROLLED(x) { epilogue(acc[x], column + x); });
}

template <class T, class Epilogue, int kTaps, int kStride>
void depthwise_row(const DepthwiseRow<T>& row) {
  constexpr int kColumns = 7;  // 224-pixel maps are multiples of 7 wide
  for (int64_t lane = 0; lane < row.width; lane += kLanesOf<T>) {
    Epilogue epilogue(row, lane);
    int64_t column = 0;
    for (; column + kColumns <= row.columns; column += kColumns) {
      depthwise_block<T, kTaps, kStride, kColumns>(row, column, lane, epilogue);
    }
    for (; column < row.columns; ++column) {
      depthwise_block<T, kTaps, kStride, 1>(row, column, lane, epilogue);
    }
    epilogue.finish();
  }
}

// Any kernel size, stride and dilation.
template <class T, class Epilogue>
void depthwise_row_any(const DepthwiseRow<T>& row) {
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t lane = 0; lane < row.width; lane += kLanesOf<T>) {
    Epilogue epilogue(row, lane);
    for (int64_t column = 0; column < row.columns; ++column) {
      V acc = load<V>(row.shift + lane);
      for (int64_t t = 0; t < row.taps; ++t) {
        const T* w = row.weights + (row.first_tap + t) * row.K * row.panel + lane;
        const T* in = row.rows[t] + column * row.stride * row.panel + lane;
        for (int64_t j = 0; j < row.K; ++j) {
          acc = fma(load<V>(in + j * row.dilation * row.panel), load<V>(w + j * row.panel), acc);
        }
      }
      epilogue(acc, column);
    }
    epilogue.finish();
  }
}

template <class T>
using DepthwiseRowFunction = void (*)(const DepthwiseRow<T>&);

template <class T, class Epilogue>
DepthwiseRowFunction<T> depthwise_row_for(int64_t K, int64_t stride, int64_t dilation) {
  if (dilation == 1 && (stride == 1 || stride == 2)) {
    const bool one = stride == 1;
    if (K == 3) return one ? depthwise_row<T, Epilogue, 3, 1> : depthwise_row<T, Epilogue, 3, 2>;
    if (K == 5) return one ? depthwise_row<T, Epilogue, 5, 1> : depthwise_row<T, Epilogue, 5, 2>;
    if (K == 7) return one ? depthwise_row<T, Epilogue, 7, 1> : depthwise_row<T, Epilogue, 7, 2>;
  }
  return depthwise_row_any<T, Epilogue>;
}

}  // namespace
}  // namespace emo_kernels::cpu
