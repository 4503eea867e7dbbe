// Computes: the attention of a block in inference: h = norm(x); inside every window of h, padded by
//     zeros, z = softmax(q k^T / sqrt(D)) h of each head, q and k from Wqk h + bqk, or h itself.
//     Padded tokens are keys like others. irmb_block.h does the rest of the block.
// Tiling: a block has one window of one image, of at most 128 tokens, and some of the heads, one
//     after the other. h of the window lies in shared memory in the order of its tokens, then of a
//     head q, k and v, the scores in fp32 and their softmax; all products on tensor cores.
// Traffic: x once for each share of the heads, Wqk from the caches, z once. 4 C + 4 tokens
//     operations for a channel of a pixel.
// Numerics: h, q, k and the softmax rounded to T; scores, maxima and sums in fp32; z rounded once.
//     Every sum in one order, whatever the batch and the shares of the heads.
// Limits: windows of at most 128 tokens, what fits in shared memory; values before the expansion.
#pragma once

#include "cuda/norm_rows.h"

namespace emo_kernels::cuda {

struct AttentionShape {
  int64_t N = 0;
  int C = 0, H = 0, W = 0, D = 0;
  int window_h = 0, window_w = 0, windows_h = 0, windows_w = 0;
  bool strided = true;  // tokens of a window lie windows_h x windows_w pixels apart
};

struct AttentionPlan {
  int tokens = 0, padded = 0, wide = 0;  // of a window, in tiles of 16; D in tiles of 16
  int heads = 0, shares = 1, heads_a_share = 1;
  int h_stride = 0, qk_stride = 0, v_stride = 0, score_stride = 0, p_stride = 0;
  // Bytes at which each part begins: the window's pixels, a head's weights, and in their place its
  // scores and softmax; q and k, v, the sums of a row's parts, the norm in front; all of them.
  int h = 0, weight = 0, scores = 0, p = 0, qk = 0, v = 0, parts = 0, norm = 0, shared = 0;
};

constexpr int kMostTokens = 128;

// `shared` is 0 where it does not fit.
inline AttentionPlan make_attention_plan(const AttentionShape& s, int bytes, int64_t limit) {
  AttentionPlan plan;
  const int64_t tokens = int64_t{s.window_h} * s.window_w;
  if (tokens > kMostTokens) return plan;
  plan.tokens = static_cast<int>(tokens), plan.padded = rounded(plan.tokens, 16);
  plan.wide = rounded(s.D, 16), plan.heads = s.C / s.D;
  plan.h_stride = padded_row(s.C), plan.qk_stride = padded_row(2 * plan.wide);
  plan.v_stride = padded_row(plan.wide), plan.p_stride = padded_row(plan.padded);
  plan.score_stride = plan.padded + 1;
  int64_t at = 0;
  const auto place = [&](int& part, int64_t elements, int size) {
    part = static_cast<int>(at < (1 << 30) ? at : 1 << 30);
    at += (elements * size + 15) / 16 * 16;
  };
  place(plan.h, int64_t{plan.padded} * plan.h_stride, bytes);
  place(plan.weight, int64_t{2} * plan.wide * plan.h_stride, bytes);
  const int64_t behind = at;
  at = plan.weight;
  place(plan.scores, int64_t{plan.padded} * plan.score_stride, 4);
  place(plan.p, int64_t{plan.padded} * plan.p_stride, bytes);
  if (at < behind) at = behind;
  place(plan.qk, int64_t{plan.padded} * plan.qk_stride, bytes);
  place(plan.v, int64_t{plan.padded} * plan.v_stride, bytes);
  place(plan.parts, norm_parts_bytes(plan.padded), 1);
  place(plan.norm, int64_t{2} * rounded(s.C, 16), 4);
  if (at > limit) return plan;
  plan.shared = static_cast<int>(at);
  const int64_t windows = s.N * s.windows_h * s.windows_w;
  const int64_t wanted = windows > 0 ? ceil_div(kFewBlocks, windows) : 1;
  const int shares = wanted < plan.heads ? static_cast<int>(wanted) : plan.heads;
  plan.heads_a_share = static_cast<int>(ceil_div(plan.heads, shares));
  plan.shares = static_cast<int>(ceil_div(plan.heads, plan.heads_a_share));
  return plan;
}

template <class T>
struct AttentionArgs {
  AttentionShape shape;
  AttentionPlan plan;
  Matrix pixels;  // (H W, C) of image 0: x (N, H, W, C)
  T* out;         // (N, H, W, C)
  Norm norm;      // kAffine: over the statistics of `front`
  ChannelNorm front;
  Matrix weight;  // (2 C, C), or absent: q = k = h
  Vector bias;    // (2 C,)
  float scale;    // 1 / sqrt(D)
};

template <class T>
class Attention {
 public:
  using Args = AttentionArgs<T>;

  EMO_KERNEL Attention(const Args& args, const Place& place, void* shared)
      : args_(args), thread_(place.group), shared_(static_cast<char*>(shared)) {
    auto rest = static_cast<uint32_t>(place.block);  // a grid has fewer
    share_ = static_cast<int>(rest % args.plan.shares);
    rest /= args.plan.shares;
    window_w_ = static_cast<int>(rest % args.shape.windows_w);
    rest /= args.shape.windows_w;
    window_h_ = static_cast<int>(rest % args.shape.windows_h);
    n_ = static_cast<int>(rest / args.shape.windows_h);
  }

  static int64_t shared_bytes(const Args& args) { return args.plan.shared; }

  template <class Each>
  EMO_KERNEL static void run(const Args& args, int64_t block, const Each& each) {
    const AttentionPlan& plan = args.plan;
    const int share = static_cast<int>(static_cast<uint32_t>(block) % plan.shares);
    const int first = share * plan.heads_a_share;
    const int end = least(first + plan.heads_a_share, plan.heads);
    each([](Attention& self) { self.load_window(); });
    normalize_rows(args.norm, args.front.eps, each,
                   [](const Attention& self, int token) { return self.pixel_of(token) >= 0; });
    for (int head = first; head < end; ++head) {
      each([&](Attention& self) { self.fetch_weight(head); });
      each.warps([&](Attention& self) { self.project(head); });
      each([&](Attention& self) { self.copy_values(head); });
      each.warps([](Attention& self) { self.score(); });
      each.barrier();
      each([](Attention& self) { self.find_maxima(); });
      each([](Attention& self) { self.exponentiate(); });
      each([](Attention& self) { self.divide(); });
      each.warps([&](Attention& self) { self.mix(head); });
      each.barrier();
    }
  }

  EMO_KERNEL NormRows<T> rows() const {
    const AttentionPlan& plan = args_.plan;
    return {part(plan.h),  floats(plan.norm), floats(plan.parts), plan.h_stride,
            args_.shape.C, plan.padded,       plan.tokens,        thread_};
  }

 private:
  EMO_KERNEL T* part(int at) const { return reinterpret_cast<T*>(shared_ + at); }
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
    const TileOf whole{0, plan.padded, rounded(s.C, 16), thread_, kBlockThreads};
    start_tile(copies_, part(plan.h), plan.h_stride, image, whole,
               [&](int token) { return pixel_of(token); });
    copies_.close_group();
    rows().load_affine(args_.norm, args_.front);
    copies_.template wait<0>();
  }

  // A head's rows of Wqk, its k behind its q, each in tiles of 16. Without, q = k = h.
  EMO_KERNEL void fetch_weight(int head) {
    const AttentionShape& s = args_.shape;
    if (args_.weight.values.data != nullptr) {
      const int wide = args_.plan.wide;
      const TileOf whole{0, 2 * wide, rounded(s.C, 16), thread_, kBlockThreads};
      start_tile(copies_, part(args_.plan.weight), args_.plan.h_stride, args_.weight, whole,
                 [&](int r) {
                   const int d = r % wide;
                   return int64_t{d < s.D ? r / wide * s.C + head * s.D + d : -1};
                 });
      copies_.close_group();
      copies_.template wait<0>();
      return;
    }
    for_pairs([&](int token, int pair) {
      const Float2 h = head_of_h(head, token, pair);
      for (int which = 0; which < 2; ++which) put_qk(token, which * args_.plan.wide + pair, h);
    });
  }

  // Calls visit(token, d) for every second d of a head in tiles of 16.
  template <class Visit>
  EMO_KERNEL void for_pairs(const Visit& visit) const {
    const int pairs = args_.plan.wide / 2;
    for (int i = thread_; i < args_.plan.padded * pairs; i += kBlockThreads) {
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
    for (int tile = thread_ / kLanes; tile < tiles; tile += kBlockWarps) {
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

  EMO_KERNEL void project(int head) {
    if (args_.weight.values.data == nullptr) return;
    const AttentionPlan& plan = args_.plan;
    multiply(part(plan.h), plan.h_stride, part(plan.weight), plan.h_stride, 2 * plan.wide,
             rounded(args_.shape.C, 16), [&](int token, int column, Float2 value) {
               value.x += bias_of(head, column);
               value.y += bias_of(head, column + 1);
               put_qk(token, column, value);
             });
  }

  EMO_KERNEL float bias_of(int head, int column) const {
    const int d = column % args_.plan.wide, which = column / args_.plan.wide;
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
    for (int i = thread_; i < args_.plan.tokens * kNormParts; i += kBlockThreads) {
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
    for (int i = thread_; i < plan.padded * pairs; i += kBlockThreads) {
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
  EMO_KERNEL void mix(int head) {
    const AttentionPlan& plan = args_.plan;
    const int across = plan.wide / 16, tiles = plan.padded / 16 * across;
#pragma unroll 1
    for (int tile = thread_ / kLanes; tile < tiles; tile += kBlockWarps) {
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
      put_tile(sums, row, column, [&](int token, int d, Float2 z) { store(head, token, d, z); });
    }
  }

  EMO_KERNEL void store(int head, int token, int d, Float2 z) const {
    const AttentionShape& s = args_.shape;
    const int64_t pixel = pixel_of(token);
    if (pixel < 0) return;
    T* const at = args_.out + (int64_t{n_} * s.H * s.W + pixel) * s.C + head * s.D + d;
    if (d < s.D) write(at, narrow<T>(z.x));
    if (d + 1 < s.D) write(at + 1, narrow<T>(z.y));
  }

  const Args& args_;
  const int thread_;
  char* const shared_;
  int share_, window_h_, window_w_, n_;
  Copies copies_;
};

}  // namespace emo_kernels::cuda
