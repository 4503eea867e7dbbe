// Computes  the sums of a batch norm over a map's pixels, its gradient dx = c1 dz + c2 (x - mean)
//           + c3, the norm with an activation and what its gradient sums, and the channel means of
//           squeeze-excite, forward and backward.
// Tiling    a thread takes a contiguous share of the pixels, 32 of them at a time, a vector of
//           channels running down them.
// Traffic   one read of each operand, one write of the result; bound by memory.
// Numerics  the type it computes in; the batch norm's sums and the products in them in double, of
//           the others sums of 8 pixels, threads in order.
// Limits    none on sizes.
#include "cpu/blocked.h"
#include "cpu/launch.h"
#include "cpu/moments.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

// Each thread's own buffer: the (rows, C) doubles it sums into and what it sums around, rows padded
// to whole vectors.
template <class T>
struct PixelSums {
  double* data;
  T* pivot;
  int64_t stride, rows;

  PixelSums(const PixelsCall& call, Places& own)
      : stride(ceil_div(call.C, kLanesOf<T>) * kLanesOf<T>),
        rows(call.op == PixelsOp::kSqueeze ? call.N
             : call.sums                   ? 2
                                           : 0) {
    data = own.take<double>(rows * stride);
    pivot = own.take<T>(call.op == PixelsOp::kSums ? stride : 0);
  }
};

template <class T>
ScratchBytes pixels_scratch(const PixelsCall& call) {
  Places own{nullptr};
  const PixelSums<T> sums(call, own);
  return {0, own.used};
}

// f(image, first, count) for the runs of pixels within one image of a thread's share.
template <class F>
EMO_INLINE void each_run(int64_t images, int64_t pixels, int thread, int threads, F f) {
  const int64_t end = share_of(images * pixels, thread + 1, threads);
  for (int64_t p = share_of(images * pixels, thread, threads); p < end;) {
    const int64_t image = p / pixels, stop = min(end, (image + 1) * pixels);
    f(image, p, stop - p);
    p = stop;
  }
}

template <class T, class S>
void run_pixels(const PixelsCall& call, const Share& share) {
  using V = Vec<T, kLanesOf<T>>;
  const int64_t C = call.C;
  Places own{share.own + share.thread * share.own_bytes};
  const PixelSums<T> sums(call, own);
  fill_zero(sums.data, sums.rows * sums.stride);
  if (call.op == PixelsOp::kSums) {
    copy_padded<T>(static_cast<const T*>(call.pivot), C, sums.pivot, sums.stride);
  }
  const S *x = static_cast<const S*>(call.x), *grad = static_cast<const S*>(call.grad);
  const S* const residual = static_cast<const S*>(call.residual);
  const T* const rows = static_cast<const T*>(call.rows);
  T* const means = static_cast<T*>(call.means);
  S* const out = static_cast<S*>(call.out);
  const T inverse = T(1) / static_cast<T>(call.pixels);
  const auto row = [&](int r, int64_t lane, int64_t count) __attribute__((always_inline)) {
    return load_as<V>(rows + r * C + lane, count);
  };
  double *const first = sums.data, *const second = sums.data + sums.stride;
  each_run(
      call.N, call.pixels, share.thread, share.threads, [&](int64_t n, int64_t p, int64_t count) {
        for (int64_t begin = p; begin < p + count; begin += kSumRows) {
          const int64_t here = min(kSumRows, p + count - begin), at = begin * C;
          switch (call.op) {
            case PixelsOp::kSums:
              add_moments(x + at, here, C, C, sums.pivot, first, second);
              break;
            case PixelsOp::kBatchNormBackward:
              for (int64_t i = 0; i < here; ++i) {
                each_lane_of<T>(C, [&](int64_t lane, int64_t left) __attribute__((always_inline)) {
                  const int64_t k = at + i * C + lane;
                  const V centred = load_as<V>(x + k, left) - row(3, lane, left);
                  V v = fma(row(0, lane, left), load_as<V>(grad + k, left),
                            fma(row(1, lane, left), centred, row(2, lane, left)));
                  if (residual) v += load_as<V>(residual + k, left);
                  store_as(out + k, v, left);
                });
              }
              break;
            case PixelsOp::kSqueeze:
              sum_rows<T>(here, C, sums.data + n * sums.stride, nullptr,
                          [&](int64_t i, int64_t lane, int64_t left, V& a, V&)
                              __attribute__((always_inline)) {
                                a = silu<T>(fma(load_as<V>(x + at + i * C + lane, left),
                                                row(0, lane, left), row(1, lane, left)));
                              });
              break;
            case PixelsOp::kSqueezeBackward:
              sum_rows<T>(here, C, first, second,
                          [&](int64_t i, int64_t lane, int64_t left, V& a,
                              V& b) __attribute__((always_inline)) {
                            const int64_t k = at + i * C + lane;
                            const V y = load_as<V>(x + k, left);
                            V value, slope;
                            silu_and_slope<T>(fma(y, row(0, lane, left), row(1, lane, left)), value,
                                              slope);
                            const V mean_grad = load_as<V>(means + n * C + lane, left) * inverse;
                            const V dz = fma(mean_grad, slope, load_as<V>(grad + k, left));
                            store_as(out + k, dz, left);
                            a = dz;
                            b = (y - row(2, lane, left)) * row(3, lane, left);
                          });
              break;
            case PixelsOp::kNormAct:
              with_activation(call.act, [&](auto act) {
                for (int64_t i = at; i < at + here * C; i += C) {
                  each_lane_of<T>(
                      C, [&](int64_t lane, int64_t left) __attribute__((always_inline)) {
                        const V centred = load_as<V>(x + i + lane, left) - row(2, lane, left);
                        const V z = fma(centred, row(0, lane, left), row(1, lane, left));
                        store_as(out + i + lane, activate<T, act.value>(z), left);
                      });
                }
              });
              break;
            case PixelsOp::kNormActSums:
              with_activation(call.act, [&](auto act) {
                sum_rows<T, Sums::kMoments>(
                    here, C, first, second,
                    [&](int64_t i, int64_t lane, int64_t left, V& a, V& b)
                        __attribute__((always_inline)) {
                          const int64_t k = at + i * C + lane;
                          const V centred = load_as<V>(x + k, left) - row(2, lane, left);
                          a = load_as<V>(grad + k, left);
                          if constexpr (act.value != Activation::kNone) {
                            const V z = fma(centred, row(0, lane, left), row(1, lane, left));
                            a *= activate_slope<T, act.value>(z);
                          }
                          b = centred * row(3, lane, left);
                        });
              });
              break;
          }
        }
      });
  if (sums.rows == 0) return;
  team_barrier();
  const int64_t total = sums.rows * C;
  const int64_t end = share_of(total, share.thread + 1, share.threads);
  for (int64_t i = share_of(total, share.thread, share.threads); i < end; ++i) {
    double sum = 0.0;
    for (int t = 0; t < share.threads; ++t) {
      const auto* other = reinterpret_cast<const double*>(share.own + t * share.own_bytes);
      sum += other[i / C * sums.stride + i % C];
    }
    if (call.op == PixelsOp::kSqueeze) {
      means[i] = static_cast<T>(sum / static_cast<double>(call.pixels));
    } else {
      call.sums[i] = sum;
    }
  }
}

template <class T, class S>
constexpr Kernel<PixelsCall> kKernel = {pixels_scratch<T>, run_pixels<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(PixelsCall, pixels_kernel)

}  // namespace emo_kernels::cpu
