// Computes  z = softmax(q k^T / sqrt(d)) v in windows of h = norm(x), [q; k] = Wqk h + bqk, for v =
//           h or a map given (the expanded values). Padded pixels are zero rows of h: live keys,
//           dropped as queries.
// Tiling    windows are gathered, up to 196 rows at a time; per head q and k are GEMMs over all of
//           them, scores and result GEMMs over one window and up to 112 queries: all in L2.
// Traffic   reads x (and v) once, writes z once, and q and k where they are kept.
// Numerics  the row maximum is subtracted; the same bits for any split.
// Limits    any window, head size and map.
#include "cpu/attention_windows.h"
#include "cpu/launch.h"
#include "cpu/threads.h"

namespace emo_kernels::cpu {
namespace {

using Call = AttentionCall;

template <class T>
struct Layout {
  WindowPlan plan;
  int64_t value_dim;
  HeadWeights<T> weights;  // shared
  NormRows<T> norm;
  int64_t* pixels;  // own, as what follows
  Blocked<T> h, q, k, v, keys, scores, z;

  Layout(const Call& c, Places& shared, Places& own)
      : plan(c), value_dim((c.v ? c.M : c.C) / (c.C / c.head_dim)) {
    weights = HeadWeights<T>::at(shared, c.C, c.head_dim, c.qk_weight != nullptr);
    norm = NormRows<T>::at(c.norm, c.C, c.eps, plan.rows, shared, own);
    pixels = own.take<int64_t>(plan.rows);
    h = Blocked<T>::at(own, plan.rows, c.C);
    q = Blocked<T>::at(own, plan.rows, c.head_dim);
    k = Blocked<T>::at(own, plan.rows, c.head_dim);
    v = Blocked<T>::at(own, plan.rows, value_dim);
    keys = Blocked<T>::at(own, c.head_dim + kPanel<T>, plan.tokens);
    scores = Blocked<T>::at(own, min(kQueries, plan.tokens), plan.tokens);
    z = Blocked<T>::at(own, plan.rows, value_dim);
  }
};

template <class T>
ScratchBytes scratch(const Call& call) {
  Places shared{nullptr}, own{nullptr};
  const Layout<T> layout(call, shared, own);
  return {shared.used, own.used};
}

// z = softmax(q k^T) v for the window whose rows begin at `row`.
template <class T>
void attend(const Layout<T>& l, int64_t row, int64_t d) {
  constexpr int64_t P = kPanel<T>;
  const int64_t tokens = l.plan.tokens;
  const T scale = static_cast<T>(1.0 / __builtin_sqrt(static_cast<double>(d)));
  transpose_rows(l.k, row, tokens, l.keys);
  for (int64_t q0 = 0; q0 < tokens; q0 += kQueries) {
    const int64_t queries = min(kQueries, tokens - q0);
    scores_of(l.q, row + q0, queries, l.k, row, tokens, l.keys, l.scores);
    for (int64_t i = 0; i < queries; ++i) {
      softmax_row(l.scores.data + i * P, tokens, l.scores.stride(), scale);
    }
    multiply_all(l.scores.data, l.scores.stride(), tokens, queries, l.v, row,
                 from_row(l.z, row + q0), false);
  }
}

template <class T, class S>
void run_windows(const Call& c, const Layout<T>& l, const WindowPlan& plan, bool add, int64_t first,
                 int64_t count) {
  const int64_t rows = count * plan.tokens, d = c.head_dim, Z = c.v ? c.M : c.C;
  const S* const x = static_cast<const S*>(c.x);
  constexpr int64_t P = kPanel<T>;
  list_pixels(plan, first, count, l.pixels);
  for (int64_t i = 0; i < rows; ++i) {
    fetch_pixel(x, c.C, l.pixels, i, rows);
    T* const to = l.h.data + i * P;
    if (l.pixels[i] >= 0) {
      l.norm.pixel(x + l.pixels[i] * c.C, i, to, l.h.stride());
    } else {
      for (int64_t p = 0; p < l.h.panels(); ++p) fill_zero(to + p * l.h.stride(), P);
    }
  }
  for (int64_t head = 0; head < l.weights.heads; ++head) {
    for (int64_t k = 0; k < 2; ++k) {
      const Blocked<T>& to = k == 0 ? l.q : l.k;
      if (c.qk_weight == nullptr) {
        take_slice(l.h, head * d, rows, to);
        continue;
      }
      const Blocked<T> weight = l.weights.slot(head, k);
      for (int64_t p = 0; p < to.panels(); ++p) {
        product<T, false>({l.h.data, l.h.stride(), weight.panel(p), c.C, to.panel(p), rows,
                           l.weights.bias_of(head, k) + p * P, false},
                          to.width(p));
      }
    }
    if (c.qk && !add) {
      scatter(l.q, l.pixels, rows, false, head * d, static_cast<S*>(c.qk), 2 * c.C);
      scatter(l.k, l.pixels, rows, false, c.C + head * d, static_cast<S*>(c.qk), 2 * c.C);
    }
    if (c.v) {
      gather(static_cast<const S*>(c.v), c.M, head * l.value_dim, l.pixels, rows,
             static_cast<const T*>(c.v_padding), l.v);
    } else {
      take_slice(l.h, head * d, rows, l.v);
    }
    for (int64_t w = 0; w < count; ++w) attend(l, w * plan.tokens, d);
    scatter(l.z, l.pixels, rows, add, head * l.value_dim, static_cast<S*>(c.out), Z);
  }
}

template <class T, class S>
void run(const Call& call, const Share& share) {
  Places shared{share.shared}, own{share.own + share.thread * share.own_bytes};
  const Layout<T> l(call, shared, own);
  if (call.qk_weight) {
    each_of_mine(l.weights.heads, share, [&](int64_t head) {
      l.weights.pack(static_cast<const T*>(call.qk_weight), static_cast<const T*>(call.qk_bias),
                     call.C, head);
    });
  }
  if (share.thread == 0) l.norm.fill(call.norm_weight, call.norm_bias, nullptr, nullptr);
  team_barrier();
  each_partition(call, l.plan, [&](const WindowPlan& plan, bool first, bool) {
    each_step(plan.windows, plan.group, share.thread, share.threads,
              [&](int64_t window, int64_t count) {
                run_windows<T, S>(call, l, plan, !first, window, count);
              });
  });
}

template <class T, class S>
constexpr Kernel<Call> kKernel = {scratch<T>, run<T, S>};

}  // namespace

EMO_DEFINE_KERNEL(AttentionCall, window_attention_kernel)

}  // namespace emo_kernels::cpu
