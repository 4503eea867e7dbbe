// What a kernel of the block computes with, and the parameters as its call gives them: in the type
// computed with or, in place of float, in bfloat16.
#pragma once

#include "cpu/bf16.h"
#include "emo_kernels.h"

namespace emo_kernels::cpu {
namespace {

// The kernel computes in T, its maps lie in memory as Map, its GEMMs multiply Terms.
template <class T_, class Map_, class Term_>
struct Types {
  using T = T_;
  using Map = Map_;
  using Term = Term_;
};

// f(pointer to the parameter's first element), null where there is none.
template <class T, class F>
EMO_INLINE void with_elements(const Param& param, F f) {
  if constexpr (sizeof(T) == 4) {
    if (param.dtype == DType::kBFloat16) return f(static_cast<const BFloat16*>(param.data));
  }
  f(static_cast<const T*>(param.data));
}

// Elements [first, first + count), 0 where there is no such parameter, and 0 up to `padded`.
template <class T>
void copy_elements(const Param& param, int64_t first, int64_t count, T* dst, int64_t padded) {
  for (int64_t i = 0; i < padded; ++i) dst[i] = T(0);
  if (param.data == nullptr) return;
  with_elements<T>(param, [&](auto* elements) {
    for (int64_t i = 0; i < count; ++i) dst[i] = value_of(elements[first + i]);
  });
}

// Element i, or `absent` where there is no such parameter.
template <class T>
EMO_INLINE T element(const Param& param, int64_t i, T absent) {
  if (param.data == nullptr) return absent;
  T value;
  with_elements<T>(
      param, [&](auto* elements) __attribute__((always_inline)) { value = value_of(elements[i]); });
  return value;
}

}  // namespace
}  // namespace emo_kernels::cpu
