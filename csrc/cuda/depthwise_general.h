// The depthwise convolution and its gradients for every kernel size, stride, dilation and number of
// channels, and for maps at any address.
//
// Computes: as depthwise_forward.h and depthwise_backward.h.
// Tiling: a thread has one channel and a column of a segment of rows, and goes tap by tap; filters
//     and neighbours come from the caches. One gradient a launch; that of the filters goes over
//     its pixels again for each tap.
// Traffic: as there where the caches hold a few rows; K K loads a result.
// Numerics: as there.
// Limits: fp32, fp16, bf16.
#pragma once

#include "cuda/depthwise_backward.h"
#include "cuda/depthwise_forward.h"

namespace emo_kernels::cuda {

// A thread of the general kernels: walks its column in every unit of its block.
template <class Args_>
class General {
 public:
  using Args = Args_;
  static constexpr int kBlockThreads = kThreads;

  EMO_KERNEL General(const Args& args, const Place& place, void* shared)
      : args_(args),
        place_(place),
        shared_(static_cast<double*>(shared)),
        c_(first_channel(args.plan, place, 1)) {}

  static int64_t shared_bytes(const Args& args) {
    return 4 * int64_t{sizeof(double)} * args.plan.slots * args.plan.groups;
  }

 protected:
  // pixel(n, row, col) for every pixel of the plan that is the thread's.
  template <class Pixel>
  EMO_KERNEL void for_pixels(const Pixel& pixel) const {
    const Plan& plan = args_.plan;
    if (c_ < 0) return;
    for (int64_t round = 0; round < plan.rounds; ++round) {
      const int64_t unit = unit_of(plan, place_.block, round);
      if (unit >= plan.units) return;
      const Tile tile = tile_of(plan, unit, place_.slot);
      const int col = tile.first_col + place_.slot % plan.span;
      if (!tile.live || col >= plan.cols) continue;
      for (int r = 0; r < tile.rows; ++r) pixel(tile.n, tile.first_row + r, col);
    }
  }

  EMO_KERNEL float tap(int a, int b) const {
    const Geometry& g = args_.g;
    return elements<float>(args_.weight, (int64_t{c_} * g.K + a) * g.K + b);
  }

  // Where pixel (row, col) of image n of a map of H x W pixels has the thread's channel.
  EMO_KERNEL int64_t offset(int64_t n, int row, int col, int H, int W) const {
    return ((n * H + row) * W + col) * args_.g.C + c_;
  }

  const Args& args_;
  const Place place_;
  double* const shared_;
  const int c_;
};

template <class T>
class GeneralForward : public General<ForwardArgs<T>> {
 public:
  using Args = ForwardArgs<T>;
  using General<Args>::General;

  template <class Each>
  EMO_KERNEL static void run(const Args& args, int64_t, const Each& each) {
    each.then([](GeneralForward& self) {
      self.for_pixels([&](int64_t n, int row, int col) { self.store(n, row, col); });
    });
    if (args.partials == nullptr) return;
    each([](GeneralForward& self) {
      self.statistics_.publish(self.args_.plan, self.place_, self.args_.pivot, self.c_,
                               self.shared_);
    });
    each.then([](GeneralForward& self) {
      Statistics<float>::collect(self.args_.plan, self.place_, self.c_, self.args_.g.C,
                                 self.shared_, self.args_.partials);
    });
  }

 private:
  EMO_KERNEL void store(int64_t n, int row, int col) {
    const Geometry& g = this->args_.g;
    float y = 0.0f;
    for (int a = 0; a < g.K; ++a) {
      const int x_row = g.S * row + g.D * a - g.P;
      if (!inside(x_row, g.H)) continue;
      for (int b = 0; b < g.K; ++b) {
        const int x_col = g.S * col + g.D * b - g.P;
        if (!inside(x_col, g.W)) continue;
        const T x = read(this->args_.x + this->offset(n, x_row, x_col, g.H, g.W));
        y = fused(this->tap(a, b), widen(x), y);
      }
    }
    const T stored = pack<T>(y);
    write(this->args_.y + this->offset(n, row, col, g.HO, g.WO), stored);
    if (this->args_.partials != nullptr) statistics_.add(widen(stored));
  }

  Statistics<float> statistics_;
};

// What both gradients share: the gradient at pixel (row, col) of y, and the plan's role.
template <class T>
class GeneralInputGradient : public General<BackwardArgs<T>> {
 public:
  using Args = BackwardArgs<T>;

  EMO_KERNEL GeneralInputGradient(const Args& args, const Place& place, void* shared)
      : General<Args>(args, place, shared), dy_{args.grad, args.y} {
    if (this->c_ >= 0) dy_.load_coefficients(args.coefficients, args.g.C, this->c_);
  }

  template <class Each>
  EMO_KERNEL static void run(const Args&, int64_t, const Each& each) {
    each.then([](GeneralInputGradient& self) {
      self.for_pixels([&](int64_t n, int row, int col) { self.store(n, row, col); });
    });
  }

 private:
  EMO_KERNEL void store(int64_t n, int row, int col) {
    const Geometry& g = this->args_.g;
    float dx = 0.0f;
    for (int a = g.K - 1; a >= 0; --a) {
      const int y_row = row + g.P - g.D * a;
      if (y_row % g.S != 0 || !inside(y_row / g.S, g.HO)) continue;
      for (int b = g.K - 1; b >= 0; --b) {
        const int y_col = col + g.P - g.D * b;
        if (y_col % g.S != 0 || !inside(y_col / g.S, g.WO)) continue;
        const int64_t at = this->offset(n, y_row / g.S, y_col / g.S, g.HO, g.WO);
        dx = fused(this->tap(a, b), dy_.read_at(at), dx);
      }
    }
    const int64_t at = this->offset(n, row, col, g.H, g.W);
    if (this->args_.local_grad != nullptr) dx += widen(read(this->args_.local_grad + at));
    write(this->args_.dx + at, pack<T>(dx));
  }

  OutputGradient<T, float> dy_;
};

template <class T>
class GeneralFilterGradient : public General<BackwardArgs<T>> {
 public:
  using Args = BackwardArgs<T>;

  EMO_KERNEL GeneralFilterGradient(const Args& args, const Place& place, void* shared)
      : General<Args>(args, place, shared), dy_{args.grad, args.y} {
    if (this->c_ >= 0) dy_.load_coefficients(args.coefficients, args.g.C, this->c_);
  }

  template <class Each>
  EMO_KERNEL static void run(const Args& args, int64_t, const Each& each) {
    for (int tap = 0; tap < args.g.K * args.g.K; ++tap) {
      each([&](GeneralFilterGradient& self) { self.publish(tap); });
      each([&](GeneralFilterGradient& self) { self.collect(tap); });
    }
  }

 private:
  EMO_KERNEL void publish(int tap) {
    const Geometry& g = this->args_.g;
    float sum = 0.0f;
    this->for_pixels([&](int64_t n, int row, int col) {
      const int x_row = g.S * row + g.D * (tap / g.K) - g.P;
      const int x_col = g.S * col + g.D * (tap % g.K) - g.P;
      if (!inside(x_row, g.H) || !inside(x_col, g.W)) return;
      const T x = read(this->args_.x + this->offset(n, x_row, x_col, g.H, g.W));
      sum = fused(dy_.read_at(this->offset(n, row, col, g.HO, g.WO)), widen(x), sum);
    });
    write(shared_slot(this->shared_, this->args_.plan, this->place_, 0, this->place_.slot),
          double{sum});
  }

  EMO_KERNEL void collect(int tap) const {
    const Geometry& g = this->args_.g;
    const Plan& plan = this->args_.plan;
    if (this->place_.slot != 0 || this->c_ < 0) return;
    const int64_t row = this->place_.block / plan.blocks_c * g.K * g.K + tap;
    write(this->args_.partials + row * g.C + this->c_,
          static_cast<float>(slots_sum(this->shared_, plan, this->place_, 0)));
  }

  OutputGradient<T, float> dy_;
};

}  // namespace emo_kernels::cuda
