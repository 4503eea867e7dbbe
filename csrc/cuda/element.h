// Elements of maps in fp32, fp16 and bf16, alone and in pairs of channels, as the kernels read and
// write them; the same code on the GPU and on the host, bit for bit.
//
// On the host every access is noted, so that a walk can tell what was read and written.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define EMO_ANYWHERE __host__ __device__ __forceinline__
#define EMO_KERNEL __device__ __forceinline__
#else
#define EMO_ANYWHERE inline
#define EMO_KERNEL inline
#endif

#include "emo_kernels_cuda.h"

namespace emo_kernels::cuda {

// Where a walk on the host watches what the kernels' code touches (walk.h).
void note_read(const void* address, int64_t bytes);
void note_write(const void* address, int64_t bytes);
void note_copy(const void* address, int64_t bytes);  // one into shared memory begins

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct Float2 {
  float x, y;
};

EMO_KERNEL float float_of_bits(uint32_t bits) {
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

EMO_KERNEL uint32_t bits_of_float(float value) {
#if defined(__CUDACC__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

// a b + c, rounded once. Written wherever it is meant: nothing else is contracted.
EMO_KERNEL float fused(float a, float b, float c) {
#if defined(__CUDACC__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

EMO_KERNEL Float2 fused(Float2 a, Float2 b, Float2 c) {
  return {fused(a.x, b.x, c.x), fused(a.y, b.y, c.y)};
}
EMO_KERNEL Float2 operator+(Float2 a, Float2 b) { return {a.x + b.x, a.y + b.y}; }
EMO_KERNEL Float2 operator-(Float2 a, Float2 b) { return {a.x - b.x, a.y - b.y}; }

// Channel `i` of the one or two that a value has.
EMO_KERNEL float& channel(float& value, int) { return value; }
EMO_KERNEL float& channel(Float2& value, int i) { return i == 0 ? value.x : value.y; }

template <class Value>
constexpr int kChannels = sizeof(Value) / sizeof(float);

// ---- 16-bit elements ----------------------------------------------------------------------------

EMO_KERNEL float widen(float value) { return value; }

EMO_KERNEL float widen(BFloat16 value) {
  return float_of_bits(static_cast<uint32_t>(value.bits) << 16);
}

EMO_KERNEL float widen(Half value) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t exponent = (value.bits >> 10) & 31, fraction = value.bits & 0x3ff;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent == 0) {  // zero and subnormals: fraction 2^-24
    const float value_of_fraction = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value_of_fraction : value_of_fraction;
  }
  return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
#endif
}

// To the nearest, ties to even.
template <class T>
EMO_KERNEL T narrow(float value);

template <>
EMO_KERNEL float narrow<float>(float value) {
  return value;
}

template <>
EMO_KERNEL BFloat16 narrow<BFloat16>(float value) {
#if defined(__CUDACC__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};  // as the GPU's NaN
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
#endif
}

template <>
EMO_KERNEL Half narrow<Half>(float value) {
#if defined(__CUDACC__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of_float(value), size = bits & 0x7fffffff;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (size > 0x7f800000) return {0x7fff};
  if (size >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 65536 or more
  if (size < 0x38800000) {  // subnormal: adding 0.5 leaves the fraction, rounded, in the low bits
    const uint32_t shifted = bits_of_float(float_of_bits(size) + 0.5f);
    return {static_cast<uint16_t>(sign | (shifted - 0x3f000000))};
  }
  const uint32_t rounded = size + 0xfff + ((size >> 13) & 1) - (112u << 23);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

// ---- one or two channels in one access ----------------------------------------------------------

// Two neighbouring elements as they lie in memory: 4 bytes, or 8 in fp32, which an even number of
// channels keeps aligned.
template <class T>
struct Pair {
  uint32_t bits;
};
template <>
struct alignas(8) Pair<float> {
  float x, y;
};

EMO_KERNEL Float2 widen(Pair<float> pair) { return {pair.x, pair.y}; }

EMO_KERNEL Float2 widen(Pair<BFloat16> pair) {
  return {float_of_bits(pair.bits << 16), float_of_bits(pair.bits & 0xffff0000u)};
}

EMO_KERNEL Float2 widen(Pair<Half> pair) {
  return {widen(Half{static_cast<uint16_t>(pair.bits)}),
          widen(Half{static_cast<uint16_t>(pair.bits >> 16)})};
}

// How T lies in memory where values are Float2, or float.
template <class T, class Value>
struct PackedType {
  using type = Pair<T>;
};
template <class T>
struct PackedType<T, float> {
  using type = T;
};
template <class T, class Value>
using Packed = typename PackedType<T, Value>::type;

template <class T>
EMO_KERNEL T pack(float value) {
  return narrow<T>(value);
}

template <class T>
EMO_KERNEL Pair<T> pack(Float2 value) {
  if constexpr (sizeof(T) == 4) {
    return {value.x, value.y};
  } else {
    const uint32_t low = narrow<T>(value.x).bits, high = narrow<T>(value.y).bits;
    return {low | high << 16};
  }
}

// ---- memory -------------------------------------------------------------------------------------

template <class U>
EMO_KERNEL U read(const U* address) {
#if !defined(__CUDACC__)
  note_read(address, sizeof(U));
#endif
  return *address;
}

template <class U>
EMO_KERNEL void write(U* address, U value) {
#if !defined(__CUDACC__)
  note_write(address, sizeof(U));
#endif
  *address = value;
}

// Value is float or Float2: one channel or two.
template <class Value, class T>
EMO_KERNEL Packed<T, Value> read_packed(const T* address) {
  return read(reinterpret_cast<const Packed<T, Value>*>(address));
}

template <class Value, class T>
EMO_KERNEL void write_packed(T* address, Packed<T, Value> value) {
  write(reinterpret_cast<Packed<T, Value>*>(address), value);
}

EMO_KERNEL double element(const Vector& vector, int64_t index) {
  switch (vector.dtype) {
    case DType::kFloat64:
      return read(static_cast<const double*>(vector.data) + index);
    case DType::kBFloat16:
      return widen(read(static_cast<const BFloat16*>(vector.data) + index));
    case kFloat16:
      return widen(read(static_cast<const Half*>(vector.data) + index));
    default:
      return read(static_cast<const float*>(vector.data) + index);
  }
}

// Elements index, index + stride for the channels of a value.
template <class Value>
EMO_KERNEL Value elements(const Vector& vector, int64_t index, int64_t stride = 1) {
  Value value{};
#pragma unroll
  for (int i = 0; i < kChannels<Value>; ++i) {
    channel(value, i) = static_cast<float>(element(vector, index + i * stride));
  }
  return value;
}

EMO_KERNEL void set_element(void* data, DType dtype, int64_t index, double value) {
  switch (dtype) {
    case DType::kFloat64:
      return write(static_cast<double*>(data) + index, value);
    case DType::kBFloat16:
      return write(static_cast<BFloat16*>(data) + index,
                   narrow<BFloat16>(static_cast<float>(value)));
    case kFloat16:
      return write(static_cast<Half*>(data) + index, narrow<Half>(static_cast<float>(value)));
    default:
      return write(static_cast<float*>(data) + index, static_cast<float>(value));
  }
}

}  // namespace emo_kernels::cuda
