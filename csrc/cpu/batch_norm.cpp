// Computes  what a batch norm is between its passes over a map: from the sums of x, scale and shift
//           and the moved running statistics; from the sums of dz, the coefficients of dx.
// Tiling    none: a few numbers a channel, by one thread.
// Traffic   that of the vectors.
// Numerics  double, rounded once as it is stored.
// Limits    none on sizes.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "emo_kernels.h"

namespace emo_kernels::cpu {
namespace {

template <class T>
void move(void* running, int64_t c, double to, double momentum) {
  if (running == nullptr) return;
  T& value = static_cast<T*>(running)[c];
  value = static_cast<T>(value + momentum * (to - value));
}

template <class T>
void finalize(const BatchNormCall& call) {
  const auto *pivot = static_cast<const T*>(call.pivot), *bias = static_cast<const T*>(call.bias);
  const auto* const weight = static_cast<const T*>(call.weight);
  auto* const affine = static_cast<T*>(call.affine);
  const int64_t C = call.C;
  for (int64_t c = 0; c < C; ++c) {
    const double off = call.sums[c] / call.count;
    const double var = std::max(call.sums[C + c] / call.count - off * off, 0.0);
    const double mean = pivot ? off + pivot[c] : off;
    const double invstd = 1.0 / std::sqrt(var + call.eps);
    const double scale = weight ? invstd * weight[c] : invstd;
    move<T>(call.running_mean, c, mean, call.momentum);
    move<T>(call.running_var, c, var * (call.count / (call.count - 1.0)), call.momentum);
    affine[c] = static_cast<T>(scale);
    affine[C + c] = static_cast<T>((bias ? bias[c] : 0.0) - mean * scale);
    affine[2 * C + c] = static_cast<T>(mean);
    affine[3 * C + c] = static_cast<T>(invstd);
  }
}

// Without sums: of a norm with its running statistics, dx = scale dz.
template <class T>
void backward_finalize(const BatchNormCall& call) {
  const auto* const affine = static_cast<const T*>(call.affine);
  auto* const coefficients = static_cast<T*>(call.coefficients);
  const int64_t C = call.C;
  for (int64_t c = 0; c < C; ++c) {
    const double factor = -static_cast<double>(affine[c]) / call.count;
    const double sum = call.sums ? call.sums[c] : 0.0, product = call.sums ? call.sums[C + c] : 0.0;
    coefficients[c] = affine[c];
    coefficients[C + c] = static_cast<T>(product * factor * affine[3 * C + c]);
    coefficients[2 * C + c] = static_cast<T>(sum * factor);
    coefficients[3 * C + c] = affine[2 * C + c];
  }
}

}  // namespace

void batch_norm(const BatchNormCall& call) {
  if (call.affine == nullptr || (call.sums == nullptr && call.coefficients == nullptr)) {
    throw std::invalid_argument("batch_norm: a null pointer");
  }
  const bool wide = call.dtype == DType::kFloat64;
  if (call.coefficients) {
    wide ? backward_finalize<double>(call) : backward_finalize<float>(call);
  } else {
    wide ? finalize<double>(call) : finalize<float>(call);
  }
}

}  // namespace emo_kernels::cpu
