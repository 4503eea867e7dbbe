// Activations on vectors: SiLU, GELU (exact erf form), ReLU.
//
// fp32 uses short polynomials, fp64 the C library lane by lane. Errors of either, in units u of its
// roundoff, over a dense sample of all finite floats (tests/test_activation.py holds them):
//   SiLU          absolute <= 6 u max(|silu(x)|, 1/4)
//   GELU          absolute <= 4 u max(|x|, 1/4), and 0 far below 0
//   their slopes  absolute <= 20 u (of 1 - sigmoid(x) times a large x), 5 u
//   softmax       x times the weight of 2 scores 0 and x: absolute <= 8 u max(|silu(x)|, 1/4)
//   sigmoid       silu(x) times that of silu(x): absolute <= 10 u max(|of it|, 1/4)
// Where bfloat16 is all that becomes of the result (kShort), with AVX-512, before its rounding:
//   SiLU          relative <= 2^-12
//   GELU          absolute <= 2^-14 |x|, and 0 below -4
#pragma once

#include <math.h>

#include "cpu/half_normal.h"
#include "cpu/simd.h"
#include "emo_kernels.h"

namespace emo_kernels::cpu {
namespace {

// 2^t for any float t: 0 and inf at the ends, NaN for NaN.
template <class V>
EMO_INLINE V exp2_any(V t) {
  constexpr int kLanes = sizeof(V) / sizeof(float);
  using Int = Vec<int32_t, kLanes>;
  V bounded = t < -126.0f ? splat<V>(-126.0f) : t;
  bounded = bounded > 127.0f ? splat<V>(127.0f) : bounded;
  const V magic = splat<V>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = bounded + magic;
  const V f = bounded - (shifted - magic);
  const V p = polynomial(f, 1.0000000716543664f, 0.6931469670549257f, 0.24022119724872995f,
                         0.05550713289561202f, 0.00967554129296665f, 0.0013276466799694608f);
  Int exponent;
  __builtin_memcpy(&exponent, &shifted, sizeof(V));
  exponent = (exponent + 127) << 23;
  V scale;
  __builtin_memcpy(&scale, &exponent, sizeof(V));
  const V inf = splat<V>(__builtin_inff());
  const V result = t > 127.0f ? inf : p * scale;
  return t < -126.0f ? V{} : result;
}

#if defined(EMO_ISA_AVX2)
// The exponents -127 and 128 are those of 0 and of infinity: t is held between them, which leaves
// nothing to choose at the ends.
EMO_INLINE __m256 exp2_any(__m256 t) {
  const __m256 magic = splat<__m256>(12583039.0f);  // 1.5 * 2^23, and 127: the exponent's bias
  const __m256 bounded = min(max(t, splat<__m256>(-127.0f)), splat<__m256>(128.0f));
  const __m256 shifted = bounded + magic;
  const __m256 f = bounded - (shifted - magic);
  const __m256 p = polynomial(f, 1.0000000716543664f, 0.6931469670549257f, 0.24022119724872995f,
                              0.05550713289561202f, 0.00967554129296665f, 0.0013276466799694608f);
  return p * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
}
#elif defined(EMO_ISA_AVX512)
EMO_INLINE __m512 exp2_any(__m512 t) {
  const __m512 f = _mm512_reduce_ps(t, 0x09);  // t - floor(t)
  const __m512 p = polynomial(f, 0.9999999250645683f, 0.6931530731418452f, 0.24015361754833756f,
                              0.05582631656157519f, 0.008989341868004146f, 0.001877575940748459f);
  return _mm512_scalef_ps(p, t);
}

EMO_INLINE __m256 exp2_any(__m256 t) {
  const __m256 f = _mm256_reduce_ps(t, 0x09);
  const __m256 p = polynomial(f, 0.9999999250645683f, 0.6931530731418452f, 0.24015361754833756f,
                              0.05582631656157519f, 0.008989341868004146f, 0.001877575940748459f);
  return _mm256_scalef_ps(p, t);
}
#endif

#if defined(EMO_ISA_AVX512)
// 2^t to a relative 2^-13.7: degree 3 minimax on [0, 1).
EMO_INLINE __m512 exp2_short(__m512 t) {
  const __m512 p = polynomial(_mm512_reduce_ps(t, 0x09), 0.9999252185963512f, 0.6958335397796155f,
                              0.22606715750976042f, 0.07802452117763449f);
  return _mm512_scalef_ps(p, t);
}
EMO_INLINE __m256 exp2_short(__m256 t) {
  const __m256 p = polynomial(_mm256_reduce_ps(t, 0x09), 0.9999252185963512f, 0.6958335397796155f,
                              0.22606715750976042f, 0.07802452117763449f);
  return _mm256_scalef_ps(p, t);
}
EMO_INLINE __m512 reciprocal_short(__m512 x) { return _mm512_rcp14_ps(x); }
EMO_INLINE __m256 reciprocal_short(__m256 x) { return _mm256_rcp14_ps(x); }
#endif

EMO_INLINE double exponential_of(double x) { return ::exp(x); }
EMO_INLINE double silu_of(double x) { return x / (1.0 + ::exp(-x)); }
EMO_INLINE double gelu_of(double x) { return x * (0.5 * (1.0 + ::erf(x * 0.70710678118654752))); }

template <double (*kFunction)(double), class V>
EMO_INLINE V each_lane(V v) {
  constexpr int kLanes = sizeof(V) / sizeof(double);
  for (int i = 0; i < kLanes; ++i) v[i] = kFunction(v[i]);
  return v;
}

template <class T, class V>
EMO_INLINE V exponential(V x) {
  if constexpr (sizeof(T) == 8) {
    return each_lane<exponential_of>(x);
  } else {
    return exp2_any(x * 1.4426950408889634f);
  }
}

template <class T, bool kShort = false, class V>
EMO_INLINE V silu(V x) {
  if constexpr (sizeof(T) == 8) {
    return each_lane<silu_of>(x);
  } else if constexpr (kShort) {
    return x * reciprocal_short(exp2_short(x * -1.4426950408889634f) + 1.0f);
  } else {
    return x / (exp2_any(x * -1.4426950408889634f) + 1.0f);
  }
}

// Phi(x) = 1/2 + x R(x^2), R of degree 7 in s = 2 (x / 4)^2 - 1.
template <class V>
EMO_INLINE V gelu_share_short(V x) {
  V z = x > 4.0f ? splat<V>(4.0f) : x;
  z = z < -4.0f ? splat<V>(-4.0f) : z;
  const V s = fma(z * z, splat<V>(2.0f / 16.0f), splat<V>(-1.0f));
  const V r = polynomial(s, 0.17594291903686549f, -0.08434347079606358f, 0.0561894038345749f,
                         -0.03671144301491064f, 0.02108503077536376f, -0.012560301439123619f,
                         0.008699792414272635f, -0.0033151482904024703f);
  const V phi = fma(z, r, splat<V>(0.5f));
  return x < -4.0f ? V{} : phi;
}

template <class T, bool kShort = false, class V>
EMO_INLINE V gelu(V x) {
  if constexpr (sizeof(T) == 8) {
    return each_lane<gelu_of>(x);
  } else if constexpr (kShort) {
    return x * gelu_share_short(x);
  } else {
    const V size = magnitude(x);
    return fma(size, half_normal(size), x * 0.5f);
  }
}

template <class T, Activation kAct, bool kShort = false, class V>
EMO_INLINE V activate(V x) {
  if constexpr (kAct == Activation::kRelu) {
    return x < T(0) ? V{} : x;
  } else if constexpr (kAct == Activation::kGelu) {
    return gelu<T, kShort>(x);
  } else if constexpr (kAct == Activation::kSilu) {
    return silu<T, kShort>(x);
  } else {
    return x;
  }
}

EMO_INLINE double silu_slope_of(double x) {
  const double s = 1.0 / (1.0 + ::exp(-x));
  return s * (1.0 + x * (1.0 - s));
}
EMO_INLINE double gelu_slope_of(double x) {
  return 0.5 * (1.0 + ::erf(x * 0.70710678118654752)) +
         x * ::exp(-0.5 * x * x) * 0.39894228040143268;
}

// SiLU and its derivative.
template <class T, class V>
EMO_INLINE void silu_and_slope(V x, V& value, V& slope) {
  if constexpr (sizeof(T) == 8) {
    value = each_lane<silu_of>(x);
    slope = each_lane<silu_slope_of>(x);
  } else {
    const V s = 1.0f / (exp2_any(x * -1.4426950408889634f) + 1.0f);
    value = x * s;
    slope = s * fma(x, 1.0f - s, V{} + 1.0f);
  }
}

// Phi(x) + x phi(x), Phi as in gelu.
template <class T, class V>
EMO_INLINE V gelu_slope(V x) {
  if constexpr (sizeof(T) == 8) {
    return each_lane<gelu_slope_of>(x);
  } else {
    const V density = exp2_any(x * x * -0.7213475204444817f) * 0.3989422804014327f;
    const V half = half_normal(magnitude(x));
    return fma(x, density, 0.5f + (x < 0.0f ? -half : half));
  }
}

// The derivative of the activation at x, as PyTorch takes it at the kink of ReLU.
template <class T, Activation kAct, class V>
EMO_INLINE V activate_slope(V x) {
  if constexpr (kAct == Activation::kRelu) {
    return x <= T(0) ? V{} : splat<V>(T(1));
  } else if constexpr (kAct == Activation::kGelu) {
    return gelu_slope<T>(x);
  } else if constexpr (kAct == Activation::kSilu) {
    V value, slope;
    silu_and_slope<T>(x, value, slope);
    return slope;
  } else {
    return splat<V>(T(1));
  }
}

// The activation and its derivative.
template <class T, Activation kAct, class V>
EMO_INLINE void activate_and_slope(V x, V& value, V& slope) {
  if constexpr (kAct == Activation::kSilu) {
    silu_and_slope<T>(x, value, slope);
  } else {
    value = activate<T, kAct>(x);
    slope = activate_slope<T, kAct>(x);
  }
}

template <Activation kAct>
struct ActivationIs {
  static constexpr Activation value = kAct;
};

// f(act) with a compile-time activation.
template <class F>
EMO_INLINE void with_activation(Activation act, F f) {
  switch (act) {
    case Activation::kNone:
      return f(ActivationIs<Activation::kNone>{});
    case Activation::kRelu:
      return f(ActivationIs<Activation::kRelu>{});
    case Activation::kGelu:
      return f(ActivationIs<Activation::kGelu>{});
    case Activation::kSilu:
      return f(ActivationIs<Activation::kSilu>{});
  }
}

EMO_INLINE float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
EMO_INLINE double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }

}  // namespace
}  // namespace emo_kernels::cpu
