// Computes  the gradients of z = softmax(q k^T / sqrt(d)) v (window_attention) from g at z: with p
//           the softmax, dv = p^T g, dp = g v^T, ds = p (dp - sum p dp) / sqrt(d), dq = ds k, dk =
//           ds^T q, dn = dq Wq + dk Wk (+ dv where v is h), dWqk = [dq dk]^T h, then the norm's.
// Tiling    as the forward's; p is recomputed, nothing of token x token size is kept, and q and k
//           where the forward pass did not keep them.
// Traffic   reads grad, x (and v, q and k) once, writes dx (and dv) once.
// Numerics  as expand_backward's; the K half of the bias's gradient is zero and not computed.
// Limits    any window, head size and map.
#include "cpu/attention_windows.h"
#include "cpu/launch.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

using Call = AttentionBackwardCall;

template <class T>
struct Layout {
  WindowPlan plan;
  int64_t value_dim, padded;
  HeadWeights<T> weights;  // shared
  Blocked<T> back;         // shared: Wqk as (2C, C)
  NormRows<T> norm;
  T* first_dn;                        // shared: of the first partition where there are two
  double *dbias, *sums, *dv_padding;  // own: [padded], [2][padded], [M]
  Blocked<T> dweight;                 // own: (2C, C)
  int64_t* pixels;
  T* x;  // the rows gathered, dense
  Blocked<T> h, dn, q, k, v, g, dq, dk, dv, keys, values, p, ds;

  Layout(const Call& c, Places& shared, Places& own)
      : plan(c), value_dim((c.v ? c.M : c.C) / (c.C / c.head_dim)) {
    constexpr int64_t P = kPanel<T>;
    const int64_t rows = plan.rows, d = c.head_dim, queries = min(kQueries, plan.tokens);
    padded = ceil_div(c.C, P) * P;
    weights = HeadWeights<T>::at(shared, c.C, d, c.qk_weight && c.qk == nullptr);
    back = Blocked<T>::at(shared, c.qk_weight ? 2 * c.C : 0, c.C);
    norm = NormRows<T>::at(c.norm, c.C, c.eps, rows, shared, own);
    first_dn = shared.take<T>(c.windows == Windows::kBoth ? c.N * c.H * c.W * c.C : 0);
    dbias = own.take<double>(padded + P);
    sums = own.take<double>(2 * padded);
    dv_padding = own.take<double>(c.dv_padding ? c.M + P : 0);
    dweight = Blocked<T>::at(own, c.dqk_weight ? 2 * c.C : 0, c.C);
    pixels = own.take<int64_t>(rows);
    x = own.take<T>(rows * c.C);
    h = Blocked<T>::at(own, rows, c.C);
    dn = Blocked<T>::at(own, rows, c.C);
    q = Blocked<T>::at(own, rows, d);
    k = Blocked<T>::at(own, rows, d);
    dq = Blocked<T>::at(own, rows, d);
    dk = Blocked<T>::at(own, rows, d);
    v = Blocked<T>::at(own, rows, value_dim);
    g = Blocked<T>::at(own, rows, value_dim);
    dv = Blocked<T>::at(own, rows, value_dim);
    keys = Blocked<T>::at(own, d + P, plan.tokens);
    values = Blocked<T>::at(own, value_dim + P, plan.tokens);
    p = Blocked<T>::at(own, queries, plan.tokens);
    ds = Blocked<T>::at(own, queries, plan.tokens);
  }
};

template <class T>
ScratchBytes scratch(const Call& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<T> layout(call, shared, own);
  return {shared.used, own.used};
}

// to (tokens, columns of b) (+)= scores^T b over the queries, from rows of b on into rows of `to`.
template <class T>
void add_transposed(const Blocked<T>& scores, int64_t queries, const Blocked<T>& b,
                    const Blocked<T>& to, bool add) {
  constexpr int64_t P = kPanel<T>;
  for (int64_t t = 0; t < scores.panels(); ++t) {
    for (int64_t c = 0; c < to.panels(); ++c) {
      product<T, true>({scores.panel(t), 0, b.panel(c), queries, to.panel(c) + t * P * P,
                        scores.channels(t), nullptr, add},
                       to.width(c));
    }
  }
}

// dq, dk and dv of the window whose rows begin at `row`.
template <class T>
void attend_backward(const Layout<T>& l, int64_t row, int64_t d) {
  constexpr int64_t P = kPanel<T>;
  const int64_t tokens = l.plan.tokens;
  const T scale = static_cast<T>(1.0 / __builtin_sqrt(static_cast<double>(d)));
  transpose_rows(l.k, row, tokens, l.keys);
  transpose_rows(l.v, row, tokens, l.values);
  for (int64_t q0 = 0; q0 < tokens; q0 += kQueries) {
    const int64_t queries = min(kQueries, tokens - q0), first = row + q0;
    scores_of(l.q, first, queries, l.k, row, tokens, l.keys, l.p);
    scores_of(l.g, first, queries, l.v, row, tokens, l.values, l.ds);
    for (int64_t i = 0; i < queries; ++i) {
      softmax_row(l.p.data + i * P, tokens, l.p.stride(), scale);
      softmax_row_backward(l.p.data + i * P, l.ds.data + i * P, tokens, l.p.stride(), scale);
    }
    add_transposed(l.p, queries, from_row(l.g, first), from_row(l.dv, row), q0 > 0);
    add_transposed(l.ds, queries, from_row(l.q, first), from_row(l.dk, row), q0 > 0);
    multiply_all(l.ds.data, l.ds.stride(), tokens, queries, l.k, row, from_row(l.dq, first), false);
  }
}

// q and k of one head, as they were kept or out of h.
template <class T, class S>
void project(const Call& c, const Layout<T>& l, int64_t head, int64_t rows) {
  for (int64_t k = 0; k < 2; ++k) {
    const Blocked<T>& to = k == 0 ? l.q : l.k;
    if (c.qk) {
      gather(static_cast<const S*>(c.qk), 2 * c.C, k * c.C + head * c.head_dim, l.pixels, rows,
             static_cast<const T*>(c.qk_bias), to);
      continue;
    }
    if (c.qk_weight == nullptr) {
      take_slice(l.h, head * c.head_dim, rows, to);
      continue;
    }
    const Blocked<T> weight = l.weights.slot(head, k);
    for (int64_t p = 0; p < to.panels(); ++p) {
      product<T, false>({l.h.data, l.h.stride(), weight.panel(p), c.C, to.panel(p), rows,
                         l.weights.bias_of(head, k) + p * kPanel<T>, false},
                        to.width(p));
    }
  }
}

// What dq, dk and dv of one head send to h and to the weights.
template <class T, class S>
void collect(const Call& c, const Layout<T>& l, int64_t head, int64_t rows, bool add_dv) {
  constexpr int64_t P = kPanel<T>;
  const int64_t d = c.head_dim;
  for (int64_t k = 0; k < 2; ++k) {
    const Blocked<T>& from = k == 0 ? l.dq : l.dk;
    if (c.qk_weight == nullptr) {
      add_slice(from, head * d, rows, l.dn);
      continue;
    }
    const int64_t at = k * c.C + head * d;
    multiply_all(from.data, from.stride(), d, rows, l.back, at, l.dn, true);
    for (int64_t p = 0; c.dqk_weight && p < from.panels(); ++p) {
      multiply_transposed(from.panel(p), rows, from.channels(p), l.h, l.dweight, at + p * P);
    }
  }
  if (c.dqk_bias) {
    using V = Vec<T, kLanesOf<T>>;
    for (int64_t p = 0; p < l.dq.panels(); ++p) {
      alignas(64) double sums[kPanel<T>];
      fill_zero(sums, P);
      sum_rows<T>(rows, l.dq.channels(p), sums, nullptr,
                  [&](int64_t i, int64_t lane, int64_t, V& a, V&) __attribute__((always_inline)) {
                    a = load<V>(l.dq.panel(p) + i * P + lane);
                  });
      for (int64_t j = 0; j < l.dq.channels(p); ++j) l.dbias[head * d + p * P + j] += sums[j];
    }
  }
  if (c.v == nullptr) {
    add_slice(l.dv, head * d, rows, l.dn);
    return;
  }
  if (c.dv) scatter(l.dv, l.pixels, rows, add_dv, head * l.value_dim, static_cast<S*>(c.dv), c.M);
  for (int64_t i = 0; c.dv_padding && i < rows; ++i) {
    if (l.pixels[i] >= 0) continue;
    double* const to = l.dv_padding + head * l.value_dim;
    for (int64_t m = 0; m < l.value_dim; ++m) to[m] += l.dv.panel(m / P)[i * P + m % P];
  }
}

// From dn to dx and the norm's sums, or to where the second partition finds it.
template <class T, class S>
void finish(const Call& c, const Layout<T>& l, int64_t rows, bool first, bool last) {
  constexpr int64_t P = kPanel<T>;
  if (!last) {
    scatter(l.dn, l.pixels, rows, false, 0, l.first_dn, c.C);
    return;
  }
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t i = 0; i < rows; ++i) {
    T* const row = l.dn.data + i * P;
    if (l.pixels[i] < 0) {  // no pixel: no part in the sums
      l.norm.moments[i] = {};
      for (int64_t p = 0; p < l.dn.panels(); ++p) fill_zero(row + p * l.dn.stride(), P);
    } else if (!first) {
      const T* const from = l.first_dn + l.pixels[i] * c.C;
      each_lane_of<T>(c.C, [&](int64_t k, int64_t count) __attribute__((always_inline)) {
        T* const at = row + k / P * l.dn.stride() + k % P;
        store(at, load<V>(at) + load_as<V>(from + k, count));
      });
    }
  }
  if (c.sums) l.norm.add_sums(l.x, rows, l.dn, l.sums);
  if (c.dx == nullptr) return;
  const S* const residual = static_cast<const S*>(c.residual);
  for (int64_t i = 0; i < rows; ++i) {
    if (l.pixels[i] < 0) continue;
    const int64_t at = l.pixels[i] * c.C;
    l.norm.pixel_backward(l.x + i * c.C, i, l.dn.data + i * P, l.dn.stride(), c.behind_norm,
                          residual ? residual + at : nullptr, static_cast<S*>(c.dx) + at);
  }
}

template <class T, class S>
void run_windows(const Call& c, const Layout<T>& l, const WindowPlan& plan, bool is_first,
                 bool is_last, int64_t first, int64_t count) {
  constexpr int64_t P = kPanel<T>;
  const int64_t rows = count * plan.tokens, Z = c.v ? c.M : c.C;
  const S* const x = static_cast<const S*>(c.x);
  list_pixels(plan, first, count, l.pixels);
  for (int64_t i = 0; i < rows; ++i) {
    fetch_pixel(x, c.C, l.pixels, i, rows);
    T *const to = l.h.data + i * P, *const copy = l.x + i * c.C;
    if (l.pixels[i] >= 0) {
      const S* const from = x + l.pixels[i] * c.C;
      for (int64_t k = 0; k < c.C; ++k) copy[k] = value_of(from[k]);
      l.norm.pixel(copy, i, to, l.h.stride());
    } else {
      fill_zero(copy, c.C);
      for (int64_t p = 0; p < l.h.panels(); ++p) fill_zero(to + p * l.h.stride(), P);
    }
    for (int64_t p = 0; p < l.dn.panels(); ++p) fill_zero(l.dn.panel(p) + i * P, P);
  }
  for (int64_t head = 0; head < l.weights.heads; ++head) {
    project<T, S>(c, l, head, rows);
    const T* none = nullptr;
    gather(static_cast<const S*>(c.grad), Z, head * l.value_dim, l.pixels, rows, none, l.g);
    if (c.v) {
      gather(static_cast<const S*>(c.v), c.M, head * l.value_dim, l.pixels, rows,
             static_cast<const T*>(c.v_padding), l.v);
    } else {
      take_slice(l.h, head * c.head_dim, rows, l.v);
    }
    for (int64_t w = 0; w < count; ++w) attend_backward(l, w * plan.tokens, c.head_dim);
    collect<T, S>(c, l, head, rows, !is_first);
  }
  if (c.dx || c.sums) finish<T, S>(c, l, rows, is_first, is_last);
}

template <class T, class S>
void run(const Call& call, const Share& share) {
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<T> l(call, shared, own);
  if (call.qk_weight) {
    const T* const weight = static_cast<const T*>(call.qk_weight);
    if (call.qk == nullptr) {
      each_of_mine(l.weights.heads, share, [&](int64_t head) {
        l.weights.pack(weight, static_cast<const T*>(call.qk_bias), call.C, head);
      });
    }
    each_of_mine(l.back.panels(), share,
                 [&](int64_t p) { pack_straight(weight, 2 * call.C, l.back, p); });
  }
  if (share.thread == 0) {
    l.norm.fill(call.norm_weight, call.norm_bias, call.mean, call.invstd);
  }
  fill_zero(l.dbias, l.padded);
  fill_zero(l.sums, 2 * l.padded);
  if (call.dv_padding) fill_zero(l.dv_padding, call.M);
  if (call.dqk_weight) fill_zero(l.dweight.data, l.dweight.panels() * l.dweight.stride());
  team_barrier();
  each_partition(call, l.plan, [&](const WindowPlan& plan, bool first, bool last) {
    each_step(plan.windows, plan.group, share.thread, share.threads,
              [&](int64_t window, int64_t count) {
                run_windows<T, S>(call, l, plan, first, last, window, count);
              });
  });
  team_barrier();
  if (call.dqk_bias) {
    each_of_mine(call.C, share, [&](int64_t c) { call.dqk_bias[c] = total(l.dbias + c, share); });
  }
  if (call.dv_padding) {
    each_of_mine(call.M, share,
                 [&](int64_t m) { call.dv_padding[m] = total(l.dv_padding + m, share); });
  }
  if (call.sums) {
    each_of_mine(2 * call.C, share, [&](int64_t i) {
      call.sums[i] = total(l.sums + i / call.C * l.padded + i % call.C, share);
    });
  }
  if (call.dqk_weight) add_up(l.dweight, 2 * call.C, static_cast<T*>(call.dqk_weight), share);
}

template <class T, class S>
constexpr Kernel<Call> kKernel = {scratch<T>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(AttentionBackwardCall, window_attention_backward_kernel)

}  // namespace emo_kernels::cpu
