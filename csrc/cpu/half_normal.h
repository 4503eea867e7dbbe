// The normal distribution of GELU in fp32: Phi(x) - 1/2 for x >= 0.
#pragma once

#include "cpu/simd.h"

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

// Of c0 + r (c1 + ...), r in [-1/2, 1/2], around as many points from 0 to 5.5 as a vector has
// lanes: interpolations at the Chebyshev nodes, off by 0.9 u at most with 16, 1.2 u with 8. The
// last is 1/2 at r = 0, the end.
#if defined(EMO_ISA_AVX512)
using Lookups = __m512;
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

EMO_INLINE __m512 entries(const float* table, __m512 index) {
  return _mm512_permutexvar_ps(_mm512_castps_si512(index), load<__m512>(table));
}
EMO_INLINE __m512 magnitude(__m512 x) { return _mm512_abs_ps(x); }
#elif defined(EMO_ISA_AVX2)
using Lookups = __m256;
alignas(32) constexpr float kHalfNormal[7][8] = {
    {0.0f, 0.283982545f, 0.441958427f, 0.490791917f, 0.499163449f, 0.499957263f, 0.499998778f,
     0.5f},
    {0.313454539f, 0.230207667f, 0.09119156f, 0.0194839109f, 0.00224537659f, 0.000139579584f,
     4.68112057e-06f, 1.14801867e-06f},
    {0.0f, -0.0710588917f, -0.0562967882f, -0.0180425793f, -0.00277236081f, -0.000215410037f,
     -8.66689152e-06f, 1.6831189e-05f},
    {-0.0322441608f, -0.00906777009f, 0.0137823988f, 0.00913654082f, 0.00205141027f,
     0.000207000805f, 1.01631977e-05f, 0.000116918709f},
    {0.0f, 0.00870805513f, 0.00153821625f, -0.00237258966f, -0.000981188263f, -0.000137763651f,
     -8.55539929e-06f, 0.000388605054f},
    {0.00290563563f, -0.000202810901f, -0.00161965878f, 1.09705616e-05f, 0.000291181525f,
     6.80803787e-05f, 5.84649706e-06f, 0.000622321153f},
    {0.0f, -0.000675502932f, 0.000202673356f, 0.000184875607f, -3.83153783e-05f, -2.27438723e-05f,
     -2.75640355e-06f, 0.00038263679f}};

EMO_INLINE __m256 entries(const float* table, __m256 index) {
  return _mm256_permutevar8x32_ps(load<__m256>(table), _mm256_castps_si256(index));
}
EMO_INLINE __m256 magnitude(__m256 x) { return _mm256_andnot_ps(splat<__m256>(-0.0f), x); }
#endif

#if defined(EMO_ISA_AVX512) || defined(EMO_ISA_AVX2)
// The lookups go to other ports than the multiplications, of which there are fewer than half as
// many as in one polynomial: on Zen 4 a vector of GELU takes 13 instead of 24 cycles with AVX-512,
// 10 instead of 18 with AVX2.
EMO_INLINE Lookups half_normal(Lookups x) {
  constexpr int kDegree = sizeof(kHalfNormal) / sizeof(kHalfNormal[0]) - 1;
  constexpr float kScale = (kLanesOf<float> - 1) / 5.5f;
  const Lookups whole = splat<Lookups>(8388608.0f);  // 2^23: adding it rounds to an integer
  const Lookups bounded = min(x, splat<Lookups>(5.5f)), scale = splat<Lookups>(kScale);
  const Lookups shifted = fma(bounded, scale, whole);  // the point is in its low bits
  const Lookups r = fma(bounded, scale, whole - shifted);
  Lookups sum = entries(kHalfNormal[kDegree], shifted);
  unroll<kDegree>(
      EMO_UNROLLED(i) { sum = fma(sum, r, entries(kHalfNormal[kDegree - 1 - i], shifted)); });
  return sum;
}
#endif
#if defined(EMO_ISA_AVX512)
EMO_INLINE __m256 half_normal(__m256 x) { return low_half(half_normal(_mm512_castps256_ps512(x))); }
#endif

}  // namespace
}  // namespace emo_kernels::cpu
