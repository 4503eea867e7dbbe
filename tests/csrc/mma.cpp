// csrc/cuda/mma.h on the host: every lane's part of every matrix, and the products, against plain
// loops. Prints nothing and returns 0 where all is right; tests/test_cuda_walk.py runs it.
#include "cuda/mma.h"

#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

using namespace emo_kernels::cuda;

namespace {

int lane_at_work = 0;
std::set<int> lanes_that_read;
const char* shared_begin = nullptr;
const char* shared_end = nullptr;

[[noreturn]] void fail(const char* what, int i, int j) {
  std::printf("%s: wrong at %d, %d\n", what, i, j);
  std::exit(1);
}

void expect(bool right, const char* what, int i = 0, int j = 0) {
  if (!right) fail(what, i, j);
}

// A matrix of values that T holds exactly, as shared memory has it.
template <class T>
struct Matrix {
  int rows, columns, stride;
  std::vector<T> elements;
  std::vector<float> values;

  Matrix(int rows, int columns, bool random, int seed)
      : rows(rows), columns(columns), stride(padded_row(columns)) {
    elements.resize(rows * stride, narrow<T>(1e9f));  // what must not be read
    values.resize(rows * columns);
    uint32_t state = 12345u + seed;
    for (int i = 0; i < rows * columns; ++i) {
      state = state * 1664525u + 1013904223u;
      const float value = random ? static_cast<float>(state >> 8) * 0x1p-23f - 1.0f : i + seed;
      const T element = narrow<T>(value);
      elements[i / columns * stride + i % columns] = element;
      values[i] = widen(element);
    }
    shared_begin = reinterpret_cast<const char*>(elements.data());
    shared_end = reinterpret_cast<const char*>(elements.data() + elements.size());
  }
  float at(int row, int column) const { return values[row * columns + column]; }
  void select() const {
    shared_begin = reinterpret_cast<const char*>(elements.data());
    shared_end = reinterpret_cast<const char*>(elements.data() + elements.size());
  }
};

// The tables of the PTX ISA, "Matrix fragments for mma.m16n8k16", element by element.
template <class T>
void check_fragments() {
  const Matrix<T> a(16, 16, false, 1), b(16, 16, false, 2);
  PerLane<FragmentA<T>> fa;
  PerLane<FragmentB<T>> fb[2], transposed[2];
  a.select();
  lanes_that_read.clear();
  load_a(fa, a.elements.data(), a.stride);
  expect(lanes_that_read.size() == 32, "load_a: lanes");
  b.select();
  load_b(fb, b.elements.data(), b.stride);
  load_b_by_rows(transposed, b.elements.data(), b.stride);
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
      const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
      const float got = fragment_element<T>(fa[lane].words, i);
      expect(got == a.at(row, column), "a", lane, i);
    }
    for (int i = 0; i < 4; ++i) {
      const int k = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8, n = group;
      for (int j = 0; j < 2; ++j) {
        expect(fragment_element<T>(fb[j][lane].words, i) == b.at(8 * j + n, k), "b", lane, i);
        expect(fragment_element<T>(transposed[j][lane].words, i) == b.at(k, 8 * j + n), "b by rows",
               lane, i);
      }
    }
    for (int i = 0; i < 4; ++i) {
      expect(row_of(lane, i) == (i < 2 ? group : group + 8), "row", lane, i);
      expect(column_of(lane, i) == in_group * 2 + (i & 1), "column", lane, i);
    }
  }
}

// C (16, 16) = A (16, K) B (K, 16), to the bit: ascending k, each sum rounded.
template <class T>
void check_product(int K, bool by_rows, bool random) {
  const Matrix<T> a(16, K, random, 3);
  const Matrix<T> b(by_rows ? K : 16, by_rows ? 16 : K, random, 4);
  PerLane<FragmentA<T>> fa;
  PerLane<FragmentB<T>> fb[2];
  PerLane<Accumulator> c[2];
  for (int k = 0; k < K; k += 16) {
    shared_begin = nullptr, shared_end = reinterpret_cast<const char*>(~uintptr_t{0});
    load_a(fa, a.elements.data() + k, a.stride);
    if (by_rows) {
      load_b_by_rows(fb, b.elements.data() + k * b.stride, b.stride);
    } else {
      load_b(fb, b.elements.data() + k, b.stride);
    }
    for (int j = 0; j < 2; ++j) multiply_add(c[j], fa, fb[j]);
  }
  float results[16][16];
  bool seen[16][16] = {};
  for (int j = 0; j < 2; ++j) {
    for_lanes([&](int lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = row_of(lane, i), column = 8 * j + column_of(lane, i);
        expect(!seen[row][column], "written twice", row, column);
        seen[row][column] = true;
        results[row][column] = c[j][lane].value[i];
      }
    });
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 16; ++column) {
      float sum = 0.0f;
      for (int k = 0; k < K; ++k) {
        const float right = by_rows ? b.at(k, column) : b.at(column, k);
        sum = sizeof(T) == 4 ? fused(a.at(row, k), right, sum) : sum + a.at(row, k) * right;
      }
      expect(seen[row][column] && results[row][column] == sum, "product", row, column);
    }
  }
}

// A result as the left side of the next product: what loading it again would give.
template <class T>
void check_chain() {
  const Matrix<T> next(16, 16, true, 5);
  PerLane<Accumulator> c[2];
  for (int j = 0; j < 2; ++j) {
    for_lanes([&](int lane) {
      for (int i = 0; i < 4; ++i) {
        c[j][lane].value[i] = next.at(row_of(lane, i), 8 * j + column_of(lane, i));
      }
    });
  }
  PerLane<FragmentA<T>> made, loaded;
  fragment_of(made, c);
  next.select();
  load_a(loaded, next.elements.data(), next.stride);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      expect(made[lane].words[i] == loaded[lane].words[i], "fragment_of", lane, i);
    }
  }
}

template <class T>
void check_products() {
  for (const int K : {16, 48}) {
    for (const bool by_rows : {false, true}) {
      for (const bool random : {false, true}) check_product<T>(K, by_rows, random);
    }
  }
}

// Eight rows at a padded stride lie in different banks, four bytes each.
void check_banks() {
  for (int K = 1; K <= 512; ++K) {
    const int stride = padded_row(K);
    expect(stride >= K && stride % 8 == 0, "stride", K);
    std::set<int> banks;
    for (int row = 0; row < 8; ++row) banks.insert(row * stride * 2 / 16 % 8);
    expect(banks.size() == 8, "banks", K);
  }
}

}  // namespace

namespace emo_kernels::cuda {

void note_lane(int lane) { lane_at_work = lane; }
void note_read(const void* address, int64_t bytes) {
  const auto* const begin = static_cast<const char*>(address);
  expect(begin >= shared_begin && begin + bytes <= shared_end, "read outside", lane_at_work);
  expect(reinterpret_cast<uintptr_t>(address) % bytes == 0, "misaligned", lane_at_work);
  lanes_that_read.insert(lane_at_work);
}
void note_write(const void*, int64_t) {}

}  // namespace emo_kernels::cuda

int main() {
  check_fragments<BFloat16>();
  check_fragments<Half>();
  check_products<BFloat16>();
  check_products<Half>();
  check_products<float>();
  check_chain<BFloat16>();
  check_chain<Half>();
  check_banks();
  return 0;
}
