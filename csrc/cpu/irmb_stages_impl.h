// Bodies of irmb_stages.h.
#pragma once

#include "cpu/irmb_stages.h"

namespace emo_kernels::cpu {
namespace {

// ---- pack -------------------------------------------------------------------------------------

template <class T>
void pack_depthwise(const IrmbCall& call, int64_t channel0, T* weights, T* shift) {
  const int64_t channels = min<int64_t>(kPanel<T>, call.M - channel0), taps = call.K * call.K;
  with_elements<T>(call.dw_weight, [&](auto* w) {
    pack_panel<T>(w + channel0 * taps, channels, taps, weights, kPanel<T>);
  });
  T scale[kPanel<T>] = {};
  for (int64_t i = 0; i < kPanel<T>; ++i) {
    shift[i] = T(0);
    if (i >= channels) continue;
    const int64_t m = channel0 + i;
    const auto at = [m](const Param& p, T absent) { return double{element<T>(p, m, absent)}; };
    const double a = at(call.bn_weight, 1) / __builtin_sqrt(at(call.bn_var, 1) + call.bn_eps);
    scale[i] = static_cast<T>(a);
    shift[i] = static_cast<T>(at(call.bn_bias, 0) - at(call.bn_mean, 0) * a);
  }
  for (int64_t t = 0; t < taps; ++t) {
    for (int64_t i = 0; i < kPanel<T>; ++i) weights[t * kPanel<T> + i] *= scale[i];
  }
}

template <class Ty>
void Stages<Ty>::pack_expanded(int64_t panel) {
  const int64_t P = kPanel<T>, at = slot(panel), m = panel * P, left = call_.M - m;
  const int64_t channels = min(P, left);
  if (call_.v_weight.data) {
    with_elements<T>(call_.v_weight, [&](auto* weight) {
      pack_panel<Term>(weight + m * call_.C, channels, call_.C,
                       terms(packed_ + plan.v_weight) + at * plan.depth(call_.C),
                       panel_width<T>(left));
    });
    copy_elements<T>(call_.v_bias, m, channels, packed_ + plan.v_bias + at, P);
  }
  pack_depthwise<T>(call_, m, packed_ + plan.dw_weight + at * call_.K * call_.K,
                    packed_ + plan.bn_shift + at);
}

template <class Ty>
void Stages<Ty>::pack_outputs(int64_t panel) {
  const OutputPanel<T> outputs(panel, call_.O);
  with_elements<T>(call_.proj_weight, [&](auto* weight) {
    pack_panel<Term>(weight + outputs.start * call_.M, outputs.channels, call_.M,
                     terms(packed_ + plan.proj_weight) + slot(panel) * plan.depth(call_.M),
                     outputs.width);
  });
}

template <class T>
Ahead expansion_of(const IrmbPlan& plan, int64_t panel) {
  const IrmbCall& call = plan.conv;
  Ahead rows;
  if (call.v_weight.data == nullptr) return rows;
  const int64_t m = panel * kPanel<T>;
  with_elements<T>(call.v_weight, [&](auto* weight) {
    rows = {weight + m * call.C, weight + min(call.M, m + kPanel<T>) * call.C};
  });
  return rows;
}

template <class Ty>
Ahead Stages<Ty>::projection_of(int64_t panel) const {
  const OutputPanel<T> outputs(panel, call_.O);
  Ahead rows;
  with_elements<T>(call_.proj_weight, [&](auto* weight) {
    const auto* const begin = weight + outputs.start * call_.M;
    rows = {begin, begin + outputs.channels * call_.M};
  });
  return rows;
}

template <class Ty>
void Stages<Ty>::pack_gamma() {
  if (call_.gamma.data == nullptr) return;
  copy_elements<T>(call_.gamma, 0, call_.O, shared_ + plan.gamma, plan.panels_o * kPanel<T>);
}

// ---- normalise and expand ---------------------------------------------------------------------

template <class Ty>
void Stages<Ty>::set_block(int64_t n, int64_t column0, int64_t column1) {
  if (n == n_ && column0 == column0_ && column1 == column1_) return;
  n_ = n;
  column0_ = column0;
  column1_ = column1;
  packed_row0_ = packed_row1_ = 0;
  const int64_t begin = column0 * call_.stride - call_.padding;
  const int64_t end =
      (column1 - 1) * call_.stride - call_.padding + (call_.K - 1) * call_.dilation + 1;
  in_column0_ = min(max<int64_t>(0, begin), call_.W);
  in_column1_ = max(in_column0_, min(call_.W, end));
  ring_column0_ = in_column0_ - begin;
  if (column0 == cleared0_ && column1 == cleared1_) return;
  cleared0_ = column0;
  cleared1_ = column1;
  const int64_t P = kPanel<T>, after = ring_column0_ + in_column1_ - in_column0_;
  group0_ = 0;
  for (int64_t g = 0; g < plan.group_panels; ++g) {
    for (int64_t r = 0; r < plan.ring_rows; ++r) {
      T* row = ring_of(g) + r * plan.ring_columns * P;
      for (int64_t i = 0; i < ring_column0_ * P; ++i) row[i] = T(0);
      for (int64_t i = after * P; i < plan.ring_columns * P; ++i) row[i] = T(0);
    }
  }
}

// Panels of one input row's columns, normalised.
template <class Ty>
template <class D>
void Stages<Ty>::normalize_row(int64_t row, int64_t panel0, int64_t panel1, D* dst,
                               int64_t panel_stride) {
  const int64_t C = call_.C, columns = in_column1_ - in_column0_;
  const Map* x = source_ + ((n_ * call_.H + row) * call_.W + in_column0_) * C;
  const T *scale = own_ + plan.norm_scale, *shift = own_ + plan.norm_shift;
  const T eps = static_cast<T>(call_.norm_eps);
  const auto rows_of = [&](auto normalize) {
    normalize(x, columns, C, panel0, panel1, scale, shift, eps, dst, panel_stride);
  };
  if (call_.norm == Norm::kNone) {
    rows_of(normalize_pixels<T, Norm::kNone, Map, D>);
  } else if (call_.norm == Norm::kAffine) {
    rows_of(normalize_pixels<T, Norm::kAffine, Map, D>);
  } else {
    rows_of(normalize_pixels<T, Norm::kLayer, Map, D>);
  }
}

template <class Ty>
void Stages<Ty>::pack_x(int64_t row0, int64_t row1) {
  if (row0 == packed_row0_ && row1 == packed_row1_) return;
  packed_row0_ = row0;
  packed_row1_ = row1;
  Term* dst = terms(own_ + plan.x_panels);
  for (int64_t y = row0; y < row1; ++y, dst += (in_column1_ - in_column0_) * kPanel<T>) {
    normalize_row(y, 0, plan.panels_c, dst, plan.chunk_pixels * kPanel<T>);
  }
}

template <class Ty>
void Stages<Ty>::expand_panel(int64_t panel, int64_t pixels) {
  const int64_t P = kPanel<T>, m = panel * P;
  const ExpandTile<Term, T> tile{terms(own_ + plan.x_panels),
                                 plan.chunk_pixels * P,
                                 terms(packed_ + plan.v_weight) + slot(panel) * plan.depth(call_.C),
                                 call_.C,
                                 packed_ + plan.v_bias + slot(panel),
                                 ring_of(panel),
                                 ring_offsets_,
                                 &ahead};
  with_shape<T>(panel_width<T>(call_.M - m),
                [&](auto shape) { expand_pixels<decltype(shape)>(call_.act, tile, pixels); });
}

template <class Ty>
void Stages<Ty>::expand_rows(int64_t row0, int64_t row1) {
  const int64_t P = kPanel<T>;
  const auto pixel_of = [&](int64_t y) {
    return (y % plan.ring_rows) * plan.ring_columns + ring_column0_;
  };
  if (call_.v_weight.data == nullptr) {  // no expansion: the ring takes the normalised rows
    for (int64_t y = row0; y < row1; ++y) {
      normalize_row(y, group0_, group1_, ring_of(group0_) + pixel_of(y) * P,
                    ring_of(group0_ + 1) - ring_of(group0_));
    }
    return;
  }
  pack_x(row0, row1);
  int64_t pixels = 0;
  for (int64_t y = row0; y < row1; ++y) {
    const int64_t row = pixel_of(y);
    for (int64_t i = 0; i < in_column1_ - in_column0_; ++i) ring_offsets_[pixels++] = (row + i) * P;
  }
  const int64_t nowhere = plan.ring_rows * plan.ring_columns * P;
  for (int64_t i = pixels; i < pixels + kMostGemmRows; ++i) ring_offsets_[i] = nowhere;
  for (int64_t panel = group0_; panel < group1_; ++panel) expand_panel(panel, pixels);
}

template <class Ty>
int64_t Stages<Ty>::expand_for(int64_t y0, int64_t y1, int64_t expanded) {
  const int64_t reach = (call_.K - 1) * call_.dilation;
  const int64_t begin = max(expanded, max<int64_t>(0, y0 * call_.stride - call_.padding));
  const int64_t end = min(call_.H, (y1 - 1) * call_.stride - call_.padding + reach + 1);
  for (int64_t y = begin; y < end; y += plan.chunk_rows)
    expand_rows(y, min(end, y + plan.chunk_rows));
  return max(expanded, end);
}

// ---- depthwise --------------------------------------------------------------------------------

template <class Ty>
void Stages<Ty>::depthwise(int64_t y0, int64_t y1, bool sums_only) {
  const int64_t P = kPanel<T>, columns = column1_ - column0_;
  using V = Vec<T, kLanesOf<T>>;
  for (int64_t panel = group0_; panel < group1_; ++panel) {
    const T* ring = ring_of(panel);
    const auto ring_row = [&](int64_t y) {
      return ring + (y % plan.ring_rows) * plan.ring_columns * P;
    };
    BlockRow<T, Term> row{};
    row.K = call_.K;
    row.stride = call_.stride;
    row.dilation = call_.dilation;
    row.weights = packed_ + plan.dw_weight + slot(panel) * call_.K * call_.K;
    row.shift = packed_ + plan.bn_shift + slot(panel);
    row.gate = gates_ready ? shared_ + plan.gates + (n_ * plan.panels_m + panel) * P : nullptr;
    row.columns = columns;
    row.panel = P;
    row.width = min(P, call_.M - panel * P);
    for (int64_t y = y0; y < y1; ++y) {
      const int64_t top = y * call_.stride - call_.padding;
      row.taps = 0;
      for (int64_t t = 0; t < call_.K; ++t) {
        const int64_t in_y = top + t * call_.dilation;
        if (in_y < 0 || in_y >= call_.H) continue;
        if (row.taps == 0) row.first_tap = t;
        row.rows[row.taps++] = ring_row(in_y);
      }
      row.local = call_.skip && !sums_only ? ring_row(y) + call_.padding * P : nullptr;
      row.out = d_of(panel) + (y - y0) * columns * P;
      depthwise_(row);
      if (kTerms<Term> == 2 && row.width % 2 == 1) clear_channel(row.out + row.width, columns);
      if (!sums_only) continue;
      T* sums = shared_ + plan.row_sums + ((n_ * plan.Ho + y) * plan.panels_m + panel) * P;
      for (int64_t lane = 0; lane < P; lane += kLanesOf<T>) {
        V sum = column0_ > 0 ? load<V>(sums + lane) : V{};
        for (int64_t i = 0; i < columns; ++i) sum += load_as<V>(row.out + i * P + lane);
        store(sums + lane, sum);
      }
    }
  }
}

// sigmoid(We act(Wr mean(c) + br) + be), all of it small.
template <class Ty>
void Stages<Ty>::gate(int64_t n) {
  const int64_t P = kPanel<T>, M = call_.M, R = call_.R, padded = plan.panels_m * P;
  using V = Vec<T, kLanesOf<T>>;
  T* const gates = shared_ + plan.gates + n * padded;
  T* const mean = own_ + plan.x_panels;  // free until the next block is packed
  packed_row0_ = packed_row1_ = 0;
  for (int64_t m = 0; m < M; ++m) {
    double sum = 0.0;
    for (int64_t y = 0; y < plan.Ho; ++y) {
      sum += shared_[plan.row_sums + (n * plan.Ho + y) * padded + m];
    }
    mean[m] = static_cast<T>(sum / static_cast<double>(plan.Ho * plan.Wo));
  }
  copy_elements<T>(call_.se_expand_bias, 0, M, gates, padded);
  for (int64_t r = 0; r < R; ++r) {
    T sum = element<T>(call_.se_reduce_bias, r, 0);
    with_elements<T>(call_.se_reduce_weight, [&](auto* reduce) {
      for (int64_t m = 0; m < M; ++m) sum += value_of(reduce[r * M + m]) * mean[m];
    });
    V v = splat<V>(sum);
    switch (call_.act) {
      case Activation::kNone:
        break;
      case Activation::kRelu:
        v = activate<T, Activation::kRelu>(v);
        break;
      case Activation::kGelu:
        v = activate<T, Activation::kGelu>(v);
        break;
      case Activation::kSilu:
        v = activate<T, Activation::kSilu>(v);
        break;
    }
    with_elements<T>(call_.se_expand_weight, [&](auto* expand) {
      for (int64_t m = 0; m < M; ++m) gates[m] += value_of(expand[m * R + r]) * v[0];
    });
  }
  for (int64_t m = 0; m < M; ++m) gates[m] = sigmoid(gates[m]);
}

// Where groups of channels leave what they have summed up: in the output, or beside it if the sums
// do not fit its type.
template <class Ty>
typename Stages<Ty>::T* Stages<Ty>::partial_sums() const {
  if constexpr (sizeof(Map) == sizeof(T)) {
    return out_;
  } else {
    return own_ + plan.partial - n_ * plan.Ho * plan.Wo * call_.O;
  }
}

// ---- shrink -----------------------------------------------------------------------------------

template <class Ty>
void Stages<Ty>::shrink_panel(int64_t panel, int64_t pixel0, int64_t pixel1, const Term* d,
                              int64_t d_stride, int64_t channel0, int64_t channels) {
  const OutputPanel<T> outputs(panel, call_.O);
  const int64_t o = outputs.start, width = outputs.width;
  ShrinkTile<Term, Map> tile{};
  tile.a = d + pixel0 * kPanel<T>;
  tile.a_panel_stride = d_stride;
  tile.b = terms(packed_ + plan.proj_weight) + slot(panel) * plan.depth(call_.M) + channel0 * width;
  tile.K = channels;
  tile.out = out_ + o;
  tile.partial = partial_sums() + o;
  tile.residual = call_.skip ? residual_ + o : nullptr;
  tile.gamma = call_.gamma.data ? shared_ + plan.gamma + o : nullptr;
  tile.offsets = out_offsets_ + pixel0;
  tile.channels = outputs.channels;
  tile.first = channel0 == 0;
  tile.last = channel0 + channels == call_.M;
  tile.ahead = &ahead;
  with_shape<T>(width, [&](auto shape) { shrink_pixels<decltype(shape)>(tile, pixel1 - pixel0); });
}

template <class Ty>
void Stages<Ty>::shrink(int64_t y0, int64_t y1) {
  const int64_t P = kPanel<T>, columns = column1_ - column0_, pixels = (y1 - y0) * columns;
  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t row = n_ * plan.Ho + y0 + i / columns;
    out_offsets_[i] = (row * plan.Wo + column0_ + i % columns) * call_.O;
  }
  const int64_t channel0 = group0_ * P, channels = min(group1_ * P, call_.M) - channel0;
  for (int64_t panel = 0; panel < plan.panels_o; ++panel) {
    shrink_panel(panel, 0, pixels, d_of(group0_), plan.tile_pixels * P, channel0, channels);
  }
}

constexpr int64_t kShareRows = kRegisters == 32 ? 8 : 4;  // rows of a whole GEMM tile

// Time of a tile of this many channels: beside its products it takes as long as one vector's more
// (of 160 outputs, 48 + 48 + 32 + 32, on two Zen 4 cores).
template <class T>
int64_t tile_cost(int64_t width) {
  return width + kLanesOf<T>;
}

// Panel by panel, so that a thread packs and reads few panels of weights; equal in time.
template <class Ty>
typename Stages<Ty>::PixelRange Stages<Ty>::share_of_panel(int64_t panel, int thread,
                                                           int threads) const {
  const int64_t pixels = plan.Ho * plan.Wo, tiles = ceil_div(pixels, kShareRows);
  int64_t before = 0, all = 0, here = 0;
  for (int64_t p = 0; p < plan.panels_o; ++p) {
    const int64_t cost = tile_cost<T>(OutputPanel<T>(p, call_.O).width);
    if (p < panel) before += cost;
    if (p == panel) here = cost;
    all += cost;
  }
  const auto pixel = [&](int64_t share) {
    const int64_t work = all * tiles * share / threads - before * tiles;
    return min(pixels, max<int64_t>(0, work / here) * kShareRows);
  };
  return {pixel(thread), pixel(thread + 1)};
}

template <class Ty>
int64_t Stages<Ty>::first_share(int thread, int threads) const {
  for (int64_t p = 0; p < plan.panels_o; ++p) {
    const PixelRange range = share_of_panel(p, thread, threads);
    if (range.begin < range.end) return p;
  }
  return plan.panels_o;
}

template <class Ty>
void Stages<Ty>::shrink_share(int thread, int threads) {
  const int64_t pixels = plan.Ho * plan.Wo;
  for (int64_t i = 0; i < pixels; ++i) out_offsets_[i] = (n_ * pixels + i) * call_.O;
  for (int64_t p = first_share(thread, threads); p < plan.panels_o; ++p) {
    const PixelRange range = share_of_panel(p, thread, threads);
    if (range.begin >= range.end) break;
    pack_outputs(p);
    ahead = p + 1 < plan.panels_o ? projection_of(p + 1) : Ahead{};
    shrink_panel(p, range.begin, range.end, d_of(0), plan.tile_pixels * kPanel<T>, 0, call_.M);
  }
}

}  // namespace
}  // namespace emo_kernels::cpu
