// Maps that a kernel writes and nobody reads soon: past the caches where whole lines are written.
//
// A line that is written through the caches is read from memory first, and thrown out of them
// before the next kernel comes to it, unless the map is small. Without that read and in other
// lines' place, shrink_backward of EMO-5M (batch 8, 2 threads of Zen 4) takes 0.78 to 0.95 of the
// time.
#pragma once

#include "cpu/bf16.h"

namespace emo_kernels::cpu {
namespace {

// Asks for a line that is read or written soon.
EMO_INLINE void fetch(const void* line) { __builtin_prefetch(line, 0, 2); }

template <class T, class S>
class WrittenMap {
 public:
  using V = Vec<T, kLanesOf<T>>;

  WrittenMap() = default;
  // A dense map of `rows` of `channels`, null: of none.
  EMO_INLINE WrittenMap(void* map, int64_t rows, int64_t channels)
      : data_(static_cast<S*>(map)),
        past_caches_(kWholeLines && channels % kLanesOf<T> == 0 &&
                     reinterpret_cast<uintptr_t>(map) % 64 == 0 &&
                     rows * channels * static_cast<int64_t>(sizeof(S)) >= kLeast) {}

  explicit EMO_INLINE operator bool() const { return data_ != nullptr; }
  // The map from element `at` on.
  EMO_INLINE WrittenMap from(int64_t at) const {
    WrittenMap rest = *this;
    if (data_) rest.data_ += at;
    return rest;
  }
  // Asks for the line of an element that is written soon, if need be.
  EMO_INLINE void expect(int64_t at) const {
    if (!past_caches_) fetch(data_ + at);
  }
  // Up to a vector: at a multiple of its lanes.
  EMO_INLINE void store(int64_t at, V v, int64_t count) const {
#if defined(EMO_ISA_AVX512)
    if constexpr (kWholeLines) {
      if (past_caches_) return _mm512_stream_ps(data_ + at, v);
    }
#endif
    store_as(data_ + at, v, count);
  }
  // Before another thread reads the map.
  static EMO_INLINE void finish() {
#if defined(EMO_ISA_AVX512)
    if constexpr (kWholeLines) _mm_sfence();
#endif
  }

 private:
  static constexpr int64_t kLeast = 1 << 20;  // bytes
#if defined(EMO_ISA_AVX512)
  static constexpr bool kWholeLines = sizeof(S) == 4 && sizeof(V) == 64;
#else
  static constexpr bool kWholeLines = false;
#endif
  S* data_ = nullptr;
  bool past_caches_ = false;
};

}  // namespace
}  // namespace emo_kernels::cpu
