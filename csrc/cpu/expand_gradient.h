// The gradient of an expansion, panel by panel of expanded channels of some pixels: what comes in
// front of da, the gradient at a = W n + b, and what is made of it.
//
// n = norm(x) and dn stay in the L2 cache while the panels pass; da of one panel feeds both
// dn = W^T da and dW = da^T n, and is gone.
#pragma once

#include "cpu/launch.h"
#include "cpu/norm_rows.h"

namespace emo_kernels::cpu {
namespace {

template <class E>
struct ExpandGradient {
  using T = SumOf<E>;
  static constexpr int64_t P = kPanel<T>;
  int64_t most, panels;          // pixels at a time; of expanded channels
  Blocked<E> forward, backward;  // shared: W^T as (C, M), W as (M, C)
  T* bias;
  NormRows<T> norm;
  double *dbias, *sums;    // own: [panels of M * P], [2][panels of C * P]
  Blocked<T> dweight, dn;  // own: (M, C), (pixels, C)
  Blocked<E> n, n_pairs;   // own
  T* a;                    // own: a panel's tile
  E *da, *da_pairs;        // own: da is a where operands are of the sums' type

  ExpandGradient(const ExpandBackwardCall& c, int64_t pixels, Places& shared, Places& own)
      : most(pixels), panels(ceil_div(c.M, P)) {
    forward = Blocked<E>::at(shared, c.C, c.slope ? 0 : c.M);
    backward = Blocked<E>::at(shared, c.M, c.C);
    bias = shared.take<T>(panels * P);
    dbias = own.take<double>(panels * P);
    sums = own.take<double>(2 * backward.panels() * P);
    dweight = Blocked<T>::at(own, c.dweight ? c.M : 0, c.C);
    norm = NormRows<T>::at(c.norm, c.C, c.eps, most, shared, own);
    n = Blocked<E>::at(own, most, c.C);
    n_pairs = Blocked<E>::at(own, kTerms<E> > 1 ? most : 0, c.C);
    dn = Blocked<T>::at(own, most, c.C);
    a = own.take<T>((most + kMostGemmRows) * P);
    if constexpr (kTerms<E> == 1) {
      da = da_pairs = a;
    } else {
      da = own.take<E>((most + kMostGemmRows) * P);
      da_pairs = own.take<E>((most + kMostGemmRows) * P);
    }
  }

  // This thread's share of the packed weights, and zeros where it sums. Before a barrier.
  void prepare(const ExpandBackwardCall& c, const Share& share) const {
    const T *weight = static_cast<const T*>(c.weight), *b = static_cast<const T*>(c.bias);
    if (c.slope == nullptr) {
      each_of_mine(panels, share, [&](int64_t p) {
        pack_transposed(weight, c.C, forward, p);
        copy_padded<T>(b ? b + p * P : nullptr, forward.channels(p), bias + p * P, P);
      });
    }
    each_of_mine(backward.panels(), share,
                 [&](int64_t p) { pack_straight(weight, c.M, backward, p); });
    if (share.thread == 0) norm.fill(c.norm_weight, c.norm_bias, c.mean, c.invstd);
    fill_zero(dbias, panels * P);
    fill_zero(sums, 2 * backward.panels() * P);
    if (c.dweight) fill_zero(dweight.data, dweight.panels() * dweight.stride());
  }

  // The pixels at hand: `rows` from `first` on. Gives n as the transposed product takes it.
  template <class S>
  Blocked<E> normalize(const ExpandBackwardCall& c, int64_t first, int64_t rows) const {
    norm.forward(static_cast<const S*>(c.x) + first * c.C, rows, n);
    return c.dweight ? across(n, rows, n_pairs) : n;
  }

  // a of panel p.
  void activation(const ExpandBackwardCall& c, int64_t p, int64_t rows) const {
    const int64_t width = panel_width<T>(min<int64_t>(P, c.M - p * P));
    product<E, false>({n.data, n.stride(), forward.panel(p), c.C, a, rows, bias + p * P, false},
                      width);
  }

  // What da of panel p adds to dn and dW; `ahead` is fetched meanwhile.
  void multiply(const ExpandBackwardCall& c, int64_t p, int64_t rows, const Blocked<E>& n_across,
                PixelsAhead* ahead = nullptr) const {
    const int64_t channels = min<int64_t>(P, c.M - p * P);
    if (c.dx || c.sums) multiply_all(da, 0, channels, rows, backward, p * P, dn, p > 0, ahead);
    if (c.dweight == nullptr) return;
    multiply_transposed(across<E>(da, rows, channels, da_pairs), rows, channels, n_across, dweight,
                        p * P, ahead);
  }

  // From dn the norm's own gradient, and its sums.
  template <class S>
  void finish(const ExpandBackwardCall& c, int64_t first, int64_t rows) const {
    if (!c.dx && !c.sums) return;
    const S* const x = static_cast<const S*>(c.x) + first * c.C;
    if (c.norm_grad) add_norm_grad(static_cast<const S*>(c.norm_grad) + first * c.C, rows);
    if (c.sums) norm.add_sums(x, rows, dn, sums);
    if (c.dx == nullptr) return;
    const S* const residual = static_cast<const S*>(c.residual);
    S* const dx = static_cast<S*>(c.dx) + first * c.C;
    for (int64_t i = 0; i < rows; ++i) {
      norm.pixel_backward(x + i * c.C, i, dn.data + i * P, dn.stride(), c.behind_norm,
                          residual ? residual + (first + i) * c.C : nullptr, dx + i * c.C);
    }
  }

  // What the threads have summed, this thread's share of it. Behind a barrier.
  void reduce(const ExpandBackwardCall& c, const Share& share) const {
    if (c.dbias) {
      each_of_mine(c.M, share, [&](int64_t m) { c.dbias[m] = total(dbias + m, share); });
    }
    if (c.sums) {
      each_of_mine(c.C, share, [&](int64_t i) {
        c.sums[i] = total(sums + i, share);
        c.sums[c.C + i] = total(sums + backward.panels() * P + i, share);
      });
    }
    if (c.dweight) add_up(dweight, c.M, static_cast<T*>(c.dweight), share);
  }

 private:
  template <class S>
  void add_norm_grad(const S* map, int64_t rows) const {
    using V = Vec<T, kLanesOf<T>>;
    for (int64_t i = 0; i < rows; ++i, map += dn.columns) {
      each_lane_of<T>(dn.columns, [&](int64_t c, int64_t count) __attribute__((always_inline)) {
        T* const at = dn.panel(c / P) + i * P + c % P;
        store(at, load<V>(at) + load_as<V>(map + c, count));
      });
    }
  }
};

}  // namespace
}  // namespace emo_kernels::cpu
