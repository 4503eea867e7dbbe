// Computes: dy = grad, or c1 grad + c2 (y - mean) + c3 where a batch norm stands behind the
//     convolution; dx[n, i, j, c] = sum_ab weight[c, a, b] dy[n, (i + P - a D) / S, (j + P - b D) /
//     S, c] where these divide, + local_grad; dweight[c, a, b] = sum_nij dy[n, i, j, c] x[n, i S +
//     a D - P, j S + b D - P, c]. Both, or one, in one launch.
// Tiling: a block walks down a segment of rows, one row of dy a step, with strips of columns side
// by
//     side. Rows of grad, y and x come through shared memory by asynchronous copies, some steps
//     ahead; dy is formed once, there, and never written. Half of the threads (role 0) have the
//     filters and the unfinished rows of dx in registers, half (role 1) the sums of all taps and
//     the rows of dy that x still meets; each has two channels. Row q = S t + u, of x or of dx,
//     meets row t - m of dy through row a = S m + u of the filter, as forward.
// Traffic: grad, y, x and local_grad once (halos as forward), dx once; 4 K K operations for 4
//     elements at stride 1.
// Numerics: dy, products and sums in fp32, dx rounded once. A thread's sums of taps are added over
//     the block in fp64, rounded to fp32, and added over the blocks in fp64; the order depends on
//     the shape alone.
// Limits: as forward; stride 2 with dilation 1 alone.
#pragma once

#include "cuda/channel_sums.h"
#include "cuda/depthwise_gradient.h"
#include "cuda/depthwise_rows.h"

namespace emo_kernels::cuda {

template <class T, int K, int S, int kStrip>
class Backward {
 public:
  using Args = BackwardArgs<T>;
  // So that two blocks share a multiprocessor's registers.
  static constexpr int kBlockThreads = K == 5 ? 192 : kThreads;

  EMO_KERNEL Backward(const Args& args, const Place& place, void* shared)
      : args_(args),
        place_(place),
        shared_(static_cast<unsigned char*>(shared)),
        c_(first_channel(args.plan, place, 2)),
        strip_(place.slot % args.plan.span),
        plane_(place.slot / args.plan.span),
        is_filter_role_(args.first_role + place.role == kFilterGradient) {}

  static int64_t shared_bytes(const Args& args) {
    const Plan& plan = args.plan;
    const int64_t channels = int64_t{plan.planes} * plan.groups;
    const int64_t pairs = kBuffers * (2 * width(plan) + S * x_width(plan)) * channels;
    const int64_t rows = pairs * int64_t{sizeof(Pair<T>)};
    const int64_t coefficients = 4 * int64_t{sizeof(Float2)} * plan.groups;
    const int64_t formed = 2 * width(plan) * channels * int64_t{sizeof(Float2)};
    const int64_t sums = 2 * int64_t{sizeof(double)} * plan.slots * plan.groups;
    return most64(coefficients + formed + rows, sums);
  }

  template <class Each>
  EMO_KERNEL static void run(const Args& args, int64_t block, const Each& each) {
    each.then([](Backward& self) { self.prepare(); });
    for (int64_t round = 0; round < args.plan.rounds; ++round) {
      const int64_t unit = unit_of(args.plan, block, round);
      if (unit >= args.plan.units) break;
      const int own = args.partials == nullptr ? 0 : args.rows.own;
      const int steps = unit_rows(args.plan, unit) + kLead + own;
      each([&](Backward& self) { self.begin(unit); });
      each.then([&](Backward& self) {
        for (int t = 0; t < kBuffers - 1; ++t) self.fetch(t);
      });
      unrolled_steps<kRing>(steps, [&](int phase, int t) {
        each([&](Backward& self) {
          self.copies_.template wait<kBuffers - 2>();
          self.form(t);
        });
        each.then([&](Backward& self) {
          self.fetch(t + kBuffers - 1);
          self.step(phase, t);
        });
      });
    }
    if (args.partials == nullptr) return;
    each([](Backward&) {});
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap) {
      each([&](Backward& self) { self.publish(tap); });
      each([&](Backward& self) { self.collect(tap); });
    }
  }

 private:
  static constexpr int kRing = kUnfinished<K, S>, kBuffers = kStages<T, S>, kLead = kRing - 1;
  static constexpr int kColumns = kStrip + kLead;         // of dy, that a strip of dx meets
  static constexpr int kXColumns = (kStrip - 1) * S + K;  // of x, that a strip of dy meets
  // Role 0: the filters, and S rows of dx (S columns for each of the strip's) in each slot of the
  // ring. Role 1: the sums of the taps, and a row of dy in each slot.
  static constexpr int kSlotValues = S * S * kStrip;

  static int64_t most64(int64_t a, int64_t b) { return a > b ? a : b; }
  EMO_ANYWHERE static int width(const Plan& plan) { return plan.span * kStrip + kLead; }
  EMO_ANYWHERE static int x_width(const Plan& plan) { return (plan.span * kStrip - 1) * S + K; }

  // ---- shared memory: coefficients, dy as formed (2 rows), rows of grad, y and x as they arrive

  // `row` in an array of rows of `columns` pixels, at the thread's plane and pair of channels.
  template <class U>
  EMO_KERNEL U* at(U* rows, int row, int columns) const {
    const Plan& plan = args_.plan;
    const int plane = row * plan.planes + plane_;
    return rows + plane * columns * plan.groups + place_.group;
  }

  EMO_KERNEL Float2* coefficient(int i) const {
    return reinterpret_cast<Float2*>(shared_) + i * args_.plan.groups + place_.group;
  }

  EMO_KERNEL Float2* formed(int t) const {
    Float2* const rows = reinterpret_cast<Float2*>(shared_) + 4 * args_.plan.groups;
    return at(rows, t & 1, width(args_.plan));
  }

  // Pixels of two rows of dy.
  EMO_KERNEL int two_rows() const {
    return 2 * width(args_.plan) * args_.plan.planes * args_.plan.groups;
  }

  EMO_KERNEL Pair<T>* arrivals() const {
    Float2* const rows = reinterpret_cast<Float2*>(shared_) + 4 * args_.plan.groups;
    return reinterpret_cast<Pair<T>*>(rows + two_rows());
  }

  EMO_KERNEL Pair<T>* arriving(int t, int is_y) const {
    return at(arrivals(), 2 * (t % kBuffers) + is_y, width(args_.plan));
  }

  EMO_KERNEL Pair<T>* x_arriving(int t, int u) const {
    Pair<T>* const rows = arrivals() + kBuffers * two_rows();
    return at(rows, (t % kBuffers) * S + u, x_width(args_.plan));
  }

  // ---- where a unit lies

  EMO_KERNEL void prepare() {
#pragma unroll
    for (int t = 0; t < K * K; ++t) taps_[t] = {0.0f, 0.0f};
    if (c_ < 0) return;
    if (args_.y != nullptr && place_.slot == 0 && place_.role == 0) {
      for (int i = 0; i < 4; ++i) {
        write(coefficient(i), elements<Float2>(args_.coefficients, int64_t{i} * args_.g.C + c_));
      }
    }
    if (is_filter_role_) return;
#pragma unroll
    for (int t = 0; t < K * K; ++t) {
      taps_[t] = elements<Float2>(args_.weight, int64_t{c_} * (K * K) + t, K * K);
    }
  }

  EMO_KERNEL void begin(int64_t unit) {
    const Geometry& g = args_.g;
    tile_ = tile_of(args_.plan, unit, place_.slot);
    tile_.live = tile_.live && c_ >= 0;
    row0_ = tile_.lattice_row + g.D * (args_.rows.first + tile_.first_row - kLead);
    col0_ = tile_.lattice_col + g.D * (args_.cols.first + tile_.first_col - kLead);
#pragma unroll
    for (int r = 0; r < kRing; ++r) {
#pragma unroll
      for (int i = 0; i < kSlotValues; ++i) ring_[r][i] = {0.0f, 0.0f};
    }
  }

  EMO_KERNEL bool has_row(int t) const {
    return tile_.live && t < tile_.rows + kLead && inside(row0_ + args_.g.D * t, args_.g.HO);
  }

  EMO_KERNEL int x_row(int t, int u) const {
    return S * (row0_ + args_.g.D * t) - args_.g.P + args_.g.D * u;
  }

  // Whether the row of x is there, and the filters' gradient wants it.
  EMO_KERNEL bool has_x_row(int t, int u) const {
    const int own = args_.rows.own;
    const bool wanted = args_.partials != nullptr && tile_.live && t >= own;
    return wanted && t < own + tile_.rows + kLead && inside(x_row(t, u), args_.g.H);
  }

  EMO_KERNEL Share share(int columns) const {
    const int span = args_.plan.span;
    return {strip_ + span * place_.role, span * args_.roles, columns};
  }

  // ---- the steps

  EMO_KERNEL void fetch(int t) {
    const Geometry& g = args_.g;
    const Plan& plan = args_.plan;
    if (has_row(t)) {
      const int row = row0_ + g.D * t;
      const int64_t offset = ((tile_.n * g.HO + row) * g.WO + col0_) * g.C + c_;
      const auto start = [&](const T* map, int is_y) {
        start_row(copies_, arriving(t, is_y), plan.groups, map, offset, col0_, g.D, g.C, g.WO,
                  share(width(plan)));
      };
      start(args_.grad, 0);
      if (args_.y != nullptr) start(args_.y, 1);
    }
    const int x_col = S * (col0_ + g.D * args_.cols.own) - g.P;
#pragma unroll
    for (int u = 0; u < S; ++u) {
      if (!has_x_row(t, u)) continue;
      const int64_t offset = ((tile_.n * g.H + x_row(t, u)) * g.W + x_col) * g.C + c_;
      start_row(copies_, x_arriving(t, u), plan.groups, args_.x, offset, x_col, g.D, g.C, g.W,
                share(x_width(plan)));
    }
    copies_.close_group();
  }

  // dy of the columns whose grad and y this thread has copied.
  EMO_KERNEL void form(int t) {
    if (!has_row(t)) return;
    const Plan& plan = args_.plan;
    const Share own = share(width(plan));
    const Pair<T>*const grad = arriving(t, 0), *const y = arriving(t, 1);
    Float2* const out = formed(t);
    OutputGradient<T, Float2> norm{};
    if (args_.y != nullptr) {
      norm.c1 = read(coefficient(0)), norm.c2 = read(coefficient(1));
      norm.c3 = read(coefficient(2)), norm.mean = read(coefficient(3));
    }
    for (int p = own.first; p < own.width; p += own.every) {
      const int at = p * plan.groups;
      Float2 dy = widen(read(grad + at));
      if (args_.y != nullptr) {
        const bool live = inside(col0_ + p * args_.g.D, args_.g.WO);
        dy = norm.behind_norm(dy, widen(read(y + at)));
        dy = live ? dy : Float2{0.0f, 0.0f};
      }
      write(out + at, dy);
    }
  }

  EMO_KERNEL void step(int phase, int t) {
    if (is_filter_role_) {
      step_filters(phase, t);
    } else {
      step_input(phase, t);
    }
  }

  // The first column of the thread's strip, in a row of a buffer `scale` times as wide.
  EMO_KERNEL int strip_at(int scale) const { return strip_ * (kStrip * scale) * args_.plan.groups; }

  // ---- role 0: row i of dy goes to rows q = S i + a of dx; those of group i are then whole

  EMO_KERNEL static int value_at(int u, int h, int v) { return (u * kStrip + h) * S + v; }

  EMO_KERNEL void step_input(int phase, int t) {
    if (has_row(t)) {
      const Float2* const row = formed(t) + strip_at(1);
#pragma unroll
      for (int p = 0; p < kColumns; ++p) add_column(phase, p, read(row + p * args_.plan.groups));
    }
    if (t >= kLead && t < tile_.rows + kLead && tile_.live) store(phase, t);
#pragma unroll
    for (int i = 0; i < kSlotValues; ++i) ring_[phase][i] = {0.0f, 0.0f};
  }

  EMO_KERNEL void add_column(int phase, int p, Float2 dy) {
#pragma unroll
    for (int a = 0; a < K; ++a) {
#pragma unroll
      for (int h = 0; h < kStrip; ++h) {
#pragma unroll
        for (int v = 0; v < S; ++v) {
          const int b = S * (h + kLead - p) + v;
          Float2& dx = ring_[(phase + a / S) % kRing][value_at(a % S, h, v)];
          if (b >= 0 && b < K) dx = fused(taps_[a * K + b], dy, dx);
        }
      }
    }
  }

  EMO_KERNEL void store(int phase, int t) {
    const Geometry& g = args_.g;
    // Group i of rows begins at S i - P: row0_ + D t is i, or where it lies on its lattice if S
    // = 1. The buffer begins kLead columns before the strips.
    const int col0 = S * (col0_ + g.D * (strip_ * kStrip + kLead)) - g.P;
    const int dx_row0 = S * (row0_ + g.D * t) - g.P;
#pragma unroll
    for (int u = 0; u < S; ++u) {
      const int row = dx_row0 + g.D * u;
      if (!inside(row, g.H)) continue;
      const int64_t line = (tile_.n * g.H + row) * g.W;
#pragma unroll
      for (int i = 0; i < kStrip * S; ++i) {
        const int col = col0 + g.D * i;
        if (!inside(col, g.W)) continue;
        const int64_t offset = (line + col) * g.C + c_;
        Float2 dx = ring_[phase][value_at(u, i / S, i % S)];
        if (args_.local_grad != nullptr) {
          dx = dx + widen(read_packed<Float2>(args_.local_grad + offset));
        }
        write_packed<Float2>(args_.dx + offset, pack<T>(dx));
      }
    }
  }

  // ---- role 1: row q of x meets the rows of dy in the ring

  EMO_KERNEL void step_filters(int phase, int t) {
    const int own = args_.rows.own, groups = args_.plan.groups;
    const bool counts = has_row(t) && t >= own && t < own + tile_.rows;
    const Float2* const row = formed(t) + strip_at(1) + args_.cols.own * groups;
#pragma unroll
    for (int j = 0; j < kStrip; ++j) {
      ring_[phase][j] = counts ? read(row + j * groups) : Float2{0.0f, 0.0f};
    }
#pragma unroll
    for (int u = 0; u < S; ++u) {
      if (!has_x_row(t, u)) continue;
      const Pair<T>* const x = x_arriving(t, u) + strip_at(S);
#pragma unroll
      for (int p = 0; p < kXColumns; ++p) add_x_column(phase, u, p, widen(read(x + p * groups)));
    }
  }

  EMO_KERNEL void add_x_column(int phase, int u, int p, Float2 x) {
#pragma unroll
    for (int m = 0; m < kRing; ++m) {
#pragma unroll
      for (int j = 0; j < kStrip; ++j) {
        const int a = S * m + u, b = p - S * j;
        const Float2 dy = ring_[(phase - m + kRing) % kRing][j];
        if (a < K && b >= 0 && b < K) taps_[a * K + b] = fused(dy, x, taps_[a * K + b]);
      }
    }
  }

  // ---- the sums of the taps over the block

  EMO_KERNEL void publish(int tap) {
    if (!is_filter_role_) return;
    auto* const shared = reinterpret_cast<double*>(shared_);
    write(shared_slot(shared, args_.plan, place_, 0, place_.slot), double{taps_[tap].x});
    write(shared_slot(shared, args_.plan, place_, 1, place_.slot), double{taps_[tap].y});
  }

  EMO_KERNEL void collect(int tap) const {
    if (!is_filter_role_ || place_.slot != 0 || c_ < 0) return;
    auto* const shared = reinterpret_cast<double*>(shared_);
    const int64_t row = place_.block / args_.plan.blocks_c * (K * K) + tap;
    float* const partials = args_.partials + row * args_.g.C + c_;
    write(partials, static_cast<float>(slots_sum(shared, args_.plan, place_, 0)));
    write(partials + 1, static_cast<float>(slots_sum(shared, args_.plan, place_, 1)));
  }

  const Args& args_;
  const Place place_;
  unsigned char* const shared_;
  const int c_, strip_, plane_;
  const bool is_filter_role_;
  Copies copies_;
  Float2 taps_[K * K];  // role 0: the filters, 1: their gradient
  Float2 ring_[kRing][kSlotValues];
  Tile tile_;
  int row0_ = 0, col0_ = 0;  // of dy, at step 0 and at the buffer's first column
};

}  // namespace emo_kernels::cuda
