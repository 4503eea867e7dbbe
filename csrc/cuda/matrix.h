// Matrices in memory, on their way into shared memory as tiles of elements T; vectors as fp32.
//
// A tile's row has `stride` elements; what lies outside the matrix is zero there. Where the matrix
// is of T and its rows allow it, tiles come by asynchronous copies of 16 or 4 bytes, else element
// by element, converted.
#pragma once

#include <cmath>

#include "cuda/depthwise_rows.h"

namespace emo_kernels::cuda {

template <class T>
constexpr DType kTypeOf = sizeof(T) == 4 ? DType::kFloat32 : kFloat16;
template <>
inline constexpr DType kTypeOf<BFloat16> = DType::kBFloat16;

EMO_ANYWHERE int rounded(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct alignas(16) Sixteen {
  uint32_t words[4];
};

// Dense, by rows.
struct Matrix {
  Vector values;
  int rows = 0, columns = 0;
  int granule = 0;  // bytes that are copied at once; 0: element by element
};

// `step`: tiles begin at multiples of so many columns.
template <class T>
Matrix matrix_of(const Vector& values, int64_t rows, int64_t columns, int step) {
  Matrix m{values, static_cast<int>(rows), static_cast<int>(columns), 0};
  if (values.dtype != kTypeOf<T>) return m;
  const auto divides = [&](int granule) {
    const int elements = granule / static_cast<int>(sizeof(T));
    return reinterpret_cast<uintptr_t>(values.data) % granule == 0 && columns % elements == 0 &&
           step % elements == 0;
  };
  m.granule = divides(16) ? 16 : divides(4) ? 4 : 0;
  return m;
}

// Rows of a matrix that make a tile, and which of its parts a thread brings.
struct TileOf {
  int column;         // where the tile begins
  int rows, columns;  // of the tile
  int thread, threads;
};

// Element `index` in fp32; `absent` where there is no vector.
EMO_KERNEL float value_at(const Vector& vector, int64_t index, float absent = 0.0f) {
  if (vector.data == nullptr) return absent;
  switch (vector.dtype) {
    case DType::kBFloat16:
      return widen(read(static_cast<const BFloat16*>(vector.data) + index));
    case kFloat16:
      return widen(read(static_cast<const Half*>(vector.data) + index));
    default:
      return read(static_cast<const float*>(vector.data) + index);
  }
}

namespace detail {

template <class U, class T, class RowAt>
EMO_KERNEL void start_copies(Copies& copies, T* to, int stride, const Matrix& m, const TileOf& tile,
                             const RowAt& row_at) {
  constexpr int kElements = sizeof(U) / sizeof(T);
  const int across = tile.columns / kElements;
#pragma unroll 1  // what unrolling holds in registers, a kernel's sums need
  for (int i = tile.thread; i < tile.rows * across; i += tile.threads) {
    const int r = i / across, c = i % across * kElements;
    const int64_t row = row_at(r);
    const bool live = row >= 0 && tile.column + c < m.columns;
    const T* const from = static_cast<const T*>(m.values.data) +
                          (live ? row * m.columns + tile.column + c : int64_t{0});
    copies.start(reinterpret_cast<U*>(to + r * stride + c), reinterpret_cast<const U*>(from), live);
  }
}

}  // namespace detail

// Begins to bring a tile; it is there once `copies` are waited for and a barrier has passed. Its
// row r is row row_at(r) of the matrix, or zero where that is negative.
template <class T, class RowAt>
EMO_KERNEL void start_tile(Copies& copies, T* to, int stride, const Matrix& m, const TileOf& tile,
                           const RowAt& row_at) {
  if (m.granule == 16) return detail::start_copies<Sixteen>(copies, to, stride, m, tile, row_at);
  if (m.granule == 4) return detail::start_copies<uint32_t>(copies, to, stride, m, tile, row_at);
#pragma unroll 1
  for (int i = tile.thread; i < tile.rows * tile.columns; i += tile.threads) {
    const int r = i / tile.columns, c = i % tile.columns;
    const int64_t row = row_at(r);
    const bool live = row >= 0 && tile.column + c < m.columns;
    const float value = live ? value_at(m.values, row * m.columns + tile.column + c) : 0.0f;
    write(to + r * stride + c, narrow<T>(value));
  }
}

// A norm over known statistics, per channel; vectors that are absent do nothing.
struct ChannelNorm {
  Vector weight, bias, mean, var;
  float eps = 0.0f;
};

// The thread, of a block of one dimension: on the GPU asked for where it is used, not kept in a
// register.
EMO_KERNEL int own_thread(int thread) {
#if defined(__CUDACC__)
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
#endif
  return thread;
}

// 1 / sqrt(x), on the GPU within 2 ulp: the exact one would take registers that kernels need.
EMO_KERNEL float inverse_root(float x) {
#if defined(__CUDACC__)
  return rsqrtf(x);
#else
  return 1.0f / sqrtf(x);
#endif
}

// As x scale + shift.
EMO_KERNEL Float2 affine_of(const ChannelNorm& norm, int c) {
  const float scale =
      value_at(norm.weight, c, 1.0f) * inverse_root(value_at(norm.var, c, 1.0f) + norm.eps);
  return {scale, fused(-value_at(norm.mean, c), scale, value_at(norm.bias, c))};
}

}  // namespace emo_kernels::cuda
