// A sum over a row of scores, in the order of the longest vectors on every instruction set.
#pragma once

#include "cpu/simd.h"

namespace emo_kernels::cpu {
namespace {

// Vectors go to as many parts as the longest vector has lanes: padded keys all score the same, and
// adding equal terms rounds one way, by the more the longer the chain.
template <class T>
class RowSum {
 public:
  using V = Vec<T, kLanesOf<T>>;

  EMO_INLINE V& next() { return parts_[count_++ % kParts]; }
  EMO_INLINE T total() const {
    V sum = parts_[0];
    for (int i = 1; i < kParts; ++i) sum += parts_[i];
    return sum_lanes<V, T>(sum);
  }

 private:
  static constexpr int kParts = 64 / kVectorBytes;
  V parts_[kParts] = {};
  int count_ = 0;
};

}  // namespace
}  // namespace emo_kernels::cpu
