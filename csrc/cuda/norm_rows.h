// The norm in front of a whole-block kernel, over pixels that lie in shared memory: rows of
// elements T, rounded to T again, which columns behind the last channel leave zero.
//
// Statistics of the layer norm come in two passes, in fp32: four threads share a pixel, each sums
// every fourth pair of channels; their sums are added in one order.
#pragma once

#include "cuda/matrix.h"
#include "cuda/mma.h"

namespace emo_kernels::cuda {

constexpr int kBlockThreads = 256, kBlockWarps = kBlockThreads / kLanes;  // of whole-block kernels
constexpr int kNormParts = 4;  // threads that share a pixel
constexpr int kFewBlocks =
    264;  // below which blocks share out channels or heads: 2 on each of an H200

// Shared memory for the sums of so many rows.
EMO_ANYWHERE int64_t norm_parts_bytes(int rows) { return int64_t{2} * rows * kNormParts * 4; }

template <class T>
struct NormRows {
  T* rows;
  float *affine, *parts;  // (C rounded up, 2), norm_parts_bytes()
  int stride, C, capacity, count, thread, threads;

  EMO_KERNEL int pairs() const { return rounded(C, 16) / 2; }

  // Scales and shifts of the channels.
  EMO_KERNEL void load_affine(Norm norm, const ChannelNorm& front) const {
    if (norm == Norm::kNone) return;
    for (int c = thread; c < 2 * pairs(); c += threads) {
      Float2 pair{0.0f, 0.0f};
      if (c < C) {
        pair = norm == Norm::kAffine
                   ? affine_of(front, c)
                   : Float2{value_at(front.weight, c, 1.0f), value_at(front.bias, c)};
      }
      write(affine + 2 * c, pair.x);
      write(affine + 2 * c + 1, pair.y);
    }
  }

  // The pair of channels 2 pair, 2 pair + 1 of row p: (x - mean) * scale, then scaled and shifted
  // by channel.
  EMO_KERNEL void normalize_pair(int p, int pair, float mean, float scale) const {
    T* const at = rows + p * stride + 2 * pair;
    const float* const by = affine + 4 * pair;
    const Float2 x = widen(read_packed<Float2>(at));
    const float left = fused((x.x - mean) * scale, read(by), read(by + 1));
    const float right = fused((x.y - mean) * scale, read(by + 2), read(by + 3));
    write_packed<Float2>(at, pack<T>(Float2{left, right}));
  }

  template <class Live>
  EMO_KERNEL void normalize_by_channel(const Live& live) const {
    for (int i = thread; i < count * pairs(); i += threads) {
      if (live(i / pairs())) normalize_pair(i / pairs(), i % pairs(), 0.0f, 1.0f);
    }
  }

  // Calls visit(row, part) for what the thread has.
  template <class Live, class Visit>
  EMO_KERNEL void for_parts(const Live& live, const Visit& visit) const {
    for (int i = thread; i < count * kNormParts; i += threads) {
      if (live(i / kNormParts)) visit(i / kNormParts, i % kNormParts);
    }
  }

  EMO_KERNEL float* part_of(int which, int p) const {
    return parts + (which * capacity + p) * kNormParts;
  }

  // Sum of a row's parts: of its values (which = 0), or of squared deviations (1).
  EMO_KERNEL float all_parts(int which, int p) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kNormParts; ++i) sum += read(part_of(which, p) + i);
    return sum;
  }

  // Adds up term(value) over the channels of a part.
  template <class Term>
  EMO_KERNEL void sum_part(int which, int p, int of, const Term& term) const {
    float sum = 0.0f;
    for (int pair = of; 2 * pair < C; pair += kNormParts) {
      const Float2 x = widen(read_packed<Float2>(rows + p * stride + 2 * pair));
      sum += term(x.x) + (2 * pair + 1 < C ? term(x.y) : 0.0f);
    }
    write(part_of(which, p) + of, sum);
  }

  EMO_KERNEL float mean(int p) const { return all_parts(0, p) / static_cast<float>(C); }

  EMO_KERNEL void normalize_row(int p, int of, float eps) const {
    const float scale = inverse_root(all_parts(1, p) / static_cast<float>(C) + eps);
    for (int pair = of; pair < pairs(); pair += kNormParts) normalize_pair(p, pair, mean(p), scale);
  }
};

// The steps of a block whose program has rows(); rows that are not live(row) stay as they are.
template <class Each, class Live>
EMO_KERNEL void normalize_rows(Norm norm, float eps, const Each& each, const Live& live) {
  if (norm == Norm::kAffine) {
    each([&](auto& self) {
      self.rows().normalize_by_channel([&](int p) { return live(self, p); });
    });
  }
  if (norm != Norm::kLayer) return;
  const auto parts = [&](auto& self, const auto& visit) {
    self.rows().for_parts([&](int p) { return live(self, p); }, visit);
  };
  each([&](auto& self) {
    const auto rows = self.rows();
    parts(self, [&](int p, int of) { rows.sum_part(0, p, of, [](float x) { return x; }); });
  });
  each([&](auto& self) {
    const auto rows = self.rows();
    parts(self, [&](int p, int of) {
      const float mean = rows.mean(p);
      rows.sum_part(1, p, of, [&](float x) { return (x - mean) * (x - mean); });
    });
  });
  each([&](auto& self) {
    const auto rows = self.rows();
    parts(self, [&](int p, int of) { rows.normalize_row(p, of, eps); });
  });
}

}  // namespace emo_kernels::cuda
