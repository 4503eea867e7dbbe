// Computes  z = softmax(q k^T / sqrt(d)) v inside windows of h = norm(x), [q; k] = Wqk h + bqk, for
//           v = h (attention before the expansion) or v = act(Wv h + bv) (behind it). Padded pixels
//           of a window are zero rows of h: q = bq, k = bk, live keys, dropped as queries.
// Tiling    one head of one window at a time, queries in blocks of 56; all operands in L2.
// Traffic   reads x once a thread, writes z once; stage 3 of EMO-5M: 0.25 MB for 27 MFLOP.
// Numerics  the row maximum is subtracted; exp by the polynomial of activation.h; no atomics.
// Limits    ungrouped v; any window, head size and map.
#pragma once

#include "cpu/gemm.h"
#include "cpu/irmb_plan.h"
#include "cpu/normalize.h"
#include "cpu/pack.h"
#include "cpu/panels.h"

namespace emo_kernels::cpu {
namespace {

template <class T>
class Attention {
 public:
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

  // Packs the projections of heads [h0, h1) into the shared buffer.
  void pack(int64_t h0, int64_t h1);

  // Attends in units [u0, u1) of one partition: image, window, head, the head running fastest.
  // The result is added to what z holds where `add`.
  void run(int64_t image0, int64_t u0, int64_t u1, bool grid, bool add, int thread);

 private:
  void enter_window(int64_t image, int64_t window, bool grid);
  void project(int64_t at, int64_t packed, int64_t bias, int64_t channels, Activation act, T* out,
               bool as_values);
  void transpose_keys();
  void copy_slices(const T* rows, T* out, bool as_values);
  void attend(T* z, bool add, int64_t nowhere);
  void softmax_row(T* scores);

  const T* data(const Param& param) const { return static_cast<const T*>(param.data); }
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

// `channels` rows of a (channels, C) projection into panels [panel][C][width], biases padded.
template <class T>
void pack_projection(const T* weight, const T* bias, int64_t channels, int64_t C, T* packed,
                     T* packed_bias) {
  for (int64_t at = 0; at < channels; at += kPanel<T>) {
    const int64_t left = channels - at, here = min<int64_t>(kPanel<T>, left);
    pack_panel<T>(weight + at * C, here, C, packed + at * C, panel_width<T>(left));
    copy_padded<T>(bias ? bias + at : nullptr, here, packed_bias + at, kPanel<T>);
  }
}

template <class T>
void Attention<T>::pack(int64_t h0, int64_t h1) {
  const int64_t C = call_.C, d = a_.head_dim, step = d_panels() * kPanel<T>;
  const int64_t v_step = ceil_div(a_.value_dim, kPanel<T>) * kPanel<T>;
  for (int64_t head = h0; head < h1; ++head) {
    if (call_.qk_weight.data) {
      for (int64_t k = 0; k < 2; ++k) {
        const int64_t channel = k * C + head * d, slot = 2 * head + k;
        const T* bias = data(call_.qk_bias);
        pack_projection<T>(data(call_.qk_weight) + channel * C, bias ? bias + channel : nullptr, d,
                           C, shared_ + a_.qk_weight + slot * step * C,
                           shared_ + a_.qk_bias + slot * step);
      }
    }
    if (a_.values_expanded) {
      const int64_t channel = head * a_.value_dim;
      const T* bias = data(call_.v_bias);
      pack_projection<T>(data(call_.v_weight) + channel * C, bias ? bias + channel : nullptr,
                         a_.value_dim, C, shared_ + a_.v_weight + head * v_step * C,
                         shared_ + a_.v_bias + head * v_step);
    }
  }
}

// ---- one window -------------------------------------------------------------------------------

// Lists the window's pixels and normalises them, as rows and as panels; padding is zero.
template <class T>
void Attention<T>::enter_window(int64_t image, int64_t window, bool grid) {
  const int64_t C = call_.C, P = kPanel<T>, i = window / a_.n2, j = window % a_.n2;
  const T *scale = own_ + a_.norm_scale, *shift = own_ + a_.norm_shift;
  const T* x = static_cast<const T*>(call_.x) + image * call_.H * call_.W * C;
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
    normalize_pixel<T, Norm::kNone>(row, C, scale, shift, eps, own_ + a_.h_panels + t * P,
                                    (a_.tokens + kMostGemmRows) * P);
  }
}

// out = act(W h + b) for every token: rows of one panel each, or (as_values) of its own width.
template <class T>
void Attention<T>::project(int64_t at, int64_t packed, int64_t bias, int64_t channels,
                           Activation act, T* out, bool as_values) {
  const int64_t C = call_.C, P = kPanel<T>, room = a_.tokens + kMostGemmRows;
  for (int64_t c = 0; c < channels; c += P) {
    const int64_t width = panel_width<T>(channels - c), stride = as_values ? width : P;
    for (int64_t t = 0; t < room; ++t) offsets_[t] = t * stride;
    const ExpandTile<T> tile{own_ + a_.h_panels,
                             room * P,
                             shared_ + packed + (at + c) * C,
                             C,
                             shared_ + bias + at + c,
                             out + c / P * room * P,
                             offsets_};
    with_shape<T>(width,
                  [&](auto shape) { expand_pixels<T, decltype(shape)>(act, tile, a_.tokens); });
  }
}

// keys as [panel of tokens][head_dim][width]: the B operand of q k^T.
template <class T>
void Attention<T>::transpose_keys() {
  const int64_t P = kPanel<T>, room = a_.tokens + kMostGemmRows, d = a_.head_dim;
  for (int64_t t = 0; t < a_.tokens; t += P) {
    const int64_t left = a_.tokens - t, width = panel_width<T>(left);
    for (int64_t c = 0; c < d; c += P) {
      pack_panel<T>(own_ + a_.k + (c / P * room + t) * P, min(P, left), min(P, d - c),
                    own_ + a_.keys + t * d + c * width, width, P);
    }
  }
}

// A head's channels of the normalised rows, as queries and keys or as values.
template <class T>
void Attention<T>::copy_slices(const T* rows, T* out, bool as_values) {
  const int64_t P = kPanel<T>, room = a_.tokens + kMostGemmRows;
  constexpr int kStep = kHalfVectors ? kLanesOf<T> / 2 : kLanesOf<T>;
  using V = Vec<T, kStep>;
  for (int64_t c = 0; c < a_.head_dim; c += P) {
    const int64_t width = panel_width<T>(a_.head_dim - c), stride = as_values ? width : P;
    T* const panel = out + c / P * room * P;
    for (int64_t t = 0; t < a_.tokens; ++t) {
      const T* row = rows + t * a_.row_stride + c;
      for (int64_t j = 0; j < width; j += kStep) store(panel + t * stride + j, load<V>(row + j));
    }
  }
}

// ---- one head ---------------------------------------------------------------------------------

// exp(scale (s - max)) / sum over the row's tokens, which lie in panels.
template <class T>
void Attention<T>::softmax_row(T* scores) {
  constexpr int kLanes = kLanesOf<T>;
  using V = Vec<T, kLanes>;
  const int64_t P = kPanel<T>, stride = (kAttentionQueries + kMostGemmRows) * P, L = a_.tokens;
  const auto each = [&](auto f) __attribute__((always_inline)) {
    for (int64_t t = 0; t < L; t += kLanes)
      f(scores + t / P * stride + t % P, min<int64_t>(kLanes, L - t));
  };
  V most = splat<V>(scores[0]);
  each([&](T* s, int64_t count) __attribute__((always_inline)) {
    V v = load<V>(s);
    for (int64_t i = count; i < kLanes; ++i) v[i] = scores[0];
    most = v > most ? v : most;
  });
  T lanes[kLanes], largest;
  store(lanes, most);
  largest = lanes[0];
  for (int i = 1; i < kLanes; ++i) largest = max(largest, lanes[i]);
  const T scale = static_cast<T>(a_.scale);
  V sum{};
  each([&](T* s, int64_t count) __attribute__((always_inline)) {
    V e = exponential<T>((load<V>(s) - largest) * scale);
    if (count < kLanes) e = first_lanes<V, T>(e, count);
    sum += e;
    store(s, e);
  });
  const T inverse = T(1) / sum_lanes<V, T>(sum);
  each([&](T* s, int64_t) __attribute__((always_inline)) { store(s, load<V>(s) * inverse); });
}

template <class T>
void Attention<T>::attend(T* z, bool add, int64_t nowhere) {
  const int64_t P = kPanel<T>, L = a_.tokens, room = L + kMostGemmRows, dv = a_.value_dim;
  const int64_t score_rows = kAttentionQueries + kMostGemmRows;
  T* const scores = own_ + a_.scores;
  for (int64_t q0 = 0; q0 < L; q0 += kAttentionQueries) {
    const int64_t queries = min(kAttentionQueries, L - q0);
    for (int64_t i = 0; i < score_rows; ++i) offsets_[i] = i * P;
    for (int64_t t = 0; t < L; t += P) {
      const ExpandTile<T> tile{own_ + a_.q + q0 * P,
                               room * P,
                               own_ + a_.keys + t * a_.head_dim,
                               a_.head_dim,
                               own_ + a_.no_bias,
                               scores + t * score_rows,
                               offsets_};
      with_shape<T>(panel_width<T>(L - t), [&](auto shape) {
        expand_pixels<T, decltype(shape)>(Activation::kNone, tile, queries);
      });
    }
    for (int64_t i = 0; i < queries; ++i) softmax_row(scores + i * P);
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t pixel = pixels_[q0 + i];
      rows_[i] = pixel < 0 ? nowhere : pixel * a_.z_channels;
    }
    for (int64_t c = 0; c < dv; c += P) {
      const int64_t width = value_width(c / P);
      ShrinkTile<T> tile{};
      tile.a = scores;
      tile.a_panel_stride = score_rows * P;
      tile.b = own_ + a_.values + c / P * room * P;
      tile.K = L;
      tile.out = z + c;
      tile.offsets = rows_;
      tile.channels = min(width, dv - c);
      tile.first = !add;
      tile.last = true;
      with_shape<T>(width, [&](auto shape) { shrink_pixels<T, decltype(shape)>(tile, queries); });
    }
  }
}

template <class T>
void Attention<T>::run(int64_t image0, int64_t u0, int64_t u1, bool grid, bool add, int thread) {
  const int64_t windows = a_.n1 * a_.n2, d = a_.head_dim, P = kPanel<T>;
  const int64_t step = d_panels() * P, v_step = ceil_div(a_.value_dim, P) * P;
  const int64_t map = call_.H * call_.W;
  T *const q = own_ + a_.q, *const k = own_ + a_.k, *const values = own_ + a_.values;
  int64_t entered = -1;
  for (int64_t unit = u0; unit < u1; ++unit) {
    const int64_t head = unit % a_.heads, window = unit / a_.heads, image = window / windows;
    if (window != entered) enter_window(image0 + image, window % windows, grid);
    entered = window;
    const T* const rows = own_ + a_.h_rows + head * d;
    if (call_.qk_weight.data) {
      project(2 * head * step, a_.qk_weight, a_.qk_bias, d, Activation::kNone, q, false);
      project((2 * head + 1) * step, a_.qk_weight, a_.qk_bias, d, Activation::kNone, k, false);
    } else {
      copy_slices(rows, q, false);
      copy_slices(rows, k, false);
    }
    if (a_.values_expanded) {
      project(head * v_step, a_.v_weight, a_.v_bias, a_.value_dim, call_.act, values, true);
    } else {
      copy_slices(rows, values, true);
    }
    transpose_keys();
    // Padded queries land behind the images, every thread's in a pixel of its own.
    const int64_t nowhere = (plan_.images * map + thread - image * map) * a_.z_channels;
    attend(shared_ + a_.z + image * map * a_.z_channels + head * a_.value_dim, add, nowhere);
  }
}

}  // namespace
}  // namespace emo_kernels::cpu
