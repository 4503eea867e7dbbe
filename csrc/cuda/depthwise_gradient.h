// What the backward kernels of the depthwise convolution share: their arguments, where the rows of
// a plane lie, and the gradient at the convolution's output.
#pragma once

#include "cuda/depthwise_tiles.h"

namespace emo_kernels::cuda {

enum Role : int { kInputGradient = 0, kFilterGradient = 1 };

// Where the rows (or columns) of a plane lie. Row r of a plane is row i = r + `first` - lead of dy
// on its lattice and group r + `first` of S rows of dx, whose row 0 is q = P. From `own` on, the
// filters' gradient counts rows of dy as its own: row 0 of dy, or the first that x meets.
struct Extent {
  int first, lead, own, length;
};

inline Extent extent(int S, int P, int D, int lead, int in, int out) {
  const int first = P / D / S;
  const int own = first > lead ? 0 : lead - first;
  const int groups = (in - 1 + P) / D / S - first + 1;
  const int rows = static_cast<int>(ceil_div(out, D)) + lead - first - own;
  return {first, lead, own, most(most(groups, rows), 1)};
}

template <class T>
struct BackwardArgs {
  Geometry g;
  Plan plan;
  Extent rows, cols;
  const T* grad;        // (N, HO, WO, C)
  const T* y;           // as grad, or null: no batch norm
  const T* x;           // (N, H, W, C), for the filters
  const T* local_grad;  // as x, or null
  T* dx;                // as x
  Vector weight;        // (C, K, K)
  Vector coefficients;  // (4, C), with y
  float* partials;      // (programs, K K, C)
  int first_role;       // of the threads with threadIdx.z = 0
  int roles;            // 1 or 2
};

// The gradient at y, of one channel or two.
template <class T, class Value>
struct OutputGradient {
  const T* grad;
  const T* normed;  // y, or null: no batch norm
  Value c1{}, c2{}, c3{}, mean{};

  EMO_KERNEL void load_coefficients(const Vector& rows, int64_t C, int c) {
    if (normed == nullptr) return;
    c1 = elements<Value>(rows, c);
    c2 = elements<Value>(rows, C + c);
    c3 = elements<Value>(rows, 2 * C + c);
    mean = elements<Value>(rows, 3 * C + c);
  }

  EMO_KERNEL Value behind_norm(Value dz, Value y) const {
    return fused(c1, dz, fused(c2, y - mean, c3));
  }

  EMO_KERNEL Value read_at(int64_t offset) const {
    const Value dz = widen(read_packed<Value>(grad + offset));
    if (normed == nullptr) return dz;
    return behind_norm(dz, widen(read_packed<Value>(normed + offset)));
  }
};

}  // namespace emo_kernels::cuda
