// Which pixels and expanded channels a block of the whole-block kernels has, and where in its
// shared memory what lies.
//
// A block has a tile of the output of one image, and of the M expanded channels a share in chunks.
// Under the tile lies a window of the input; of it the part inside the map, row after row, is the
// block's matrix of pixels. Its warps, 8 or 16, stand in warps_m x warps_n over the output: each
// has 32 pixels by every warps_n-th 16 channels.
#pragma once

#include <initializer_list>

#include "cuda/depthwise_tiles.h"
#include "cuda/norm_rows.h"

namespace emo_kernels::cuda {

constexpr int kChunk = 32;       // expanded channels at a time
constexpr int kReserved = 1024;  // bytes of shared memory that the driver takes of every block's
constexpr int kMostPairs = 5;    // of 8 output channels that a warp has at most
constexpr int kFewPairs = 3;     // of one that may have a gate, or nothing to expand

struct BlockShape {
  int64_t N = 0;
  int C = 0, H = 0, W = 0, M = 0, O = 0, HO = 0, WO = 0, K = 0, S = 1, P = 0, D = 1;
};

struct BlockPlan {
  int warps_m = 0, warps_n = 0, pairs = 0;  // pairs of 8 output channels of a warp
  int tile_h = 0, tile_w = 0, tiles_h = 0, tiles_w = 0;
  int span_h = 0, span_w = 0;                      // of the window under a tile
  int pixels = 0;                                  // rows of the matrix of pixels
  int chunks = 0, splits = 1, chunks_a_split = 0;  // of M
  int x_stride = 0, e_stride = 0;                  // elements from one row to the next
  // Bytes at which each part begins: pixels, expanded chunk, chunk behind the convolution, both
  // weights, filters and shifts of two chunks, the norm in front, the tile; and all of them.
  int x = 0, e = 0, t = 0, v = 0, proj = 0, taps = 0, norm = 0, tile = 0, shared = 0;
  int warps = kBlockWarps;

  EMO_ANYWHERE int64_t tiles() const { return int64_t{tiles_h} * tiles_w; }
};

// Columns of the output that a thread convolves at once.
template <int K, int S>
constexpr int kBlockStrip = K == 0             ? 1
                            : K == 5 && S == 2 ? 2
                                               : 4;

// What lies in the rows of `taps`: the filters of a chunk, its biases, its shifts and its gates.
EMO_ANYWHERE int taps_rows(int K) { return K * K + 3; }

namespace detail {

inline int span_of(int tile, const BlockShape& s) { return (tile - 1) * s.S + (s.K - 1) * s.D + 1; }

// Fills in all that follows from the tile and the warps; returns the bytes.
inline int lay_out(BlockPlan& plan, const BlockShape& s, int strip, int bytes) {
  plan.tiles_h = static_cast<int>(ceil_div(s.HO, plan.tile_h));
  plan.tiles_w = static_cast<int>(ceil_div(s.WO, plan.tile_w));
  plan.span_h = span_of(plan.tile_h, s);
  plan.span_w = span_of(rounded(plan.tile_w, strip), s);
  plan.pixels = rounded(least(plan.span_h, s.H) * least(span_of(plan.tile_w, s), s.W), 16);
  plan.chunks = static_cast<int>(ceil_div(s.M, kChunk));
  plan.x_stride = padded_row(s.C), plan.e_stride = padded_row(kChunk);
  int64_t at = 0;
  const auto place = [&](int& part, int64_t elements, int size) {
    part = static_cast<int>(at);
    at += (elements * size + 15) / 16 * 16;
    if (at > (1 << 30)) at = 1 << 30;
  };
  place(plan.x, int64_t{plan.pixels} * plan.x_stride, bytes);
  const int64_t e = int64_t{plan.span_h} * plan.span_w * plan.e_stride * bytes;
  const int64_t parts = norm_parts_bytes(plan.pixels);  // before there are chunks
  place(plan.e, e > parts ? e : parts, 1);
  place(plan.t, int64_t{plan.warps_m} * 32 * plan.e_stride, bytes);
  place(plan.v, int64_t{kChunk} * plan.x_stride, bytes);
  place(plan.proj, int64_t{rounded(s.O, 16)} * plan.e_stride, bytes);
  place(plan.taps, int64_t{2} * taps_rows(s.K) * kChunk, 4);
  place(plan.norm, int64_t{2} * rounded(s.C, 16), 4);
  // In the end the sums lie in front of the tile: of all pixels of the warps, if they are 8.
  const int pixels = plan.warps == kBlockWarps ? plan.warps_m * 32 : plan.tile_h * plan.tile_w;
  const int64_t sums = int64_t{pixels} * (rounded(s.O, 16) + 8) * 4;
  if (at < sums) at = sums;
  place(plan.tile, 8, 4);
  plan.shared = static_cast<int>(at);
  return plan.shared;
}

// Shares M out among about kFewBlocks blocks, or not at all.
inline void share_out(BlockPlan& plan, const BlockShape& s, bool shares) {
  const int64_t blocks = s.N * plan.tiles();
  const int64_t wanted = shares && blocks > 0 ? ceil_div(kFewBlocks, blocks) : 1;
  const int splits = wanted < plan.chunks ? static_cast<int>(wanted) : plan.chunks;
  plan.chunks_a_split = static_cast<int>(ceil_div(plan.chunks, splits));
  plan.splits = static_cast<int>(ceil_div(plan.chunks, plan.chunks_a_split));
}

// How long a launch of so many blocks takes, in multiplications of a multiprocessor as warps make
// them, with what they pad and compute twice: `each` of a block. Alone on its multiprocessor, a
// block's phases overlap with no other's; 16 warps hide more of what they wait for than 8. By what
// factor is assumed, not measured.
inline double time_of_blocks(int64_t blocks, double each, int warps, int shared, int limit) {
  const bool twice = warps == kBlockWarps && 2 * (shared + kReserved) <= limit + kReserved;
  const double alone = twice ? 1.0 : warps == kBlockWarps ? 1.4 : 1.1;
  return static_cast<double>(ceil_div(blocks, kFewBlocks / 2)) * alone * each;
}

// Of a block of that plan: its chunks, and pixels and results before and behind them.
inline double time_of_chunks(const BlockPlan& plan, const BlockShape& s) {
  const double pixels = plan.pixels, sums = 32.0 * plan.warps_m * s.O;
  const double expand = pixels * s.C;
  const double shrink = 32.0 * plan.warps_m * plan.warps_n * plan.pairs * 16;
  const double convolve = 8.0 * plan.tile_h * plan.tile_w * s.K * s.K;  // on slower units
  const double weights = 8.0 * (s.C + s.O);
  const double chunks = (expand + shrink + convolve + weights) * kChunk * plan.chunks_a_split;
  return chunks + 16.0 * pixels * s.C + (plan.splits > 1 ? 32.0 : 16.0) * sums;
}

inline double time_of(const BlockPlan& plan, const BlockShape& s, int limit) {
  const int64_t blocks = s.N * plan.tiles() * plan.splits;
  return time_of_blocks(blocks, time_of_chunks(plan, s), plan.warps, plan.shared, limit);
}

}  // namespace detail

// The fastest plan that fits, as far as this counts; its `shared` is 0 where none does.
inline BlockPlan make_block_plan(const BlockShape& s, int strip, int bytes, int shared_limit,
                                 int most_pairs = kMostPairs) {
  BlockPlan best;
  double least_time = 0.0;
  const int wide = static_cast<int>(ceil_div(s.O, 16));
  for (int warps_m = 4; warps_m >= 1; warps_m /= 2) {
    BlockPlan plan;
    plan.warps_m = warps_m, plan.warps_n = kBlockWarps / warps_m;
    plan.pairs = static_cast<int>(ceil_div(wide, plan.warps_n));
    if (plan.pairs > most_pairs) continue;
    const int pixels = 32 * warps_m;
    for (plan.tile_w = 1; plan.tile_w <= least(s.WO, pixels); ++plan.tile_w) {
      plan.tile_h = least(s.HO, pixels / plan.tile_w);
      if (detail::lay_out(plan, s, strip, bytes) > shared_limit) continue;
      for (const bool shares : {false, true}) {
        detail::share_out(plan, s, shares);
        const double time = detail::time_of(plan, s, shared_limit);
        if (best.shared != 0 && time >= least_time) continue;
        best = plan;
        least_time = time;
      }
    }
  }
  return best;
}

// What one block has.
struct BlockTile {
  int n;
  int row, column;              // of the output, where the tile begins
  int top, left;                // of the input, where the window begins; may lie outside
  int first_row, first_column;  // of the window's part inside the map
  int rows, columns;            // of that part
  int split, first_chunk, end_chunk;
};

EMO_KERNEL BlockTile block_tile(const BlockShape& s, const BlockPlan& plan, int64_t block) {
  BlockTile tile;
  auto rest = static_cast<uint32_t>(block);  // a grid has fewer
  tile.split = static_cast<int>(rest % plan.splits);
  rest /= plan.splits;
  tile.column = static_cast<int>(rest % plan.tiles_w) * plan.tile_w;
  rest /= plan.tiles_w;
  tile.row = static_cast<int>(rest % plan.tiles_h) * plan.tile_h;
  tile.n = static_cast<int>(rest / plan.tiles_h);
  tile.top = tile.row * s.S - s.P;
  tile.left = tile.column * s.S - s.P;
  const int width = (plan.tile_w - 1) * s.S + (s.K - 1) * s.D + 1;
  tile.first_row = most(tile.top, 0);
  tile.first_column = most(tile.left, 0);
  tile.rows = most(least(tile.top + plan.span_h, s.H) - tile.first_row, 0);
  tile.columns = most(least(tile.left + width, s.W) - tile.first_column, 0);
  tile.first_chunk = tile.split * plan.chunks_a_split;
  tile.end_chunk = least(tile.first_chunk + plan.chunks_a_split, plan.chunks);
  return tile;
}

// What the kernels of a block are given.
template <class T>
struct BlockArgs {
  BlockShape shape;
  BlockPlan plan;
  Matrix pixels;      // (H W, C) of image 0: x (N, H, W, C)
  const T* residual;  // (N, HO, WO, O) or null
  T* out;             // (N, HO, WO, O); null where partial sums are left
  float* partials;    // (splits, N, HO, WO, O) or null
  float* sums;        // (N, tiles, M), where the sums of c are wanted
  const float* gate;  // (N, M) or null
  Norm norm;          // kAffine: over the statistics of `front`
  ChannelNorm front, bn;
  Matrix v, proj;               // (M, C) or absent: u = norm(x), M = C; (O, M)
  Vector bias, stencil, gamma;  // (M,), (M, K, K), (O,)
  Activation act;
  bool skip;      // u + c
  bool in_pairs;  // whether two output channels can be written at once
};

// gamma y + residual at element `at` of the output, of output channel o: one channel or two.
template <class Value, class Args>
EMO_KERNEL Value finished(const Args& args, int64_t at, int o, Value y) {
#pragma unroll
  for (int i = 0; i < kChannels<Value>; ++i) channel(y, i) *= value_at(args.gamma, o + i, 1.0f);
  return args.residual == nullptr ? y : y + widen(read_packed<Value>(args.residual + at));
}

}  // namespace emo_kernels::cuda
