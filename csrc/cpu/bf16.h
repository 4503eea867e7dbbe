// Maps and weights in bfloat16, computed with in float: what turns one into the other.
//
// load_as<V> and store_as take memory of float, double or BFloat16, so that one kernel, over the
// type it computes in and the type its maps lie in, serves them all.
#pragma once

#include "cpu/simd.h"

namespace emo_kernels::cpu {
namespace {

// As torch.bfloat16 lies in memory: the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

template <class V>
constexpr int kLanesIn = sizeof(V) / sizeof(V{}[0]);

// `count` lanes from memory of the vector's own type or of BFloat16; beyond them 0.
template <class V, class S>
EMO_INLINE V load_as(const S* p, int64_t count = kLanesIn<V>) {
  constexpr int kLanes = kLanesIn<V>;
  if constexpr (sizeof(S) == 2) {
    using Bits = Vec<uint16_t, kLanes>;
    using Wide = Vec<uint32_t, kLanes>;
    Bits bits{};
    if (count >= kLanes) {
      bits = load<Bits>(p);
    } else {
#if defined(EMO_MASKED_ACCESS) && defined(EMO_ISA_AVX512)
      const auto mask = static_cast<uint32_t>((1u << count) - 1);
      if constexpr (kLanes == 16) bits = (Bits)_mm256_maskz_loadu_epi16(mask, p);
      if constexpr (kLanes == 8) bits = (Bits)_mm_maskz_loadu_epi16(mask, p);
#else
      for (int64_t i = 0; i < count; ++i) bits[i] = p[i].bits;
#endif
    }
    return (V)(__builtin_convertvector(bits, Wide) << 16);
  } else {
    return count >= kLanes ? load<V>(p) : load_first<V>(p, count);
  }
}

// To the nearest bfloat16, ties to even; a NaN stays one. The instruction takes denormals for zero.
template <class V>
EMO_INLINE Vec<uint16_t, kLanesIn<V>> round_to_bf16(V v) {
#if defined(EMO_ISA_AVX512BF16)
  if constexpr (kLanesIn<V> == 16) return (Vec<uint16_t, 16>)_mm512_cvtneps_pbh(v);
  if constexpr (kLanesIn<V> == 8) return (Vec<uint16_t, 8>)_mm256_cvtneps_pbh(v);
#endif
  using Wide = Vec<uint32_t, kLanesIn<V>>;
  const Wide bits = (Wide)v;
  const Wide rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Wide quiet = (bits >> 16) | 0x40;
  const Wide is_nan = (Wide)(v != v);
  return __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded),
                                 Vec<uint16_t, kLanesIn<V>>);
}

template <class V, class S>
EMO_INLINE void store_as(S* p, V v, int64_t count = kLanesIn<V>) {
  constexpr int kLanes = kLanesIn<V>;
  if constexpr (sizeof(S) == 2) {
    const auto bits = round_to_bf16(v);
    if (count >= kLanes) {
      store(p, bits);
    } else {
#if defined(EMO_MASKED_ACCESS) && defined(EMO_ISA_AVX512)
      const auto mask = static_cast<uint32_t>((1u << count) - 1);
      if constexpr (kLanes == 16) _mm256_mask_storeu_epi16(p, mask, (__m256i)bits);
      if constexpr (kLanes == 8) _mm_mask_storeu_epi16(p, mask, (__m128i)bits);
#else
      for (int64_t i = 0; i < count; ++i) p[i].bits = bits[i];
#endif
    }
  } else if (count >= kLanes) {
    store(p, v);
  } else {
    store_first(p, v, count);
  }
}

// What a load gives of v once it is stored.
template <class S, class V>
EMO_INLINE V as_stored(V v) {
  if constexpr (sizeof(S) == 2) {
    using Wide = Vec<uint32_t, kLanesIn<V>>;
    return (V)(__builtin_convertvector(round_to_bf16(v), Wide) << 16);
  } else {
    return v;
  }
}

// One element, in the type it is computed with.
template <class T>
EMO_INLINE T value_of(T value) {
  return value;
}
EMO_INLINE float value_of(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// What a GEMM multiplies: numbers of the type it adds up in, or pairs of bfloat16, two terms of a
// sum in a lane. Pairs are for instruction sets that multiply them.
template <class E>
struct Operand {
  using Sum = E;
  static constexpr int kTerms = 1;
};
template <>
struct Operand<BFloat16> {
  using Sum = float;
  static constexpr int kTerms = 2;
};
template <class E>
using SumOf = typename Operand<E>::Sum;
template <class E>
constexpr int kTerms = Operand<E>::kTerms;

// The terms at p in every lane.
template <class V, class E>
EMO_INLINE V splat_terms(const E* p) {
  if constexpr (kTerms<E> == 2) {
    return (V)splat<Vec<uint32_t, kLanesIn<V>>>(load<uint32_t>(p));
  } else {
    return splat<V>(*p);
  }
}

// A vector's worth of terms from memory of S; beyond `count` of them 0.
template <class V, class E, class S>
EMO_INLINE V load_terms(const S* p, int64_t count) {
  if constexpr (kTerms<E> == 1) {
    return load_as<V>(p, count);
  } else {
#if defined(EMO_ISA_AVX512BF16)
    constexpr int kLanes = kLanesIn<V>;
    if constexpr (sizeof(S) == 2) {
      if (count >= 2 * kLanes) return load<V>(p);
      return (V)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << count) - 1), p);
    } else {
      const V low = load_as<V>(p, count);
      const V high = count > kLanes ? load_as<V>(p + kLanes, count - kLanes) : V{};
      return (V)_mm512_cvtne2ps_pbh(high, low);
    }
#endif
  }
}

// What maps of S are multiplied as: pairs where the instruction set multiplies them.
#if defined(EMO_ISA_AVX512BF16)
template <class S>
using TermOf = S;
#else
template <class S>
using TermOf = SumOf<S>;
#endif

// The lanes of two rows in pairs; a null second row is zeros.
template <class V, class S>
EMO_INLINE V load_pairs(const S* first, const S* second, int64_t count) {
  using Wide = Vec<uint32_t, kLanesIn<V>>;
  const auto upper = [&](const S* p) __attribute__((always_inline)) {
    const V v = load_as<V>(p, count);
    return sizeof(S) == 2 ? (Wide)v : (Wide)as_stored<BFloat16>(v);
  };
  return (V)(upper(first) >> 16 | (second ? upper(second) : Wide{}));
}

// sum + a b, lane by lane, or + the products of both pairs in a lane.
template <class E, class V>
EMO_INLINE V add_products(V sum, V a, V b) {
  if constexpr (kTerms<E> == 1) {
    V result = fma(a, b, sum);
#if defined(EMO_ISA_AVX2)
    // A tile fills all 16 registers. GCC 12 moves its products about, and then one of the sums to
    // memory and back in every round of the loop: 103 instead of 110 GFLOP/s on a Zen 4 core.
    asm("" : "+x"(result));
#endif
    return result;
  } else {
#if defined(EMO_ISA_AVX512BF16)
    if constexpr (kLanesIn<V> == 16) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    if constexpr (kLanesIn<V> == 8) return _mm256_dpbf16_ps(sum, (__m256bh)a, (__m256bh)b);
#endif
  }
}

}  // namespace
}  // namespace emo_kernels::cpu
