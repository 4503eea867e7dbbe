// Packing of weights into panels: (rows, K) as PyTorch keeps them -> [K][width], vectors over rows,
// or in pairs of bfloat16 [K / 2][width][2].
//
// Done at every call instead of cached: a later change of a weight is then always seen, by
// construction, and no second copy is kept. A panel of 48 x 160 takes 0.7 us on one Zen 4 core out
// of its L2 cache and 3 us out of memory: see Ahead of gemm.h.
#pragma once

#include "cpu/bf16.h"
#include "cpu/simd.h"

namespace emo_kernels::cpu {
namespace {

// One butterfly stage: swaps the off-diagonal blocks of side kSide.
template <int kSide, class V, int... kLane>
EMO_INLINE void transpose_stage(V* rows, Indices<kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  unroll<kCount>(EMO_UNROLLED(i) {
    if constexpr ((i.value & kSide) == 0) {
      const V a = rows[i], b = rows[i + kSide];
      rows[i] = __builtin_shufflevector(a, b, (kLane & kSide ? kCount + kLane - kSide : kLane)...);
      rows[i + kSide] =
          __builtin_shufflevector(a, b, (kLane & kSide ? kCount + kLane : kLane + kSide)...);
    }
  });
}

template <class V, int kCount>
EMO_INLINE void transpose(V* rows) {
  using All = typename MakeIndices<kCount>::type;
  if constexpr (kCount >= 16) transpose_stage<8>(rows, All{});
  if constexpr (kCount >= 8) transpose_stage<4>(rows, All{});
  if constexpr (kCount >= 4) transpose_stage<2>(rows, All{});
  transpose_stage<1>(rows, All{});
}

// One vector of rows of pack_panel, those past `rows` zero.
template <class E, bool kWhole, class S>
EMO_INLINE void pack_rows(const S* src, int64_t rows, int64_t K, SumOf<E>* dst, int64_t dst_stride,
                          int64_t stride, int64_t store_width) {
  using T = SumOf<E>;
  constexpr int kLanes = kLanesOf<T>, kStep = kLanes * kTerms<E>;
  using V = Vec<T, kLanes>;
  for (int64_t k = 0; k < K; k += kStep, dst += kLanes * dst_stride) {
    const int64_t depth = min<int64_t>(kStep, K - k);
    V block[kLanes];
    unroll<kLanes>(EMO_UNROLLED(i) {
      const S* row = src + i * stride + k;
      // Weights come from memory, and these rows are too short for its prefetcher: ask for the
      // rows a vector further down, which are packed next.
      __builtin_prefetch(row + kLanes * stride);
      block[i] = kWhole     ? load_terms<V, E>(row, kStep)
                 : i < rows ? load_terms<V, E>(row, depth)
                            : V{};
    });
    transpose<V, kLanes>(block);
    if (kWhole || (depth == kStep && store_width == kLanes)) {
      unroll<kLanes>(EMO_UNROLLED(i) { store(dst + i * dst_stride, block[i]); });
    } else {
      const int64_t lanes = ceil_div(depth, kTerms<E>);
      for (int64_t i = 0; i < lanes; ++i) store_first(dst + i * dst_stride, block[i], store_width);
    }
  }
}

// dst[k * dst_stride + r] = src[r * stride + k] for r < rows, 0 for rows <= r < width; of pairs
// likewise, the last one filled up with 0.
template <class E, class S>
void pack_panel(const S* src, int64_t rows, int64_t K, E* dst, int64_t width, int64_t stride,
                int64_t dst_stride) {
  using T = SumOf<E>;
  constexpr int kLanes = kLanesOf<T>;
  T* lanes = reinterpret_cast<T*>(dst);
  for (int64_t r = 0; r < width; r += kLanes, src += kLanes * stride, lanes += kLanes) {
    const int64_t store_width = min<int64_t>(kLanes, width - r);
    if (rows - r >= kLanes && K % (kLanes * kTerms<E>) == 0) {
      pack_rows<E, true>(src, rows - r, K, lanes, dst_stride, stride, store_width);
    } else {
      pack_rows<E, false>(src, rows - r, K, lanes, dst_stride, stride, store_width);
    }
  }
}

template <class E, class S>
void pack_panel(const S* src, int64_t rows, int64_t K, E* dst, int64_t width, int64_t stride) {
  pack_panel(src, rows, K, dst, width, stride, width);
}

template <class E, class S>
void pack_panel(const S* src, int64_t rows, int64_t K, E* dst, int64_t width) {
  pack_panel(src, rows, K, dst, width, K);
}

}  // namespace
}  // namespace emo_kernels::cpu
