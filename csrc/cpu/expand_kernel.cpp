// Computes  out = act(a), a = W norm(x) + b: the normalising, widening 1x1 convolution of a
//           training step.
// Tiling    a thread takes a contiguous share of the pixels, up to 224 at a time: their norm(x)
//           stays in the L2 cache while panels of output channels pass, each a GEMM whose result
//           is activated while it is in the L1 cache.
// Traffic   reads x once, writes out once; the packed weight passes once every 224 pixels.
// Numerics  sums in the type it computes in, in chunks of 240 terms; the same bits for any split.
// Limits    ungrouped.
#include "cpu/launch.h"
#include "cpu/norm_rows.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

template <class E>
struct Layout {
  using T = SumOf<E>;
  int64_t most;
  Blocked<E> weight;  // shared: the transpose, (C, M)
  T* bias;
  NormRows<T> norm;
  Blocked<E> n;  // own
  T* tile;

  Layout(const ExpandCall& c, Places& shared, Places& own)
      : most(most_pixels<T>(ceil_div(c.C, kPanel<T>) * kPanel<T> + kPanel<T>)),
        weight(Blocked<E>::at(shared, c.C, c.M)),
        bias(shared.take<T>(weight.panels() * kPanel<T>)),
        norm(NormRows<T>::at(c.norm, c.C, c.eps, most, shared, own)),
        n(Blocked<E>::at(own, most, c.C)),
        tile(own.take<T>((most + kMostGemmRows) * kPanel<T>)) {}
};

template <class E>
ScratchBytes scratch(const ExpandCall& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<E> layout(call, shared, own);
  return {shared.used, own.used};
}

// One panel of a into out, at the panel's first channel.
template <class T, class S>
void store_activated(Activation act, const T* tile, int64_t rows, int64_t channels, S* out,
                     int64_t M, int64_t next) {
  using V = Vec<T, kLanesOf<T>>;
  with_activation(act, [&](auto kind) {
    for (int64_t i = 0; i < rows; ++i) {
      each_lane_of<T>(channels, [&](int64_t lane, int64_t count) __attribute__((always_inline)) {
        S* const at = out + i * M + lane;
        fetch(at + next);
        const V a = load<V>(tile + i * kPanel<T> + lane);
        store_as(at, activate<T, decltype(kind)::value>(a), count);
      });
    }
  });
}

template <class T, class S>
void run(const ExpandCall& call, const Share& share) {
  constexpr int64_t P = kPanel<T>;
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  using E = TermOf<S>;
  const Layout<E> l(call, shared, own);
  const T *weight = static_cast<const T*>(call.weight), *bias = static_cast<const T*>(call.bias);
  const int64_t last = share_of(l.weight.panels(), share.thread + 1, share.threads);
  for (int64_t p = share_of(l.weight.panels(), share.thread, share.threads); p < last; ++p) {
    pack_transposed(weight, call.C, l.weight, p);
    copy_padded<T>(bias ? bias + p * P : nullptr, l.weight.channels(p), l.bias + p * P, P);
  }
  if (share.thread == 0) l.norm.fill(call.norm_weight, call.norm_bias, nullptr, nullptr);
  team_barrier();
  const S* const x = static_cast<const S*>(call.x);
  S* const out = static_cast<S*>(call.out);
  each_step(
      call.N * call.pixels, l.most, share.thread, share.threads, [&](int64_t first, int64_t rows) {
        l.norm.forward(x + first * call.C, rows, l.n);
        for (int64_t p = 0; p < l.weight.panels(); ++p) {
          product<E, false>({l.n.data, l.n.stride(), l.weight.panel(p), call.C, l.tile, rows,
                             l.bias + p * P, false},
                            l.weight.width(p));
          store_activated(call.act, l.tile, rows, l.weight.channels(p),
                          out + first * call.M + p * P, call.M, next_panel<T>(p, call.M, rows));
        }
      });
}

template <class T, class S>
constexpr Kernel<ExpandCall> kKernel = {scratch<TermOf<S>>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(ExpandCall, expand_kernel)

}  // namespace emo_kernels::cpu
