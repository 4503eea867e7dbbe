// Rows of a map on their way from memory into the block's shared memory, a few steps ahead.
//
// A buffer has, for each of the block's planes, `width` pixels of each of its pairs of channels;
// what lies outside the map is zero there, so that whoever reads it asks no more. `kStages` buffers
// take turns. On the host a copy lands when it is waited for, and until then the buffer holds NaN.
#pragma once

#include "cuda/depthwise_tiles.h"

#if !defined(__CUDACC__)
#include <deque>
#include <vector>
#endif

namespace emo_kernels::cuda {

// Copies that a thread has under way, in groups.
class Copies {
 public:
  // *to = live ? *from : 0, some time before its group is waited for.
  template <class U>
  EMO_KERNEL void start(U* to, const U* from, bool live) {
    static_assert(sizeof(U) == 4 || sizeof(U) == 8 || sizeof(U) == 16);
#if defined(__CUDACC__)
    const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from),
                 "n"(sizeof(U)), "r"(live ? static_cast<int>(sizeof(U)) : 0)
                 : "memory");
#else
    if (live) note_read(from, sizeof(U));
    note_copy(to, sizeof(U));
    std::memset(static_cast<void*>(to), 0xff, sizeof(U));
    pending_.push_back({to, live ? from : nullptr, sizeof(U)});
#endif
  }

  EMO_KERNEL void close_group() {
#if defined(__CUDACC__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    groups_.push_back(std::move(pending_));
    pending_.clear();
#endif
  }

  // Until at most kLeft groups, the latest, are under way.
  template <int kLeft>
  EMO_KERNEL void wait() {
#if defined(__CUDACC__)
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#else
    for (; groups_.size() > kLeft; groups_.pop_front()) {
      for (const Copy& copy : groups_.front()) {
        note_write(copy.to, static_cast<int64_t>(copy.bytes));
        if (copy.from == nullptr) {
          std::memset(copy.to, 0, copy.bytes);
        } else {
          std::memcpy(copy.to, copy.from, copy.bytes);
        }
      }
    }
#endif
  }

#if !defined(__CUDACC__)
 private:
  struct Copy {
    void* to;
    const void* from;
    size_t bytes;
  };
  std::vector<Copy> pending_;
  std::deque<std::vector<Copy>> groups_;
#endif
};

// The columns of a row that a thread copies: every `every`-th of `width` from `first` on.
struct Share {
  int first, every, width;
};

// Starts the copies of a thread's share of one row of a map. `offset` is that of the buffer's first
// pixel, `col` its column, which may lie outside; pixels are `dilation` columns apart.
template <class T>
EMO_KERNEL void start_row(Copies& copies, Pair<T>* buffer, int groups, const T* map, int64_t offset,
                          int col, int dilation, int C, int W, const Share& share) {
  for (int p = share.first; p < share.width; p += share.every) {
    const bool reads = inside(col + p * dilation, W);
    const T* const from = map + (reads ? offset + int64_t{p} * dilation * C : 0);
    copies.start(buffer + int64_t{p} * groups, reinterpret_cast<const Pair<T>*>(from), reads);
  }
}

// Calls step(phase, t) for t = 0 .. steps - 1 with phase = t % kPeriod known when compiled.
template <int kPeriod, class Step>
EMO_KERNEL void unrolled_steps(int steps, const Step& step) {
  for (int first = 0; first < steps; first += kPeriod) {
#pragma unroll
    for (int phase = 0; phase < kPeriod; ++phase) {
      if (first + phase < steps) step(phase, first + phase);
    }
  }
}

// The filters of a pair of channels, (C, K, K) in memory.
template <int K>
struct Filters {
  Float2 tap[K * K];

  EMO_KERNEL void load(const Vector& weight, int c) {
#pragma unroll
    for (int t = 0; t < K * K; ++t) {
      tap[t] = elements<Float2>(weight, int64_t{c} * (K * K) + t, K * K);
    }
  }
};

// Rows of the result that are unfinished while a row of the map arrives.
template <int K, int S>
constexpr int kUnfinished = (K + S - 1) / S;

// Buffers: more where they are small, so that more is under way.
template <class T, int S>
constexpr int kStages = sizeof(T) == 2 && S == 1 ? 4 : 2;

}  // namespace emo_kernels::cuda
