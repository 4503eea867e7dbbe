// Sums over the pixels for each channel: those of a thread, and over the slots of its block.
//
// A plan has `groups` of channels by `slots` threads of each, and `blocks_c` blocks side by side
// for all channels.
#pragma once

#include "cuda/depthwise_tiles.h"

namespace emo_kernels::cuda {

// Every thread publishes a value, those of slot 0 add them up, first to last.
template <class Plan>
EMO_KERNEL double* shared_slot(double* shared, const Plan& plan, const Place& place, int i,
                               int slot) {
  return shared + (i * plan.slots + slot) * plan.groups + place.group;
}

template <class Plan>
EMO_KERNEL double slots_sum(double* shared, const Plan& plan, const Place& place, int i) {
  double sum = 0.0;
  for (int slot = 0; slot < plan.slots; ++slot) {
    sum += read(shared_slot(shared, plan, place, i, slot));
  }
  return sum;
}

// Batch-norm sums of the values that a thread stores.
template <class Value>
struct Statistics {
  Value shift{}, s1{}, s2{};  // the first value, sums of deviations from it and of their squares
  int count = 0;

  EMO_KERNEL void add(Value y) {
    shift = count == 0 ? y : shift;
    const Value deviation = y - shift;
    s1 = s1 + deviation;
    s2 = fused(deviation, deviation, s2);
    ++count;
  }

  // About the pivot, in fp64.
  template <class Plan>
  EMO_KERNEL void publish(const Plan& plan, const Place& place, const Vector& pivot, int c,
                          double* shared) {
#pragma unroll
    for (int i = 0; i < kChannels<Value>; ++i) {
      const bool has_pivot = pivot.data != nullptr && count > 0;
      const double delta = channel(shift, i) - (has_pivot ? element(pivot, c + i) : 0.0);
      const double sum = channel(s1, i), moved = sum + count * delta;
      write(shared_slot(shared, plan, place, 2 * i, place.slot), moved);
      write(shared_slot(shared, plan, place, 2 * i + 1, place.slot),
            channel(s2, i) + delta * (sum + moved));
    }
  }

  // The block's row of partials (programs, 2, C).
  template <class Plan>
  EMO_KERNEL static void collect(const Plan& plan, const Place& place, int c, int C, double* shared,
                                 double* partials) {
    if (place.slot != 0 || c < 0) return;
    double* const row = partials + place.block / plan.blocks_c * 2 * C + c;
    for (int i = 0; i < kChannels<Value>; ++i) {
      write(row + i, slots_sum(shared, plan, place, 2 * i));
      write(row + C + i, slots_sum(shared, plan, place, 2 * i + 1));
    }
  }
};

}  // namespace emo_kernels::cuda
