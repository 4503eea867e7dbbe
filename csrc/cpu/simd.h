// SIMD in GCC / Clang vector extensions: one header for every instruction set.
//
// Include only from files compiled per instruction set (EMO_ISA_... is defined): everything here
// sits in an anonymous namespace, so that no symbol of one instruction set is linked into another.
#pragma once

#include <cstdint>

#if defined(EMO_ISA_AVX512BF16)
#define EMO_ISA_AVX512
#endif
#if defined(EMO_ISA_AVX512) || defined(EMO_ISA_AVX2)
#include <immintrin.h>
#endif

#define EMO_INLINE inline __attribute__((always_inline))

namespace emo_kernels::cpu {
namespace {

template <class T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
};
template <class T, int kLanes>
using Vec = typename VectorOf<T, kLanes>::type;

#if defined(EMO_ISA_AVX512)
constexpr int kVectorBytes = 64, kRegisters = 32;
constexpr bool kHalfVectors = true;
#elif defined(EMO_ISA_AVX2)
constexpr int kVectorBytes = 32, kRegisters = 16;
constexpr bool kHalfVectors = false;
#elif defined(EMO_ISA_NEON)
constexpr int kVectorBytes = 16, kRegisters = 32;
constexpr bool kHalfVectors = false;
#else
constexpr int kVectorBytes = 16, kRegisters = 16;
constexpr bool kHalfVectors = false;
#endif

template <class T>
constexpr int kLanesOf = kVectorBytes / static_cast<int>(sizeof(T));

template <class V>
EMO_INLINE V load(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
EMO_INLINE void store(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// value - 0 is value, so this is a broadcast; 0 + value would be an addition, for it makes -0 a 0.
template <class V, class T>
EMO_INLINE V splat(T value) {
  return value - V{};
}

// The lower half of the lanes: the same register, read at half width; and the upper one.
#if defined(EMO_ISA_AVX512)
EMO_INLINE __m256 low_half(__m512 v) { return _mm512_castps512_ps256(v); }
EMO_INLINE __m256 high_half(__m512 v) { return _mm512_extractf32x8_ps(v, 1); }
#elif defined(EMO_ISA_AVX2)
EMO_INLINE __m128 low_half(__m256 v) { return _mm256_castps256_ps128(v); }
EMO_INLINE __m128 high_half(__m256 v) { return _mm256_extractf128_ps(v, 1); }
#endif

// One rounding where the instruction set has FMA (the build contracts), two where it has not.
template <class V>
EMO_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

// AddressSanitizer sees no masked access: under it the elements go one by one.
#if (defined(EMO_ISA_AVX512) || defined(EMO_ISA_AVX2)) && !defined(__SANITIZE_ADDRESS__)
#define EMO_MASKED_ACCESS
#endif

#if defined(EMO_ISA_AVX2)
// All bits of the first `count` lanes.
EMO_INLINE __m256i first_bits(int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes);
}
#endif

// The first `count` elements of a vector whose other lanes are 0 / are left alone in memory.
template <class V, class T>
EMO_INLINE V load_first(const T* p, int64_t count) {
#if defined(EMO_MASKED_ACCESS) && defined(EMO_ISA_AVX512)
  const auto mask = static_cast<uint32_t>((uint64_t{1} << count) - 1);
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return _mm512_maskz_loadu_ps(mask, p);
  if constexpr (sizeof(V) == 32 && sizeof(T) == 4) return _mm256_maskz_loadu_ps(mask, p);
#elif defined(EMO_MASKED_ACCESS)
  if constexpr (sizeof(V) == 32 && sizeof(T) == 4) return _mm256_maskload_ps(p, first_bits(count));
#endif
  V v{};
  for (int64_t i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <class V, class T>
EMO_INLINE void store_first(T* p, V v, int64_t count) {
#if defined(EMO_MASKED_ACCESS) && defined(EMO_ISA_AVX512)
  const auto mask = static_cast<uint32_t>((uint64_t{1} << count) - 1);
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return _mm512_mask_storeu_ps(p, mask, v);
  if constexpr (sizeof(V) == 32 && sizeof(T) == 4) return _mm256_mask_storeu_ps(p, mask, v);
#elif defined(EMO_MASKED_ACCESS)
  if constexpr (sizeof(V) == 32 && sizeof(T) == 4)
    return _mm256_maskstore_ps(p, first_bits(count), v);
#endif
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

// v with the lanes from `count` on taken from `rest`.
template <class V, class T>
EMO_INLINE V first_lanes(V v, int64_t count, V rest = V{}) {
#if defined(EMO_ISA_AVX512)
  const auto mask = static_cast<uint32_t>((uint64_t{1} << count) - 1);
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return _mm512_mask_mov_ps(rest, mask, v);
#elif defined(EMO_ISA_AVX2)
  if constexpr (sizeof(V) == 32 && sizeof(T) == 4)
    return _mm256_blendv_ps(rest, v, _mm256_castsi256_ps(first_bits(count)));
#endif
  constexpr int kLanes = sizeof(V) / sizeof(T);
  T lanes[kLanes];
  store(lanes, rest);
  store_first(lanes, v, count);
  return load<V>(lanes);
}

template <class T>
EMO_INLINE T min(T a, T b) {
  return b < a ? b : a;
}

template <class T>
EMO_INLINE T max(T a, T b) {
  return a < b ? b : a;
}

// In one instruction: the compilers make two of the comparison of vectors above.
#if defined(EMO_ISA_AVX2)
EMO_INLINE __m256 min(__m256 a, __m256 b) { return _mm256_min_ps(b, a); }
EMO_INLINE __m256 max(__m256 a, __m256 b) { return _mm256_max_ps(b, a); }
#elif defined(EMO_ISA_AVX512)
EMO_INLINE __m512 min(__m512 a, __m512 b) { return _mm512_min_ps(b, a); }
#endif

EMO_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
EMO_INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
  constexpr operator int() const { return kValue; }
};

template <int... kIndex>
struct Indices {};
template <int kCount, int... kIndex>
struct MakeIndices : MakeIndices<kCount - 1, kCount - 1, kIndex...> {};
template <int... kIndex>
struct MakeIndices<0, kIndex...> {
  using type = Indices<kIndex...>;
};

template <class F, int... kIndex>
EMO_INLINE void unroll_over(F& f, Indices<kIndex...>) {
  (f(Constant<kIndex>{}), ...);
}

// f(0), f(1), ... f(kCount - 1) with compile-time arguments: arrays they index become registers.
template <int kCount, class F>
EMO_INLINE void unroll(F f) {
  unroll_over(f, typename MakeIndices<kCount>::type{});
}
#define EMO_UNROLLED(i) [&](auto i) __attribute__((always_inline))

// f over all lanes, pairwise: lanes half a vector apart, then a quarter, ...
template <int kWidth, class V, class F, int... kLane>
EMO_INLINE V reduce_lanes(V v, F f, Indices<kLane...> lanes) {
  v = f(v, __builtin_shufflevector(v, v, (kLane ^ kWidth)...));
  if constexpr (kWidth > 1) v = reduce_lanes<kWidth / 2>(v, f, lanes);
  return v;
}

template <class V, class T>
EMO_INLINE T sum_lanes(V v) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  const auto add = [](V a, V b) __attribute__((always_inline)) { return a + b; };
  return reduce_lanes<kLanes / 2>(v, add, typename MakeIndices<kLanes>::type{})[0];
}

template <class V, class T>
EMO_INLINE T max_lanes(V v) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  const auto larger = [](V a, V b) __attribute__((always_inline)) { return max(a, b); };
  return reduce_lanes<kLanes / 2>(v, larger, typename MakeIndices<kLanes>::type{})[0];
}

EMO_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace emo_kernels::cpu
