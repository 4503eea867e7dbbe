// Computes: out[c taps + t] = sum over the rows of partials (rows, taps, C), as blocks left them.
// Tiling: a block has 32 columns; its slots sum every 16th row, then slot 0 the slots.
// Traffic: the partials once; one addition an element.
// Numerics: fp64, in an order that depends on the sizes alone, rounded once.
// Limits: none.
#pragma once

#include "cuda/depthwise_tiles.h"

namespace emo_kernels::cuda {

template <class Partial>
struct SumArgs {
  const Partial* partials;
  int64_t rows, taps, C;
  void* out;
  DType dtype;  // of out
};

template <class Partial>
class SumPartials {
 public:
  using Args = SumArgs<Partial>;
  static constexpr int kColumns = 32, kSlots = 16;

  EMO_KERNEL SumPartials(const Args& args, const Place& place, void* shared)
      : args_(args), place_(place), shared_(static_cast<double*>(shared)) {}

  static int64_t shared_bytes(const Args&) { return int64_t{sizeof(double)} * kColumns * kSlots; }

  template <class Each>
  EMO_KERNEL static void run(const Args&, int64_t, const Each& each) {
    each([](SumPartials& self) { self.publish(); });
    each.then([](SumPartials& self) { self.collect(); });
  }

 private:
  EMO_KERNEL int64_t column() const { return place_.block * kColumns + place_.group; }

  EMO_KERNEL void publish() {
    const int64_t size = args_.taps * args_.C;
    double sum = 0.0;
    for (int64_t row = place_.slot; row < args_.rows && column() < size; row += kSlots) {
      sum += static_cast<double>(read(args_.partials + row * size + column()));
    }
    write(shared_ + place_.slot * kColumns + place_.group, sum);
  }

  EMO_KERNEL void collect() const {
    if (place_.slot != 0 || column() >= args_.taps * args_.C) return;
    double sum = 0.0;
    for (int slot = 0; slot < kSlots; ++slot) {
      sum += read(shared_ + slot * kColumns + place_.group);
    }
    const int64_t c = column() % args_.C, tap = column() / args_.C;
    set_element(args_.out, args_.dtype, c * args_.taps + tap, sum);
  }

  const Args& args_;
  const Place place_;
  double* const shared_;
};

}  // namespace emo_kernels::cuda
