// What a batch norm takes its statistics from: the sums of y and of its square around a pivot.
#pragma once

#include "cpu/blocked.h"

namespace emo_kernels::cpu {
namespace {

// Adds `pixels` of a map, the first `stride` elements from the next: of each channel what is around
// `pivot`, in double.
template <class T, class S>
void add_moments(const S* y, int64_t pixels, int64_t stride, int64_t channels, const T* pivot,
                 double* sums, double* squares) {
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t begin = 0; begin < pixels; begin += kSumRows) {
    const int64_t end = min(pixels, begin + kSumRows);
    each_lane_of<T>(channels, [&](int64_t lane, int64_t count) __attribute__((always_inline)) {
      const Doubles<T> around(load<V>(pivot + lane));
      Doubles<T> sum(V{}), square(V{});
      for (int64_t i = begin; i < end; ++i) {
        Doubles<T> v(load_as<V>(y + i * stride + lane, count));
        unroll<Doubles<T>::kParts>(EMO_UNROLLED(k) { v.part[k] -= around.part[k]; });
        sum.add(v);
        square.add_product(v, v);
      }
      sum.add_to(sums + lane);
      square.add_to(squares + lane);
    });
  }
}

// Of one thread's pixels, channel by channel, around a pivot of its own: the mean of the pixels it
// sees first. The caller's, a running mean, may be d standard deviations from the batch's: squares
// around it, in the type of the map, would round to d^2 roundings of the variance.
template <class T>
struct Moments {
  T* pivot;  // whole vectors of channels, as what follows
  double *sums, *squares;

  static Moments at(Places& own, int64_t channels) {
    Moments moments;
    moments.pivot = own.take<T>(channels);
    moments.sums = own.take<double>(channels);
    moments.squares = own.take<double>(channels);
    return moments;
  }

  void clear(int64_t channels) const {
    fill_zero(pivot, channels);
    fill_zero(sums, channels);
    fill_zero(squares, channels);
  }

  // Begins with a thread's first pixels: y points at `channel`.
  template <class S>
  void begin(const S* y, int64_t pixels, int64_t stride, int64_t channel, int64_t channels) const {
    using V = Vec<T, kLanesOf<T>>;
    const T share = T(1) / static_cast<T>(pixels);
    each_lane_of<T>(channels, [&](int64_t lane, int64_t count) __attribute__((always_inline)) {
      V mean{};
      for (int64_t i = 0; i < pixels; ++i) {
        mean = fma(load_as<V>(y + i * stride + lane, count), splat<V>(share), mean);
      }
      mean = mean - mean == V{} ? mean : V{};  // what is not finite shows in the sums
      store(pivot + channel + lane, mean);
    });
    add_moments(y, pixels, stride, channels, pivot + channel, sums + channel, squares + channel);
  }

  // out (2, C): the threads' sums, in their order, around the caller's pivot; of `rows` of pixels
  // that they share.
  void publish(int64_t C, const void* around, double* out, int64_t rows, int64_t pixels,
               const Share& share) const {
    const T* const wanted = static_cast<const T*>(around);
    each_of_mine(C, share, [&](int64_t c) {
      double first = 0.0, second = 0.0;
      for (int t = 0; t < share.threads; ++t) {
        const int64_t mine =
            share_of(rows, t + 1, share.threads) - share_of(rows, t, share.threads);
        const double off = *of_thread(pivot + c, t, share) - (wanted ? double{wanted[c]} : 0.0);
        const double sum = *of_thread(sums + c, t, share), moved = off * (mine * pixels);
        first += sum + moved;
        second += *of_thread(squares + c, t, share) + off * (2.0 * sum + moved);
      }
      out[c] = first;
      out[C + c] = second;
    });
  }
};

}  // namespace
}  // namespace emo_kernels::cpu
