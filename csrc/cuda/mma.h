// Products of small matrices by a warp, on tensor cores from sm_80 on; the same code on the host.
//
// Computes: C (16, 8) += A (16, 16) B (16, 8), A and B in bf16 or fp16, C in fp32: one mma.sync
//     m16n8k16. In fp32 the same calls multiply on the ordinary units, from shared memory.
// Tiling: 32 lanes share each matrix; a lane's part is a fragment. With g = lane / 4, t = lane % 4:
//       A: (g, 2t), (g, 2t + 1) | rows + 8 | columns + 8 | both + 8: four words of two elements;
//       B: (k, n) = (2t, g), (2t + 1, g) | k + 8: two words;
//       C: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1): row_of(lane, i), column_of(lane, i).
//     load_a and load_b fetch them from shared memory by ldmatrix: of each 8 x 8 matrix, lanes
//     8j .. 8j + 7 name the rows of the j-th, and lane l gets elements 2t, 2t + 1 of its row g.
// Traffic: 512 bytes of shared memory for a 16 x 16 tile of A, or of B; rows at padded_row() meet
//     in no bank. 4096 operations for 768 bytes, so share a fragment between several products.
// Numerics: products of 16-bit elements are exact. The host adds them one by one to C by ascending
//     k, each sum rounded to nearest. A tensor core adds several products and C at once, aligned to
//     the largest and truncated, in an order that NVIDIA does not state: the two should agree to a
//     few 2^-23 of sum |a b| + |c| (after published measurements; not yet seen on a GPU here), not
//     to the bit. In fp32: fused products by ascending k, the same bits everywhere.
// Limits: a block of one dimension, whole warps, all lanes at the call; in 16 bits every row of a
//     tile at a multiple of 16 bytes.
//
// Use: on the GPU a lane runs the code for itself. On the host a step of a warp runs once for its
// 32 lanes (each.warps, walk.h): what differs between lanes lives in a PerLane, is computed within
// for_lanes, and nothing else of the code may depend on the lane.
//
//     PerLane<FragmentA<T>> a;
//     PerLane<FragmentB<T>> b[2];
//     PerLane<Accumulator> c[2];                  // zero
//     for (int k = 0; k < K; k += 16) {           // x: (16, K) by rows, weight: (16, K) by rows
//       load_a(a, x + k, stride);
//       load_b(b, weight + k, stride);            // two tiles of 8 rows of the weight
//       multiply_add(c[0], a, b[0]);              // x weight^T, columns 0 .. 7
//       multiply_add(c[1], a, b[1]);              // columns 8 .. 15
//     }
//     for_lanes([&](int lane) {
//       for (int i = 0; i < 4; ++i) use(row_of(lane, i), column_of(lane, i), c[0][lane].value[i]);
//     });
#pragma once

#include "cuda/element.h"

namespace emo_kernels::cuda {

constexpr int kLanes = 32;

// On the host: which lane of the warp at work the next accesses are of (walk.h).
void note_lane(int lane);

// What every lane of a warp has of its own.
template <class T>
class PerLane {
 public:
#if defined(__CUDACC__)
  EMO_KERNEL T& operator[](int) { return value_; }
  EMO_KERNEL const T& operator[](int) const { return value_; }

 private:
  T value_{};
#else
  T& operator[](int lane) { return values_[lane]; }
  const T& operator[](int lane) const { return values_[lane]; }

 private:
  T values_[kLanes]{};
#endif
};

#if defined(__CUDACC__)
EMO_KERNEL int own_lane() { return static_cast<int>(threadIdx.x) % kLanes; }
#endif

// Calls body(lane): on the GPU for the lane that runs it, on the host for all, one after the other.
// Lanes that have parted ways in it are together again behind it: warp-wide instructions want that.
template <class Body>
EMO_KERNEL void for_lanes(const Body& body) {
#if defined(__CUDACC__)
  body(own_lane());
  __syncwarp();
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    note_lane(lane);
    body(lane);
  }
  note_lane(0);
#endif
}

// Gives each lane the sum over its four, 4 g .. 4 g + 3, added in one order.
EMO_KERNEL void sum_of_four(PerLane<float>& value) {
#if defined(__CUDACC__)
  value[0] = value[0] + __shfl_xor_sync(0xffffffffu, value[0], 1);
  value[0] = value[0] + __shfl_xor_sync(0xffffffffu, value[0], 2);
#else
  for (int lane = 0; lane < kLanes; lane += 4) {
    const float sum = (value[lane] + value[lane + 1]) + (value[lane + 2] + value[lane + 3]);
    for (int i = 0; i < 4; ++i) value[lane + i] = sum;
  }
#endif
}

// Elements from one row of a tile of K columns in shared memory to the next: 16 more than a
// multiple of 32 bytes in 16 bits, so that eight rows lie in different banks.
EMO_ANYWHERE int padded_row(int K) { return (K + 15) / 16 * 16 + 8; }

// A lane's part of A (16, 16); in fp32, where its part lies: rows g and g + 8.
template <class T>
struct FragmentA {
  uint32_t words[4];
};
template <>
struct FragmentA<float> {
  const float* first;
  int next_row;
};

// A lane's part of B (16, 8); in fp32, where its part lies: columns 2t and 2t + 1.
template <class T>
struct FragmentB {
  uint32_t words[2];
};
template <>
struct FragmentB<float> {
  const float* first;
  int next_k, next_n;
};

// A lane's part of C (16, 8).
struct Accumulator {
  float value[4];
};

EMO_KERNEL int row_of(int lane, int i) { return lane / 4 + i / 2 * 8; }
EMO_KERNEL int column_of(int lane, int i) { return lane % 4 * 2 + i % 2; }

// ---- fragments from shared memory ---------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit elements at once; row_at(lane) is row lane % 8 of matrix lane / 8.
// words_of(lane) gets a word of each. Transposed: lane l gets rows 2t, 2t + 1 of column g.
template <bool kTransposed, class RowAt, class WordsOf>
EMO_KERNEL void load_matrices(const RowAt& row_at, const WordsOf& words_of) {
#if defined(__CUDACC__)
  const int lane = own_lane();
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row_at(lane)));
  uint32_t words[4];
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) words_of(lane, j) = words[j];
#else
  uint16_t rows[kLanes][8];
  for_lanes([&](int lane) {
    note_read(row_at(lane), sizeof(rows[lane]));
    std::memcpy(rows[lane], row_at(lane), sizeof(rows[lane]));
  });
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = kTransposed ? rows[8 * j + 2 * t][g] : rows[8 * j + g][2 * t];
      const uint32_t high = kTransposed ? rows[8 * j + 2 * t + 1][g] : rows[8 * j + g][2 * t + 1];
      words_of(lane, j) = low | high << 16;
    }
  }
#endif
}

// A (16, 16) from a tile whose rows are `stride` elements apart.
template <class T>
EMO_KERNEL void load_a(PerLane<FragmentA<T>>& a, const T* tile, int stride) {
  if constexpr (sizeof(T) == 4) {
    for_lanes([&](int lane) { a[lane] = {tile + lane / 4 * stride, 8 * stride}; });
  } else {
    load_matrices<false>([&](int lane) { return tile + lane % 16 * stride + lane / 16 * 8; },
                         [&](int lane, int j) -> uint32_t& { return a[lane].words[j]; });
  }
}

// Two tiles B (16, 8), side by side, from the rows of their transpose (16, 16): n by rows, k along
// them, as a weight (M, C) lies in memory.
template <class T>
EMO_KERNEL void load_b(PerLane<FragmentB<T>> (&b)[2], const T* tile, int stride) {
  if constexpr (sizeof(T) == 4) {
    for_lanes([&](int lane) {
      const float* const first = tile + lane % 4 * 2 * stride;
      b[0][lane] = {first, 1, stride};
      b[1][lane] = {first + 8 * stride, 1, stride};
    });
  } else {
    load_matrices<false>(
        [&](int lane) { return tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8; },
        [&](int lane, int j) -> uint32_t& { return b[j / 2][lane].words[j % 2]; });
  }
}

// Two tiles B (16, 8), side by side, from rows (16, 16) of them: k by rows, n along them.
template <class T>
EMO_KERNEL void load_b_by_rows(PerLane<FragmentB<T>> (&b)[2], const T* tile, int stride) {
  if constexpr (sizeof(T) == 4) {
    for_lanes([&](int lane) {
      const float* const first = tile + lane % 4 * 2;
      b[0][lane] = {first, stride, 1};
      b[1][lane] = {first + 8, stride, 1};
    });
  } else {
    load_matrices<true>([&](int lane) { return tile + lane % 16 * stride + lane / 16 * 8; },
                        [&](int lane, int j) -> uint32_t& { return b[j / 2][lane].words[j % 2]; });
  }
}

// A (16, 16) from two results (16, 8) side by side, rounded: each lane has its part already.
template <class T>
EMO_KERNEL void fragment_of(PerLane<FragmentA<T>>& a, const PerLane<Accumulator> (&c)[2]) {
  static_assert(sizeof(T) == 2, "in fp32 a fragment lies in shared memory");
  for_lanes([&](int lane) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* const value = c[j / 2][lane].value + j % 2 * 2;
      a[lane].words[j] = pack<T>(Float2{value[0], value[1]}).bits;
    }
  });
}

// ---- products -----------------------------------------------------------------------------------

#if !defined(__CUDACC__)
// Element i of a fragment's words.
template <class T>
float fragment_element(const uint32_t* words, int i) {
  return widen(T{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
}

// As a tensor core, but for the order of sums: from the lanes' parts to theirs.
template <class T>
void multiply_add_on_host(PerLane<Accumulator>& c, const PerLane<FragmentA<T>>& a,
                          const PerLane<FragmentB<T>>& b) {
  float rows[16][16], columns[8][16];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      rows[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = fragment_element<T>(a[lane].words, i);
    }
    for (int i = 0; i < 4; ++i) {
      columns[g][2 * t + i % 2 + i / 2 * 8] = fragment_element<T>(b[lane].words, i);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const float *const row = rows[row_of(lane, i)], *const column = columns[column_of(lane, i)];
      float sum = c[lane].value[i];
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      c[lane].value[i] = sum;
    }
  }
}
#endif

// c += a b.
template <class T>
EMO_KERNEL void multiply_add(PerLane<Accumulator>& c, const PerLane<FragmentA<T>>& a,
                             const PerLane<FragmentB<T>>& b) {
#if defined(__CUDACC__)
  float (&d)[4] = c[0].value;
  const uint32_t (&p)[4] = a[0].words;
  const uint32_t (&q)[2] = b[0].words;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q[0]), "r"(q[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q[0]), "r"(q[1]));
  }
#else
  multiply_add_on_host<T>(c, a, b);
#endif
}

template <>
EMO_KERNEL void multiply_add<float>(PerLane<Accumulator>& c, const PerLane<FragmentA<float>>& a,
                                    const PerLane<FragmentB<float>>& b) {
  for_lanes([&](int lane) {
    const FragmentA<float> rows = a[lane];
    const FragmentB<float> columns = b[lane];
    float (&sum)[4] = c[lane].value;
#pragma unroll 4
    for (int k = 0; k < 16; ++k) {
      const float top = read(rows.first + k), bottom = read(rows.first + rows.next_row + k);
      const float* const column = columns.first + k * columns.next_k;
      const float left = read(column), right = read(column + columns.next_n);
      sum[0] = fused(top, left, sum[0]);
      sum[1] = fused(top, right, sum[1]);
      sum[2] = fused(bottom, left, sum[2]);
      sum[3] = fused(bottom, right, sum[3]);
    }
  });
}

}  // namespace emo_kernels::cuda
