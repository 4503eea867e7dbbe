// Computes: h = norm(x) of the pixels of a window, padded by zeros; of each head
//     z = softmax(q k^T / sqrt(D)) h, q and k from Wqk h + bqk, or h itself. Padded tokens are keys
//     like others.
// Tiling: a block has one window at a time, of at most 128 tokens, and its heads one after the
//     other. h lies in shared memory in the order of its tokens, then of a head q, k and v, the
//     scores in fp32 and their softmax; all products on tensor cores.
// Traffic: x once, Wqk once from the caches, z once. 4 C + 4 tokens operations for a channel of a
//     pixel.
// Numerics: h, q, k and the softmax rounded to T; scores, maxima and sums in fp32; z rounded once.
//     Every sum in one order, whatever the batch and the shares of the heads.
// Limits: what fits in shared memory (irmb_attention_plan.h); values before the expansion.
#pragma once

#include "cuda/irmb_attention_plan.h"

namespace emo_kernels::cuda {

// A thread of a block at the attention of one window.
template <class T, int kWarps>
class WindowHeads {
 public:
  EMO_KERNEL WindowHeads(const AttentionArgs<T>& args, int thread, void* shared)
      : args_(args), thread_(thread), shared_(static_cast<char*>(shared)) {}

  // What the next steps are about; the same for all threads.
  EMO_KERNEL void turn_to(int n, int window_h, int window_w) {
    n_ = n, window_h_ = window_h, window_w_ = window_w;
  }

  // Heads first .. end - 1 of that window: z of the image's pixel i goes to row_at(self, i).
  template <class Each, class RowAt>
  EMO_KERNEL static void attend(const AttentionArgs<T>& args, const Each& each, int first, int end,
                                const RowAt& row_at) {
    each([](WindowHeads& self) { self.load_window(); });
    normalize_rows(args.norm, args.front.eps, each,
                   [](const WindowHeads& self, int token) { return self.pixel_of(token) >= 0; });
    for (int head = first; head < end; ++head) {
      if (args.weight.values.data != nullptr) {
        for (int which = 0; which < 2; ++which) {
          each([&](WindowHeads& self) { self.fetch_weight(head, which); });
          each.warps([&](WindowHeads& self) { self.project(head, which); });
          if (which == 0) each.barrier();
        }
      } else {
        each.then([&](WindowHeads& self) { self.copy_q_k(head); });
      }
      each([&](WindowHeads& self) { self.copy_values(head); });
      each.warps([](WindowHeads& self) { self.score(); });
      each.barrier();
      each([](WindowHeads& self) { self.find_maxima(); });
      each([](WindowHeads& self) { self.exponentiate(); });
      each([](WindowHeads& self) { self.divide(); });
      each.warps([&](WindowHeads& self) { self.mix(head, row_at); });
      each.barrier();
    }
  }

  EMO_KERNEL NormRows<T> rows() const {
    const AttentionPlan& plan = args_.plan;
    return {part(plan.h),  floats(plan.norm), floats(plan.parts),
            plan.h_stride, args_.shape.C,     plan.padded,
            plan.tokens,   thread_,           kTeam};
  }

  EMO_KERNEL int image() const { return n_; }
  EMO_KERNEL T* part(int at) const { return reinterpret_cast<T*>(shared_ + at); }

 private:
  static constexpr int kTeam = kWarps * kLanes;  // threads of a block

  EMO_KERNEL float* floats(int at) const { return reinterpret_cast<float*>(shared_ + at); }

  // Which pixel of the image a token is; -1: padding.
  EMO_KERNEL int64_t pixel_of(int token) const {
    const AttentionShape& s = args_.shape;
    if (token >= args_.plan.tokens) return -1;
    const int a = token / s.window_w, b = token % s.window_w;
    const int row = s.strided ? a * s.windows_h + window_h_ : window_h_ * s.window_h + a;
    const int column = s.strided ? b * s.windows_w + window_w_ : window_w_ * s.window_w + b;
    return row < s.H && column < s.W ? int64_t{row} * s.W + column : int64_t{-1};
  }

  EMO_KERNEL void load_window() {
    const AttentionShape& s = args_.shape;
    const AttentionPlan& plan = args_.plan;
    Matrix image = args_.pixels;
    image.values.data = static_cast<const T*>(image.values.data) + int64_t{n_} * image.rows * s.C;
    const TileOf whole{0, plan.padded, rounded(s.C, 16), thread_, kTeam};
    start_tile(copies_, part(plan.h), plan.h_stride, image, whole,
               [&](int token) { return pixel_of(token); });
    copies_.close_group();
    rows().load_affine(args_.norm, args_.front);
    copies_.template wait<0>();
  }

  // A head's rows of Wqk that make its q (which = 0) or its k (1).
  EMO_KERNEL void fetch_weight(int head, int which) {
    const AttentionShape& s = args_.shape;
    const TileOf whole{0, args_.plan.wide, rounded(s.C, 16), thread_, kTeam};
    start_tile(copies_, part(args_.plan.weight), args_.plan.h_stride, args_.weight, whole,
               [&](int d) { return int64_t{d < s.D ? which * s.C + head * s.D + d : -1}; });
    copies_.close_group();
    copies_.template wait<0>();
  }

  EMO_KERNEL void copy_q_k(int head) {
    for_pairs([&](int token, int pair) {
      const Float2 h = head_of_h(head, token, pair);
      for (int which = 0; which < 2; ++which) put_qk(token, which * args_.plan.wide + pair, h);
    });
  }

  // Calls visit(token, d) for every second d of a head in tiles of 16.
  template <class Visit>
  EMO_KERNEL void for_pairs(const Visit& visit) const {
    const int pairs = args_.plan.wide / 2;
    for (int i = thread_; i < args_.plan.padded * pairs; i += kTeam) {
      visit(i / pairs, i % pairs * 2);
    }
  }

  // Channels d and d + 1 of a head of h, zero behind its last.
  EMO_KERNEL Float2 head_of_h(int head, int token, int d) const {
    const int D = args_.shape.D;
    const T* const row = part(args_.plan.h) + token * args_.plan.h_stride + head * D;
    return {d < D ? widen(read(row + d)) : 0.0f, d + 1 < D ? widen(read(row + d + 1)) : 0.0f};
  }

  EMO_KERNEL void put_qk(int token, int column, Float2 value) const {
    write_packed<Float2>(part(args_.plan.qk) + token * args_.plan.qk_stride + column,
                         pack<T>(value));
  }

  // C (tokens, columns) = A B^T, tile after tile of 16 x 16, in turn by the warps: `a` and `b` are
  // A and B by rows; put(row, column, two values).
  template <class Put>
  EMO_KERNEL void multiply(const T* a, int a_stride, const T* b, int b_stride, int columns, int K,
                           const Put& put) const {
    const int across = columns / 16, tiles = args_.plan.padded / 16 * across;
#pragma unroll 1
    for (int tile = thread_ / kLanes; tile < tiles; tile += kWarps) {
      const int row = tile / across * 16, column = tile % across * 16;
      PerLane<Accumulator> sums[2];
#pragma unroll 1
      for (int k = 0; k < K; k += 16) {
        PerLane<FragmentA<T>> left;
        PerLane<FragmentB<T>> right[2];
        load_a(left, a + row * a_stride + k, a_stride);
        load_b(right, b + column * b_stride + k, b_stride);
        multiply_add(sums[0], left, right[0]);
        multiply_add(sums[1], left, right[1]);
      }
      put_tile(sums, row, column, put);
    }
  }

  template <class Put>
  EMO_KERNEL void put_tile(const PerLane<Accumulator> (&sums)[2], int row, int column,
                           const Put& put) const {
    for_lanes([&](int lane) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float* const value = sums[h][lane].value + i;
          put(row + row_of(lane, i), column + h * 8 + column_of(lane, 0),
              Float2{value[0], value[1]});
        }
      }
    });
  }

  EMO_KERNEL void project(int head, int which) {
    const AttentionPlan& plan = args_.plan;
    multiply(part(plan.h), plan.h_stride, part(plan.weight), plan.h_stride, plan.wide,
             rounded(args_.shape.C, 16), [&](int token, int d, Float2 value) {
               value.x += bias_of(head, which, d);
               value.y += bias_of(head, which, d + 1);
               put_qk(token, which * plan.wide + d, value);
             });
  }

  EMO_KERNEL float bias_of(int head, int which, int d) const {
    if (d >= args_.shape.D) return 0.0f;
    return value_at(args_.bias, int64_t{which} * args_.shape.C + head * args_.shape.D + d);
  }

  EMO_KERNEL void copy_values(int head) {
    for_pairs([&](int token, int d) {
      write_packed<Float2>(part(args_.plan.v) + token * args_.plan.v_stride + d,
                           pack<T>(head_of_h(head, token, d)));
    });
  }

  EMO_KERNEL float* score_at(int row, int column) const {
    return floats(args_.plan.scores) + row * args_.plan.score_stride + column;
  }

  EMO_KERNEL void score() {
    const AttentionPlan& plan = args_.plan;
    const T* const q = part(plan.qk);
    multiply(q, plan.qk_stride, q + plan.wide, plan.qk_stride, plan.padded, plan.wide,
             [&](int row, int column, Float2 value) {
               write(score_at(row, column), value.x * args_.scale);
               write(score_at(row, column + 1), value.y * args_.scale);
             });
  }

  // Four threads share a row of scores; `which` of two numbers each leaves behind.
  EMO_KERNEL float* part_of(int which, int row) const {
    return floats(args_.plan.parts) + (which * args_.plan.padded + row) * kNormParts;
  }

  // Calls visit(row, part) for what the thread has of the rows of live tokens.
  template <class Visit>
  EMO_KERNEL void for_parts(const Visit& visit) const {
    for (int i = thread_; i < args_.plan.tokens * kNormParts; i += kTeam) {
      visit(i / kNormParts, i % kNormParts);
    }
  }

  EMO_KERNEL void find_maxima() {
    for_parts([&](int row, int of) {
      float most = -INFINITY;
      for (int key = of; key < args_.plan.tokens; key += kNormParts) {
        most = larger(read(score_at(row, key)), most);
      }
      write(part_of(0, row) + of, most);
    });
  }

  // The larger, or NaN where one is.
  EMO_KERNEL static float larger(float a, float b) { return a > b || a != a ? a : b; }

  EMO_KERNEL void exponentiate() {
    for_parts([&](int row, int of) {
      float most = read(part_of(0, row)), sum = 0.0f;
#pragma unroll
      for (int i = 1; i < kNormParts; ++i) most = larger(read(part_of(0, row) + i), most);
      for (int key = of; key < args_.plan.tokens; key += kNormParts) {
        float* const at = score_at(row, key);
        const float power = expf(read(at) - most);
        write(at, power);
        sum += power;
      }
      write(part_of(1, row) + of, sum);
    });
  }

  // The softmax, rounded; zero for keys and rows that are no tokens.
  EMO_KERNEL void divide() {
    const AttentionPlan& plan = args_.plan;
    const int pairs = plan.padded / 2;
    for (int i = thread_; i < plan.padded * pairs; i += kTeam) {
      const int row = i / pairs, key = i % pairs * 2;
      Float2 p{0.0f, 0.0f};
      if (row < plan.tokens && key < plan.tokens) {
        float sum = 0.0f;
#pragma unroll
        for (int part = 0; part < kNormParts; ++part) sum += read(part_of(1, row) + part);
        p.x = read(score_at(row, key)) / sum;
        if (key + 1 < plan.tokens) p.y = read(score_at(row, key + 1)) / sum;
      }
      write_packed<Float2>(part(plan.p) + row * plan.p_stride + key, pack<T>(p));
    }
  }

  // z of the head: its share of the value channels of every token's pixel.
  template <class RowAt>
  EMO_KERNEL void mix(int head, const RowAt& row_at) {
    const AttentionPlan& plan = args_.plan;
    const int across = plan.wide / 16, tiles = plan.padded / 16 * across;
#pragma unroll 1
    for (int tile = thread_ / kLanes; tile < tiles; tile += kWarps) {
      const int row = tile / across * 16, column = tile % across * 16;
      PerLane<Accumulator> sums[2];
#pragma unroll 1
      for (int k = 0; k < plan.padded; k += 16) {
        PerLane<FragmentA<T>> left;
        PerLane<FragmentB<T>> right[2];
        load_a(left, part(plan.p) + row * plan.p_stride + k, plan.p_stride);
        load_b_by_rows(right, part(plan.v) + k * plan.v_stride + column, plan.v_stride);
        multiply_add(sums[0], left, right[0]);
        multiply_add(sums[1], left, right[1]);
      }
      put_tile(sums, row, column, [&](int token, int d, Float2 z) {
        const int64_t pixel = pixel_of(token);
        if (pixel >= 0) store(row_at(*this, pixel) + head * args_.shape.D + d, d, z);
      });
    }
  }

  // Channels d and d + 1 of a head.
  EMO_KERNEL void store(T* at, int d, Float2 z) const {
    const int D = args_.shape.D;
    if (d >= D) return;
    if (D % 2 == 0) return write_packed<Float2>(at, pack<T>(z));
    write(at, narrow<T>(z.x));
    if (d + 1 < D) write(at + 1, narrow<T>(z.y));
  }

  const AttentionArgs<T>& args_;
  const int thread_;
  char* const shared_;
  int n_ = 0, window_h_ = 0, window_w_ = 0;
  Copies copies_;
};

}  // namespace emo_kernels::cuda
