// Which of the kernels that are compiled per instruction set runs: by the type of its maps and by
// what this machine has.
#pragma once

#include "cpu/isa.h"

#ifdef EMO_HAS_AVX2
#define EMO_CASE_AVX2(name) \
  case Isa::kAvx2:          \
    return wide ? name##_avx2_f32() : name##_avx2_bf16();
#else
#define EMO_CASE_AVX2(name)
#endif
#ifdef EMO_HAS_AVX512
#define EMO_CASE_AVX512(name) \
  case Isa::kAvx512:          \
  case Isa::kAvx512Bf16:      \
    return wide ? name##_avx512_f32() : name##_avx512_bf16();
#else
#define EMO_CASE_AVX512(name)
#endif
#ifdef EMO_HAS_NEON
#define EMO_CASE_NEON(name) \
  case Isa::kNeon:          \
    return wide ? name##_neon_f32() : name##_neon_bf16();
#else
#define EMO_CASE_NEON(name)
#endif

// Of the kernels that multiply pairs of bfloat16.
#ifdef EMO_HAS_AVX512BF16
#define EMO_PAIRS(name) \
  if (isa == Isa::kAvx512Bf16 && !wide) return name##_avx512bf16_bf16();
#else
#define EMO_PAIRS(name)
#endif

// The body of a function that returns name##_<instruction set>_<type> for maps of `dtype`. `pairs`
// is EMO_PAIRS(name) where products of bfloat16 have a kernel of their own, else nothing.
#define EMO_CHOOSE(dtype, name, pairs)                              \
  const Isa isa = selected();                                       \
  const bool wide = dtype != DType::kBFloat16;                      \
  if (dtype == DType::kFloat64) return name##_portable_f64();       \
  pairs switch (isa) {                                              \
    EMO_CASE_AVX512(name)                                           \
    EMO_CASE_AVX2(name)                                             \
    EMO_CASE_NEON(name)                                             \
    default:                                                        \
      return wide ? name##_portable_f32() : name##_portable_bf16(); \
  }
