// Computes  out = W mean_p(LN(x_p)) + b: layer norm over the channels of every pixel, mean over the
//           pixels, linear head: the end of EMO, SPEC section 2.
// Tiling    a thread sums whole rows of pixels, then takes a share of the outputs: 4 of them by 4
//           images stay in registers over all channels.
// Traffic   reads x and W once: EMO-5M at 224, batch 1: 1.2 MB for 0.6 MFLOP, nearly all of it W.
// Numerics  rows are summed in their order, whatever the threads; the norm's weight and bias are
//           applied to the mean. In the element type.
// Limits    fp32 and bf16 (fp64 at portable width); weights in the dtype of the map.
#include "cpu/blocked.h"
#include "cpu/launch.h"
#include "cpu/normalize.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

template <class T>
struct Layout {
  int64_t columns;  // of a row of sums: the channels, filled up to whole vectors
  T *sums, *means;  // shared: (N, H, columns), (N, columns)

  Layout(const NormPoolLinearCall& c, Places& shared) {
    columns = ceil_div(c.C, kLanesOf<T>) * kLanesOf<T>;
    sums = shared.take<T>(c.N * c.H * columns);
    means = shared.take<T>(c.N * columns);
  }
};

template <class T>
ScratchBytes scratch(const NormPoolLinearCall& call) {
  Places shared{nullptr};
  const Layout<T> layout(call, shared);
  return {shared.used, 0};
}

// The sum over a row's pixels of (x - mean) / sqrt(var + eps).
template <class T, class S>
void sum_row(const S* x, const NormPoolLinearCall& c, T* sums, int64_t columns) {
  using V = Vec<T, kLanesOf<T>>;
  fill_zero(sums, columns);
  for (int64_t first = 0; first < c.W; first += kNormPixels, x += kNormPixels * c.C) {
    const int64_t pixels = min(kNormPixels, c.W - first);
    PixelMoments<T> moments[kNormPixels];
    for (int64_t i = 0; i < pixels; ++i) {
      moments[i] = pixel_moments<T>(x + i * c.C, c.C, static_cast<T>(c.eps));
    }
    for (int64_t at = 0; at < c.C; at += kLanesOf<T>) {
      V sum = load<V>(sums + at);
      for (int64_t i = 0; i < pixels; ++i) {
        const V v = load_as<V>(x + i * c.C + at, c.C - at);
        sum += normalize<Norm::kLayer>(v, moments[i], splat<V>(T(1)), V{});
      }
      store(sums + at, sum);
    }
  }
}

// The mean over an image's pixels from the sums of its rows, behind the norm's affine; zero in the
// columns past the channels.
template <class T, class S>
void mean_of_rows(const T* sums, const NormPoolLinearCall& c, T* mean, int64_t columns) {
  using V = Vec<T, kLanesOf<T>>;
  const auto *const weight = static_cast<const S*>(c.norm_weight), *const bias =
                                                                       static_cast<const S*>(
                                                                           c.norm_bias);
  const V pixels = splat<V>(static_cast<T>(c.H * c.W));
  for (int64_t at = 0; at < columns; at += kLanesOf<T>) {
    const int64_t count = c.C - at;
    V sum{};
    for (int64_t y = 0; y < c.H; ++y) sum += load<V>(sums + y * columns + at);
    const V scale = weight ? load_as<V>(weight + at, count) : splat<V>(T(1));
    const V shift = bias ? load_as<V>(bias + at, count) : V{};
    const V v = fma(sum / pixels, scale, shift);
    store(mean + at, count < kLanesOf<T> ? first_lanes<V, T>(v, count) : v);
  }
}

// kOutputs outputs of kImages images, from the first of each on.
template <class T, class S, int kOutputs, int kImages>
void head_tile(const NormPoolLinearCall& c, const T* means, int64_t columns, int64_t output,
               int64_t image) {
  using V = Vec<T, kLanesOf<T>>;
  const S* const weight = static_cast<const S*>(c.weight) + output * c.C;
  V acc[kOutputs][kImages] = {};
  for (int64_t at = 0; at < c.C; at += kLanesOf<T>) {
    V mean[kImages];
    unroll<kImages>(EMO_UNROLLED(n) { mean[n] = load<V>(means + (image + n) * columns + at); });
    unroll<kOutputs>(EMO_UNROLLED(o) {
      const V row = load_as<V>(weight + o * c.C + at, c.C - at);
      unroll<kImages>(EMO_UNROLLED(n) { acc[o][n] = fma(row, mean[n], acc[o][n]); });
    });
  }
  const S* const bias = static_cast<const S*>(c.bias);
  for (int o = 0; o < kOutputs; ++o) {
    const T start = bias ? static_cast<T>(value_of(bias[output + o])) : T(0);
    for (int n = 0; n < kImages; ++n) {
      S* const out = static_cast<S*>(c.out) + (image + n) * c.O + output + o;
      store_as(out, splat<V>(sum_lanes<V, T>(acc[o][n]) + start), 1);
    }
  }
}

constexpr int kTile = 4;  // outputs, and images

template <class T, class S, int kOutputs>
void head_outputs(const NormPoolLinearCall& c, const T* means, int64_t columns, int64_t output) {
  int64_t n = 0;
  for (; n + kTile <= c.N; n += kTile) {
    head_tile<T, S, kOutputs, kTile>(c, means, columns, output, n);
  }
  for (; n < c.N; ++n) head_tile<T, S, kOutputs, 1>(c, means, columns, output, n);
}

template <class T, class S>
void run(const NormPoolLinearCall& c, const Share& share) {
  Places shared{share.shared};
  const Layout<T> l(c, shared);
  each_of_mine(c.N * c.H, share, [&](int64_t row) {
    sum_row(static_cast<const S*>(c.x) + row * c.W * c.C, c, l.sums + row * l.columns, l.columns);
  });
  team_barrier();
  each_of_mine(c.N, share, [&](int64_t n) {
    mean_of_rows<T, S>(l.sums + n * c.H * l.columns, c, l.means + n * l.columns, l.columns);
  });
  team_barrier();
  each_of_mine(ceil_div(c.O, kTile), share, [&](int64_t tile) {
    int64_t output = tile * kTile;
    if (output + kTile <= c.O) return head_outputs<T, S, kTile>(c, l.means, l.columns, output);
    for (; output < c.O; ++output) head_outputs<T, S, 1>(c, l.means, l.columns, output);
  });
}

template <class T, class S>
constexpr Kernel<NormPoolLinearCall> kKernel = {scratch<T>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(NormPoolLinearCall, norm_pool_linear_kernel)

}  // namespace emo_kernels::cpu
