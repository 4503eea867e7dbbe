// Computes  numbers in another dtype, or zeros.
// Tiling    none: by one thread, as long as the longest vector of a block or one of its weights.
// Traffic   reads and writes them once.
// Numerics  rounded once; double to bfloat16 by way of float, as PyTorch does.
// Limits    none on sizes.
#include "cpu/convert.h"

#include <cstring>
#include <stdexcept>

namespace emo_kernels::cpu {
namespace {

struct Bits {
  uint16_t value;
};

double value_of(double value) { return value; }
float value_of(float value) { return value; }
float value_of(Bits value) {
  const uint32_t bits = static_cast<uint32_t>(value.value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <class From>
void store(From value, double* to) {
  *to = value;
}
template <class From>
void store(From value, float* to) {
  *to = static_cast<float>(value);
}
// To the nearest, ties to even; NaN stays one.
template <class From>
void store(From value, Bits* to) {
  const float rounded = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to->value = static_cast<uint16_t>(is_nan ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <class From, class To>
void convert_all(const ConvertCall& c) {
  const auto* const from = static_cast<const From*>(c.from);
  auto* const to = static_cast<To*>(c.to);
  for (int64_t i = 0; i < c.count; ++i) store(value_of(from ? from[i] : From{}), to + i);
}

template <class From>
void convert_from(const ConvertCall& c) {
  switch (c.dtype) {
    case DType::kFloat32:
      return convert_all<From, float>(c);
    case DType::kFloat64:
      return convert_all<From, double>(c);
    case DType::kBFloat16:
      return convert_all<From, Bits>(c);
  }
}

}  // namespace

void convert(const ConvertCall& call) {
  if (call.to == nullptr && call.count > 0) throw std::invalid_argument("convert: a null pointer");
  switch (call.from_dtype) {
    case DType::kFloat32:
      return convert_from<float>(call);
    case DType::kFloat64:
      return convert_from<double>(call);
    case DType::kBFloat16:
      return convert_from<Bits>(call);
  }
}

}  // namespace emo_kernels::cpu
