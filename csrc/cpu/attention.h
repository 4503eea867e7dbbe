// Computes  z = softmax(q k^T / sqrt(d)) v inside windows of h = norm(x), [q; k] = Wqk h + bqk, for
//           v = h (attention before the expansion) or v = act(Wv h + bv) (behind it). Padded pixels
//           of a window are zero rows of h: q = bq, k = bk, live keys, dropped as queries.
// Tiling    one head of one window at a time, queries in blocks of 56; all operands in L2.
// Traffic   reads x once a thread, writes z once; stage 3 of EMO-5M: 0.25 MB for 27 MFLOP.
// Numerics  the row maximum is subtracted; exp by the polynomial of activation.h; no atomics. Where
//           the GEMMs multiply bf16, h, q, k, v and the softmax are rounded to it, as in eager.
// Limits    ungrouped v; any window, head size and map.
#pragma once

#include "cpu/gemm.h"
#include "cpu/irmb_plan.h"
#include "cpu/normalize.h"
#include "cpu/pack.h"
#include "cpu/panels.h"
#include "cpu/row_sum.h"

namespace emo_kernels::cpu {
namespace {

template <class Ty>
class Attention {
 public:
  using T = typename Ty::T;
  using Map = typename Ty::Map;
  using Term = typename Ty::Term;

  Attention(const IrmbPlan& plan, T* shared, T* own, int64_t* offsets)
      : plan_(plan),
        a_(plan.attention),
        call_(plan.call),
        shared_(shared),
        own_(own),
        offsets_(offsets),
        pixels_(offsets + a_.offset_rows),
        rows_(pixels_ + a_.tokens) {
    norm_affine<T>(call_, own_ + a_.norm_scale, own_ + a_.norm_shift);
    for (int64_t i = 0; i < kPanel<T>; ++i) own_[a_.no_bias + i] = T(0);
  }

  Ahead ahead;  // fetched while heads are projected

  // Packs into the shared buffer: slot 2 h the queries of head h, 2 h + 1 its keys and its values.
  void pack(int64_t slot);

  // Attends in units [u0, u1) of one partition: image, window, head, the head running fastest.
  // The result is added to what z holds where `add`.
  void run(int64_t image0, int64_t u0, int64_t u1, bool grid, bool add, int thread);

 private:
  void fetch_next(int64_t slot);
  void enter_window(int64_t image, int64_t window, bool grid);
  template <class R>
  void project(int64_t at, int64_t packed, int64_t bias, int64_t channels, Activation act, R* out,
               bool as_values);
  void transpose_keys(const Term* k);
  template <class R>
  void copy_slices(const T* rows, R* out, bool as_values);
  void make_values(int64_t head);
  void attend(Map* z, bool add, int64_t nowhere);
  void softmax_row(T* scores, Term* weights);

  static Term* terms(T* place) { return reinterpret_cast<Term*>(place); }
  // Whether one panel holds a head's queries and, behind them, its keys.
  bool joined() const {
    const int64_t d = a_.head_dim;
    return call_.qk_weight.data != nullptr && 2 * d <= kPanel<T> && d % kTerms<Term> == 0;
  }
  int64_t d_panels() const { return ceil_div(a_.head_dim, kPanel<T>); }
  int64_t value_width(int64_t panel) const {
    return panel_width<T>(a_.value_dim - panel * kPanel<T>);
  }

  const IrmbPlan& plan_;
  const AttentionPlan& a_;
  const IrmbCall& call_;
  T* const shared_;
  T* const own_;
  int64_t* const offsets_;  // where a GEMM puts its rows
  int64_t* const pixels_;   // of the window's tokens in the image; -1: padding
  int64_t* const rows_;     // of the window's tokens in z
};

// ---- packing ----------------------------------------------------------------------------------

// Rows [row, row + channels) of a projection from C channels into panels [panel][depth][width],
// where depth is C filled up to whole lanes; biases padded.
template <class T, class E>
void pack_projection(const Param& weight, const Param& bias, int64_t row, int64_t channels,
                     int64_t C, int64_t depth, E* packed, T* packed_bias) {
  for (int64_t at = 0; at < channels; at += kPanel<T>) {
    const int64_t left = channels - at, here = min<int64_t>(kPanel<T>, left);
    with_elements<T>(weight, [&](auto* elements) {
      pack_panel<E>(elements + (row + at) * C, here, C, packed + at * depth, panel_width<T>(left));
    });
    copy_elements<T>(bias, row + at, here, packed_bias + at, kPanel<T>);
  }
}

// The d rows of queries from `row` on and the keys' C below them, side by side in one panel.
template <class T, class E>
void pack_joined(const Param& weight, const Param& bias, int64_t row, int64_t d, int64_t C,
                 E* packed, T* packed_bias) {
  const int64_t width = panel_width<T>(2 * d);
  with_elements<T>(weight, [&](auto* elements) {
    pack_panel<E>(elements + row * C, d, C, packed, d, C, width);
    pack_panel<E>(elements + (C + row) * C, d, C, packed + d * kTerms<E>, width - d, C, width);
  });
  copy_elements<T>(bias, row, d, packed_bias, d);
  copy_elements<T>(bias, C + row, d, packed_bias + d, kPanel<T> - d);
}

// The queries' and keys' weights that are packed next, while these are: they come from memory.
template <class Ty>
void Attention<Ty>::fetch_next(int64_t slot) {
  const int64_t C = call_.C, d = a_.head_dim, head = slot / 2 + 1, k = slot % 2;
  if (call_.qk_weight.data == nullptr || head >= a_.heads) return;
  with_elements<T>(call_.qk_weight, [&](auto* weight) {
    const auto* const rows = weight + (k * C + head * d) * C;
    Ahead(rows, rows + d * C).fetch_all();
    if (joined()) Ahead(rows + C * C, rows + (C + d) * C).fetch_all();  // one slot packs both
  });
}

template <class Ty>
void Attention<Ty>::pack(int64_t slot) {
  const int64_t C = call_.C, depth = plan_.depth(C), head = slot / 2, k = slot % 2;
  const int64_t d = a_.head_dim, step = d_panels() * kPanel<T>;
  const int64_t v_step = ceil_div(a_.value_dim, kPanel<T>) * kPanel<T>;
  Term* const weight = terms(shared_ + a_.qk_weight) + slot * step * depth;
  T* const bias = shared_ + a_.qk_bias + slot * step;
  if (!joined() || k == 0) fetch_next(slot);
  if (joined()) {
    if (k == 0) pack_joined(call_.qk_weight, call_.qk_bias, head * d, d, C, weight, bias);
  } else if (call_.qk_weight.data) {
    pack_projection(call_.qk_weight, call_.qk_bias, k * C + head * d, d, C, depth, weight, bias);
  }
  if (a_.values_expanded && k == 1) {
    pack_projection(call_.v_weight, call_.v_bias, head * a_.value_dim, a_.value_dim, C, depth,
                    terms(shared_ + a_.v_weight) + head * v_step * depth,
                    shared_ + a_.v_bias + head * v_step);
  }
}

// ---- one window -------------------------------------------------------------------------------

// Lists the window's pixels and normalises them, as rows and as panels; padding is zero.
template <class Ty>
void Attention<Ty>::enter_window(int64_t image, int64_t window, bool grid) {
  const int64_t C = call_.C, P = kPanel<T>, i = window / a_.n2, j = window % a_.n2;
  const T *scale = own_ + a_.norm_scale, *shift = own_ + a_.norm_shift;
  const Map* x = static_cast<const Map*>(call_.x) + image * call_.H * call_.W * C;
  const T eps = static_cast<T>(call_.norm_eps);
  for (int64_t t = 0; t < a_.tokens; ++t) {
    const int64_t a = t / a_.ww, b = t % a_.ww;
    const int64_t y = grid ? a * a_.n1 + i : i * a_.wh + a;
    const int64_t column = grid ? b * a_.n2 + j : j * a_.ww + b;
    const bool inside = y < call_.H && column < call_.W;
    pixels_[t] = inside ? y * call_.W + column : -1;
    T* const row = own_ + a_.h_rows + t * a_.row_stride;
    if (!inside) {
      for (int64_t c = 0; c < a_.row_stride; ++c) row[c] = T(0);
    } else if (call_.norm == Norm::kLayer) {
      normalize_pixel<T, Norm::kLayer>(x + pixels_[t] * C, C, scale, shift, eps, row, P);
    } else if (call_.norm == Norm::kAffine) {
      normalize_pixel<T, Norm::kAffine>(x + pixels_[t] * C, C, scale, shift, eps, row, P);
    } else {
      normalize_pixel<T, Norm::kNone>(x + pixels_[t] * C, C, scale, shift, eps, row, P);
    }
    normalize_pixel<T, Norm::kNone>(row, C, scale, shift, eps, terms(own_ + a_.h_panels) + t * P,
                                    (a_.tokens + kMostGemmRows) * P);
  }
}

// out = act(W h + b) for every token: rows of one panel each, or (as_values) of its own width.
template <class Ty>
template <class R>
void Attention<Ty>::project(int64_t at, int64_t packed, int64_t bias, int64_t channels,
                            Activation act, R* out, bool as_values) {
  const int64_t C = call_.C, P = kPanel<T>, room = a_.tokens + kMostGemmRows;
  for (int64_t c = 0; c < channels; c += P) {
    const int64_t width = panel_width<T>(channels - c), stride = as_values ? width : P;
    for (int64_t t = 0; t < room; ++t) offsets_[t] = t * stride;
    const ExpandTile<Term, R> tile{terms(own_ + a_.h_panels),
                                   room * P,
                                   terms(shared_ + packed) + (at + c) * plan_.depth(C),
                                   C,
                                   shared_ + bias + at + c,
                                   out + c / P * room * P,
                                   offsets_,
                                   &ahead};
    with_shape<T>(width, [&](auto shape) { expand_pixels<decltype(shape)>(act, tile, a_.tokens); });
  }
}

// keys as [panel of tokens][head_dim][width]: the B operand of q k^T.
template <class Ty>
void Attention<Ty>::transpose_keys(const Term* k) {
  const int64_t P = kPanel<T>, room = a_.tokens + kMostGemmRows, d = a_.head_dim;
  for (int64_t t = 0; t < a_.tokens; t += P) {
    const int64_t left = a_.tokens - t, width = panel_width<T>(left);
    for (int64_t c = 0; c < d; c += P) {
      pack_panel<Term>(k + (c / P * room + t) * P, min(P, left), min(P, d - c),
                       terms(own_ + a_.keys) + t * plan_.depth(d) + c * width, width, P);
    }
  }
}

// A head's channels of the normalised rows, as queries and keys or as values.
template <class Ty>
template <class R>
void Attention<Ty>::copy_slices(const T* rows, R* out, bool as_values) {
  const int64_t P = kPanel<T>, room = a_.tokens + kMostGemmRows;
  constexpr int kStep = kHalfVectors ? kLanesOf<T> / 2 : kLanesOf<T>;
  using V = Vec<T, kStep>;
  for (int64_t c = 0; c < a_.head_dim; c += P) {
    const int64_t width = panel_width<T>(a_.head_dim - c), stride = as_values ? width : P;
    R* const panel = out + c / P * room * P;
    for (int64_t t = 0; t < a_.tokens; ++t) {
      const T* row = rows + t * a_.row_stride + c;
      for (int64_t j = 0; j < width; j += kStep) store_as(panel + t * stride + j, load<V>(row + j));
    }
  }
  const int64_t last = a_.head_dim / P * P;
  if (kTerms<R> == 2 && a_.head_dim % 2 == 1)
    clear_channel(out + last * room + a_.head_dim - last, a_.tokens);
}

// Rows of a B operand, [K][stride], as the pairs [K / 2][width][2] it is multiplied in.
template <class T>
void pair_rows(const T* rows, int64_t K, int64_t stride, int64_t width, BFloat16* dst) {
  constexpr int kStep = kLanesOf<T> / 2;
  using V = Vec<T, kStep>;
  using Pairs = Vec<uint32_t, kStep>;
  for (int64_t k = 0; k < K; k += 2, dst += 2 * width) {
    const T *first = rows + k * stride, *second = first + stride;
    for (int64_t j = 0; j < width; j += kStep) {
      const auto low = round_to_bf16(load<V>(first + j));
      const auto high = round_to_bf16(k + 1 < K ? load<V>(second + j) : V{});
      store(dst + 2 * j,
            __builtin_convertvector(high, Pairs) << 16 | __builtin_convertvector(low, Pairs));
    }
  }
}

// The head's values, [tokens][width] in panels: a slice of the normalised rows, or projected.
template <class Ty>
void Attention<Ty>::make_values(int64_t head) {
  const int64_t P = kPanel<T>, room = a_.tokens + kMostGemmRows, L = a_.tokens;
  const int64_t at = head * ceil_div(a_.value_dim, P) * P;
  const T* const rows = own_ + a_.h_rows + head * a_.head_dim;
  T* const projected = own_ + (kTerms<Term> == 1 ? a_.values : a_.value_rows);
  if (a_.values_expanded) {
    project(at, a_.v_weight, a_.v_bias, a_.value_dim, call_.act, projected, true);
  }
  if constexpr (kTerms<Term> == 1) {
    if (!a_.values_expanded) copy_slices(rows, projected, true);
  } else {
    for (int64_t c = 0; c < a_.value_dim; c += P) {
      const int64_t width = value_width(c / P), panel = c / P * room * P;
      const bool slices = !a_.values_expanded;
      pair_rows(slices ? rows + c : projected + panel, L, slices ? a_.row_stride : width, width,
                terms(own_ + a_.values) + panel);
    }
  }
}

// ---- one head ---------------------------------------------------------------------------------

// exp(scale (s - max)) / sum over the row's tokens, which lie in panels; zero up to a whole vector.
template <class Ty>
void Attention<Ty>::softmax_row(T* scores, Term* weights) {
  constexpr int kLanes = kLanesOf<T>;
  using V = Vec<T, kLanes>;
  const int64_t P = kPanel<T>, stride = (kAttentionQueries + kMostGemmRows) * P, L = a_.tokens;
  const auto each = [&](auto f) __attribute__((always_inline)) {
    T* panel = scores;
    for (int64_t t = 0; t < L; t += P, panel += stride) {
      const int64_t here = min(P, L - t);
      for (int64_t lane = 0; lane < here; lane += kLanes) f(panel + lane, here - lane);
    }
  };
  const V lowest = splat<V>(-static_cast<T>(__builtin_inff()));
  V most = lowest;
  each([&](T* s, int64_t count) __attribute__((always_inline)) {
    V v = load<V>(s);
    if (count < kLanes) v = first_lanes<V, T>(v, count, lowest);
    most = max(most, v);
  });
  const T largest = max_lanes<V, T>(most), scale = static_cast<T>(a_.scale);
  RowSum<T> sum;
  each([&](T* s, int64_t count) __attribute__((always_inline)) {
    V e = exponential<T>((load<V>(s) - largest) * scale);
    if (count < kLanes) e = first_lanes<V, T>(e, count);
    sum.next() += e;
    store(s, e);
  });
  const T inverse = T(1) / sum.total();
  each([&](T* s, int64_t) __attribute__((always_inline)) {
    store_as(weights + (s - scores), load<V>(s) * inverse);
  });
}

template <class Ty>
void Attention<Ty>::attend(Map* z, bool add, int64_t nowhere) {
  const int64_t P = kPanel<T>, L = a_.tokens, room = L + kMostGemmRows, dv = a_.value_dim;
  const int64_t score_rows = kAttentionQueries + kMostGemmRows;
  T* const scores = own_ + a_.scores;
  Term* const weights = terms(own_ + a_.weights);
  for (int64_t q0 = 0; q0 < L; q0 += kAttentionQueries) {
    const int64_t queries = min(kAttentionQueries, L - q0);
    for (int64_t i = 0; i < score_rows; ++i) offsets_[i] = i * P;
    for (int64_t t = 0; t < L; t += P) {
      const ExpandTile<Term, T> tile{terms(own_ + a_.q) + q0 * P,
                                     room * P,
                                     terms(own_ + a_.keys) + t * plan_.depth(a_.head_dim),
                                     a_.head_dim,
                                     own_ + a_.no_bias,
                                     scores + t * score_rows,
                                     offsets_};
      with_shape<T>(panel_width<T>(L - t), [&](auto shape) {
        expand_pixels<decltype(shape)>(Activation::kNone, tile, queries);
      });
    }
    for (int64_t i = 0; i < queries; ++i) softmax_row(scores + i * P, weights + i * P);
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t pixel = pixels_[q0 + i];
      rows_[i] = pixel < 0 ? nowhere : pixel * a_.z_channels;
    }
    for (int64_t c = 0; c < dv; c += P) {
      const int64_t width = value_width(c / P);
      ShrinkTile<Term, Map> tile{};
      tile.a = weights;
      tile.a_panel_stride = score_rows * P;
      tile.b = terms(own_ + a_.values) + c / P * room * P;
      tile.K = L;
      tile.out = z + c;
      tile.residual = add ? z + c : nullptr;
      tile.offsets = rows_;
      tile.channels = min(width, dv - c);
      tile.first = tile.last = true;
      with_shape<T>(width, [&](auto shape) { shrink_pixels<decltype(shape)>(tile, queries); });
    }
  }
}

template <class Ty>
void Attention<Ty>::run(int64_t image0, int64_t u0, int64_t u1, bool grid, bool add, int thread) {
  const int64_t windows = a_.n1 * a_.n2, d = a_.head_dim, P = kPanel<T>;
  const int64_t step = d_panels() * P, map = call_.H * call_.W;
  Term *const q = terms(own_ + a_.q), *const k = terms(own_ + a_.k);
  int64_t entered = -1;
  for (int64_t unit = u0; unit < u1; ++unit) {
    const int64_t head = unit % a_.heads, window = unit / a_.heads, image = window / windows;
    if (window != entered) enter_window(image0 + image, window % windows, grid);
    entered = window;
    const T* const rows = own_ + a_.h_rows + head * d;
    const Term* keys = k;
    if (joined()) {
      project(2 * head * step, a_.qk_weight, a_.qk_bias, 2 * d, Activation::kNone, q, false);
      keys = q + d;
    } else if (call_.qk_weight.data) {
      project(2 * head * step, a_.qk_weight, a_.qk_bias, d, Activation::kNone, q, false);
      project((2 * head + 1) * step, a_.qk_weight, a_.qk_bias, d, Activation::kNone, k, false);
    } else {
      copy_slices(rows, q, false);
      copy_slices(rows, k, false);
    }
    make_values(head);
    transpose_keys(keys);
    // Padded queries land behind the images, every thread's in a pixel of its own.
    const int64_t nowhere = (plan_.images * map + thread - image * map) * a_.z_channels;
    Map* const z = reinterpret_cast<Map*>(shared_ + a_.z) + image * map * a_.z_channels;
    attend(z + head * a_.value_dim, add, nowhere);
  }
}

}  // namespace
}  // namespace emo_kernels::cpu
