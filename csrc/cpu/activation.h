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

#include "cpu/simd.h"
#include "emo_kernels.h"

namespace emo_kernels::cpu {
namespace {

template <class T>
EMO_INLINE T polynomial(T, float c) {
  return T{} + c;
}

// c0 + x (c1 + x (c2 + ...)): Horner, from the last coefficient down.
template <class V, class... Rest>
EMO_INLINE V polynomial(V x, float c, Rest... rest) {
  return fma(polynomial(x, rest...), x, V{} + c);
}

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

#if defined(EMO_ISA_AVX512)
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

template <class V>
EMO_INLINE V magnitude(V x) {
  return x < 0.0f ? -x : x;
}

// Phi(x) - 1/2 for x >= 0: x R(x^2), R a degree 15 minimax polynomial in s = 2 (x / 5.5)^2 - 1.
template <class V>
EMO_INLINE V half_normal(V x) {
  const V s = fma(x * x, splat<V>(2.0f / 30.25f), splat<V>(-1.0f));
  const V r = polynomial(s, 0.12855193082978283f, -0.06417233826226573f, 0.04773763490288317f,
                         -0.0387928061096815f, 0.032070111859877f, -0.026047967626207473f,
                         0.02036560854167636f, -0.015000822968576445f, 0.010224367706978588f,
                         -0.006814708023678894f, 0.00462760515081942f, -0.0024267842992698315f,
                         0.000715295576924523f, -0.0005227622861213735f, 0.0006331060436826677f,
                         -0.0002383851283422086f);
  return x > 5.5f ? splat<V>(0.5f) : x * r;
}

#if defined(EMO_ISA_AVX512)
// Of c0 + r (c1 + ...), r in [-1/2, 1/2], around the points i 5.5 / 15: interpolations at the
// Chebyshev nodes, off by 0.9 u at most. The last is constant.
alignas(64) constexpr float kHalfNormal[6][16] = {
    {0.0f, 0.143066153f, 0.268322408f, 0.364333928f, 0.428766638f, 0.466623485f, 0.486096561f,
     0.494865924f, 0.498323292f, 0.499516577f, 0.499877125f, 0.499972492f, 0.499994576f,
     0.499999076f, 0.499999851f, 0.5f},
    {0.146278828f, 0.136768863f, 0.111790404f, 0.0798791349f, 0.0498969108f, 0.027247427f,
     0.0130073503f, 0.00542829838f, 0.00198038714f, 0.000631608593f, 0.000176099245f,
     4.29218599e-05f, 9.14557859e-06f, 1.70355213e-06f, 2.77403132e-07f, 0.0f},
    {0.0f, -0.00919368677f, -0.0150293373f, -0.0161088351f, -0.013416769f, -0.00915828068f,
     -0.00524639012f, -0.00255434983f, -0.00106500287f, -0.000382106635f, -0.000118365024f,
     -3.17317536e-05f, -7.3748588e-06f, -1.4879073e-06f, -2.6085857e-07f, 0.0f},
    {-0.00327769248f, -0.00265259133f, -0.00115784525f, 0.000375849748f, 0.00128699292f,
     0.00144156045f, 0.00111921795f, 0.000679671997f, 0.000337453239f, 0.000139970463f,
     4.91039573e-05f, 1.46832854e-05f, 3.76210164e-06f, 8.28996406e-07f, 1.57536348e-07f, 0.0f},
    {0.0f, 0.000292812503f, 0.000411812245f, 0.000321736967f, 0.000128072614f, -3.57963909e-05f,
     -0.000107167842f, -0.000102313366f, -6.6930821e-05f, -3.39555045e-05f, -1.39887125e-05f,
     -4.78788206e-06f, -1.37960569e-06f, -3.37512802e-07f, -7.05128969e-08f, 0.0f},
    {6.57055934e-05f, 4.53302928e-05f, 1.15380169e-06f, -3.3363176e-05f, -3.94778945e-05f,
     -2.40662794e-05f, -5.20464982e-06f, 5.53710925e-06f, 7.54343182e-06f, 5.35018262e-06f,
     2.74419244e-06f, 1.1074676e-06f, 3.64567143e-07f, 9.98025627e-08f, 2.29901271e-08f, 0.0f}};

EMO_INLINE __m512 magnitude(__m512 x) { return _mm512_abs_ps(x); }

// Degree 5 on 16 intervals: the lookups go to other ports than the multiplications, of which there
// are half as many as in one polynomial: 13 instead of 24 cycles a vector of GELU on Zen 4.
EMO_INLINE __m512 half_normal(__m512 x) {
  const __m512 whole = splat<__m512>(8388608.0f);  // 2^23: adding it rounds to an integer
  const __m512 bounded = _mm512_min_ps(x, splat<__m512>(5.5f)), scale = splat<__m512>(15 / 5.5f);
  const __m512 shifted = fma(bounded, scale, whole);
  const __m512 r = fma(bounded, scale, whole - shifted);
  const __m512i interval = _mm512_castps_si512(shifted);  // its low bits
  __m512 sum = _mm512_permutexvar_ps(interval, load<__m512>(kHalfNormal[5]));
  unroll<5>(EMO_UNROLLED(i) {
    sum = fma(sum, r, _mm512_permutexvar_ps(interval, load<__m512>(kHalfNormal[4 - i])));
  });
  return sum;
}

EMO_INLINE __m256 half_normal(__m256 x) { return low_half(half_normal(_mm512_castps256_ps512(x))); }
#endif

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
