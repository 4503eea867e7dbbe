// Computes: y[n, i, j, c] = sum_ab weight[c, a, b] x[n, i S + a D - P, j S + b D - P, c], zeros
//     outside the map, and where asked the batch-norm sums of y as stored: of y - pivot and of its
//     square, over the pixels.
// Tiling: a block walks down a segment of rows, S rows of x a step, with strips of columns side by
//     side. Rows come through shared memory by asynchronous copies, some steps ahead. A thread has
//     two channels and kStrip columns: filters, unfinished rows of y and sums in registers. Row
//     q = S t + u of step t meets row t - m of y through row a = S m + u of the filter, so that
//     ceil(K / S) rows of y are unfinished at a time: slots of a ring, whose index is known when
//     compiled since as many steps are unrolled.
// Traffic: x once (halos of columns from the caches, K - S rows where a segment begins), y once;
//     2 K K operations for 2 elements at stride 1.
// Numerics: fp32 products and sums in one order, rounded once. Sums of deviations from a thread's
//     first y in fp32, moved to the pivot and added in fp64; the order depends on the shape alone.
// Limits: two channels in one access: C even, maps aligned to that. Else depthwise_general.h.
#pragma once

#include "cuda/channel_sums.h"
#include "cuda/depthwise_rows.h"

namespace emo_kernels::cuda {

template <class T>
struct ForwardArgs {
  Geometry g;
  Plan plan;
  const T* x;        // (N, H, W, C)
  T* y;              // (N, HO, WO, C)
  Vector weight;     // (C, K, K)
  Vector pivot;      // (C,) or absent
  double* partials;  // (programs, 2, C), or null: no statistics
};

template <class T, int K, int S, int kStrip>
class Forward {
 public:
  using Args = ForwardArgs<T>;

  EMO_KERNEL Forward(const Args& args, const Place& place, void* shared)
      : args_(args),
        place_(place),
        shared_(shared),
        c_(first_channel(args.plan, place, 2)),
        strip_(place.slot % args.plan.span),
        plane_(place.slot / args.plan.span) {}

  static int64_t shared_bytes(const Args& args) {
    const Plan& plan = args.plan;
    const int64_t rows = int64_t{kBuffers} * S * plan.planes * width(plan) * plan.groups;
    const int64_t sums = 4 * int64_t{sizeof(double)} * plan.slots * plan.groups;
    const int64_t bytes = rows * int64_t{sizeof(Pair<T>)};
    return args.partials != nullptr && sums > bytes ? sums : bytes;
  }

  // The steps of a block: `each` runs a step on all its threads, and ends with a barrier;
  // each.then without one.
  template <class Each>
  EMO_KERNEL static void run(const Args& args, int64_t block, const Each& each) {
    each.then([](Forward& self) {
      if (self.c_ >= 0) self.filters_.load(self.args_.weight, self.c_);
    });
    for (int64_t round = 0; round < args.plan.rounds; ++round) {
      const int64_t unit = unit_of(args.plan, block, round);
      if (unit >= args.plan.units) break;
      const int steps = unit_rows(args.plan, unit) + kRing - 1;
      each([&](Forward& self) { self.begin(unit); });
      each.then([&](Forward& self) {
        for (int t = 0; t < kBuffers - 1; ++t) self.fetch(t);
      });
      unrolled_steps<kRing>(steps, [&](int phase, int t) {
        each([&](Forward& self) { self.copies_.template wait<kBuffers - 2>(); });
        each.then([&](Forward& self) {
          self.fetch(t + kBuffers - 1);
          self.step(phase, t);
        });
      });
    }
    if (args.partials == nullptr) return;
    each([](Forward&) {});
    each([](Forward& self) {
      self.statistics_.publish(self.args_.plan, self.place_, self.args_.pivot, self.c_,
                               static_cast<double*>(self.shared_));
    });
    each.then([](Forward& self) {
      Statistics<Float2>::collect(self.args_.plan, self.place_, self.c_, self.args_.g.C,
                                  static_cast<double*>(self.shared_), self.args_.partials);
    });
  }

 private:
  static constexpr int kRing = kUnfinished<K, S>, kBuffers = kStages<T, S>;
  static constexpr int kColumns = (kStrip - 1) * S + K;  // of x, that a strip of y meets

  EMO_ANYWHERE static int width(const Plan& plan) { return (plan.span * kStrip - 1) * S + K; }

  // The buffer of row q = S t + u, at the thread's plane and pair of channels.
  EMO_KERNEL Pair<T>* buffer(int t, int u) const {
    const Plan& plan = args_.plan;
    const int plane = ((t % kBuffers) * S + u) * plan.planes + plane_;
    return static_cast<Pair<T>*>(shared_) + plane * width(plan) * plan.groups + place_.group;
  }

  EMO_KERNEL void begin(int64_t unit) {
    tile_ = tile_of(args_.plan, unit, place_.slot);
    const Geometry& g = args_.g;
    row0_ = S * (tile_.lattice_row + g.D * tile_.first_row) - g.P;
    col0_ = S * (tile_.lattice_col + g.D * tile_.first_col) - g.P;
#pragma unroll
    for (int r = 0; r < kRing; ++r) {
#pragma unroll
      for (int j = 0; j < kStrip; ++j) ring_[r][j] = {0.0f, 0.0f};
    }
  }

  // Whether row q of the tile lies in x, and this thread works on it.
  EMO_KERNEL bool has_row(int q) const {
    const bool wanted = tile_.live && c_ >= 0 && q < S * (tile_.rows + kRing - 1);
    return wanted && inside(row0_ + args_.g.D * q, args_.g.H);
  }

  EMO_KERNEL void fetch(int t) {
    const Geometry& g = args_.g;
    const Plan& plan = args_.plan;
#pragma unroll
    for (int u = 0; u < S; ++u) {
      if (!has_row(S * t + u)) continue;
      const int row = row0_ + g.D * (S * t + u);
      const int64_t offset = ((tile_.n * g.H + row) * g.W + col0_) * g.C + c_;
      const Share share{strip_, plan.span, width(plan)};
      start_row(copies_, buffer(t, u), plan.groups, args_.x, offset, col0_, g.D, g.C, g.W, share);
    }
    copies_.close_group();
  }

  EMO_KERNEL void step(int phase, int t) {
#pragma unroll
    for (int j = 0; j < kStrip; ++j) ring_[phase][j] = {0.0f, 0.0f};
#pragma unroll
    for (int u = 0; u < S; ++u) {
      if (has_row(S * t + u)) add_row(phase, t, u);
    }
    if (t >= kRing - 1 && tile_.live && c_ >= 0) {
      store(tile_.first_row + t - (kRing - 1), ring_[(phase + 1) % kRing]);
    }
  }

  // What row q = S t + u of x adds to the unfinished rows of y.
  EMO_KERNEL void add_row(int phase, int t, int u) {
    const int groups = args_.plan.groups;
    const Pair<T>* const row = buffer(t, u) + strip_ * (kStrip * S) * groups;
#pragma unroll
    for (int p = 0; p < kColumns; ++p) {
      const Float2 x = widen(read(row + p * groups));
#pragma unroll
      for (int m = 0; m < kRing; ++m) {
#pragma unroll
        for (int j = 0; j < kStrip; ++j) {
          const int a = S * m + u, b = p - S * j;
          Float2& y = ring_[(phase - m + kRing) % kRing][j];
          if (a < K && b >= 0 && b < K) y = fused(filters_.tap[a * K + b], x, y);
        }
      }
    }
  }

  EMO_KERNEL void store(int tile_row, const Float2 (&values)[kStrip]) {
    const Geometry& g = args_.g;
    const int row = tile_.lattice_row + g.D * tile_row;
    const int strip_col = tile_.first_col + strip_ * kStrip;
    const int col0 = tile_.lattice_col + g.D * strip_col;
    if (row >= g.HO) return;
    T* const y = args_.y + (((tile_.n * g.HO + row) * g.WO + col0) * g.C + c_);
#pragma unroll
    for (int j = 0; j < kStrip; ++j) {
      if (col0 + j * g.D >= g.WO) break;
      const Pair<T> packed = pack<T>(values[j]);
      write_packed<Float2>(y + int64_t{j} * g.D * g.C, packed);
      if (args_.partials != nullptr) statistics_.add(widen(packed));
    }
  }

  const Args& args_;
  const Place place_;
  void* const shared_;
  const int c_, strip_, plane_;
  Copies copies_;
  Filters<K> filters_;
  Float2 ring_[kRing][kStrip];
  Statistics<Float2> statistics_;
  Tile tile_;
  int row0_ = 0, col0_ = 0;  // of x, where the tile's step 0 and its span begin
};

}  // namespace emo_kernels::cuda
