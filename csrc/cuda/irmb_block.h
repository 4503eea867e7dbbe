// Computes: the convolutional block in inference, whole: u = act(Wv norm(x) + bv), or norm(x) where
//     nothing expands, on the window under a tile, zero outside the map; c = silu(bn(dwconv(u)));
//     t = u + gate c with skips, else gate c; out = residual + gamma Wp t, each term where it
//     exists. Behind the attention kernel, which gives x, it is the rest of the attention block.
//     With squeeze-excite it runs twice: first the sums of c alone, over the pixels of a tile, of
//     which irmb_excite.h makes the gate; u and c are computed anew, for they are wider than x.
// Tiling: irmb_tiles.h. The pixels under the tile lie in shared memory, normalised; then for 32 of
//     the expanded channels at a time: u on tensor cores into shared memory, t from it by strips of
//     columns, Wp t into registers. The weights of the next step arrive meanwhile.
// Traffic: x once, halos from the caches; weights once a tile, from the caches; out once. The
//     expanded map never leaves the multiprocessor. 2 M (C halo + K K + O) operations for C + O
//     elements. With squeeze-excite x once more, and 2 M (C halo + K K) operations.
// Numerics: norm(x), u and t rounded to T, as eager does; all else in fp32, the residual added, one
//     rounding. Wp t is summed by ascending channel, and where few tiles share M out, split by
//     split after that (irmb_sum.h): the order depends on the shapes alone, the batch's size too.
//     The sums of c likewise: by thread, then by slot, then by tile.
// Limits: what fits in shared memory (irmb_tiles.h); up to 640 output channels, 384 with
//     squeeze-excite or where nothing expands.
#pragma once

#include "cuda/activation.h"
#include "cuda/irmb_frame.h"

namespace emo_kernels::cuda {

// kPairs = 0: the sums of c.
template <class T, int K, int S, int kPairs, int kWarps = kBlockWarps>
class Block : public BlockFrame<T, K, S, kWarps, kPairs <= kFewPairs> {
  // Others have no registers left for it.
  static constexpr bool kTakesAll = kPairs <= kFewPairs;
  using Frame = BlockFrame<T, K, S, kWarps, kTakesAll>;

 public:
  using Args = BlockArgs<T>;

  EMO_KERNEL Block(const Args& args, int thread, void* shared) : Frame(args, thread, shared) {}
  EMO_KERNEL Block(const Args& args, const Place& place, void* shared)
      : Block(args, place.group, shared) {}

  static int64_t shared_bytes(const Args& args) { return args.plan.shared; }

  template <class Each>
  EMO_KERNEL static void run(const Args& args, int64_t block, const Each& each) {
    const BlockTile tile = block_tile(args.shape, args.plan, block);
    each([&](Block& self) { self.load_pixels(tile); });
    normalize_rows(args.norm, args.front.eps, each, [](const Block&, int) { return true; });
    march(tile, each);
  }

  // The expanded channels of a tile whose pixels are there.
  template <class Each>
  EMO_KERNEL static void march(const BlockTile& tile, const Each& each) {
    each.then([&](Block& self) {
      self.fetch_expansion(tile.first_chunk, tile.end_chunk);
      self.clear_borders();
    });
    for (int chunk = tile.first_chunk; chunk < tile.end_chunk; ++chunk) {
      each([](Block& self) { self.copies_.template wait<0>(); });
      if constexpr (kPairs > 0) each.then([&](Block& self) { self.fetch_projection(chunk); });
      each.warps([&](Block& self) { self.expand(chunk); });
      each.barrier();
      each.then([&](Block& self) { self.fetch_expansion(chunk + 1, tile.end_chunk); });
      each([&](Block& self) {
        self.convolve(chunk);
        self.copies_.template wait<1>();  // the projection's
      });
      if constexpr (kPairs > 0) {
        each.warps([](Block& self) { self.shrink(); });
      } else {
        each.then([&](Block& self) { self.store_sums(chunk); });
      }
    }
    if constexpr (kPairs > 0) finish(each);
  }

 private:
  static constexpr int kStrip = kBlockStrip<K, S>;
  static constexpr int kColumns = (kStrip - 1) * S + K;  // of u that a strip of t meets
  static constexpr int kTeam = kWarps * kLanes, kPairsOfChunk = kChunk / 2;
  static constexpr int kSlots = kTeam / kPairsOfChunk;  // threads that share a pair of channels
  using Frame::args_;
  using Frame::bias_row;
  using Frame::dilation;
  using Frame::filter;
  using Frame::floats;
  using Frame::gate_row;
  using Frame::part;
  using Frame::shift_row;
  using Frame::step;
  using Frame::taps;
  using Frame::thread_;
  using Frame::tile;
  using Frame::warp;

  // ---- a chunk ----------------------------------------------------------------------------------

  // u of the chunk: a warp has every kWarps-th 16 pixels, all 32 channels.
  EMO_KERNEL void expand(int chunk) {
    const int pixels = tile().pixels();
#pragma unroll 1
    for (int m = this->warp(); m * 16 < pixels; m += kWarps) {
      PerLane<Accumulator> u[kChunk / 16][2];
      if (kTakesAll && args_.v.values.data == nullptr) {
        take_pixels(chunk, m, u);
      } else {
        multiply_pixels(part(args_.plan.x) + m * 16 * args_.plan.x_stride, u);
      }
      for_lanes([&](int lane) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const int pixel = m * 16 + row_of(lane, i);
          if (pixel >= pixels) continue;
          T* const at = expanded_at(pixel);
#pragma unroll
          for (int n = 0; n < kChunk / 8; ++n) {
            const float* const value = u[n / 2][n % 2][lane].value + i;
            const int column = n * 8 + column_of(lane, 0);
            write_packed<Float2>(at + column,
                                 pack<T>(activated(chunk, column, {value[0], value[1]})));
          }
        }
      });
    }
  }

  using ChunkOfPixels = PerLane<Accumulator>[kChunk / 16][2];  // of 16 pixels

  EMO_KERNEL void multiply_pixels(const T* x, ChunkOfPixels& u) const {
    const int stride = args_.plan.x_stride;
#pragma unroll 1
    for (int k = 0; k < rounded(args_.shape.C, 16); k += 16) {
      PerLane<FragmentA<T>> a;
      load_a(a, x + k, stride);
#pragma unroll
      for (int n = 0; n < kChunk / 16; ++n) {
        PerLane<FragmentB<T>> b[2];
        load_b(b, part(args_.plan.v) + n * 16 * stride + k, stride);
        multiply_add(u[n][0], a, b[0]);
        multiply_add(u[n][1], a, b[1]);
      }
    }
  }

  // u = norm(x): the chunk's channels of the m-th 16 pixels.
  EMO_KERNEL void take_pixels(int chunk, int m, ChunkOfPixels& u) const {
    const T* const x = part(args_.plan.x) + m * 16 * args_.plan.x_stride;
    for_lanes([&](int lane) {
#pragma unroll
      for (int n = 0; n < kChunk / 8; ++n) {
        const int c = chunk * kChunk + n * 8 + column_of(lane, 0);
        if (c >= args_.shape.C) continue;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const Float2 pair =
              widen(read_packed<Float2>(x + row_of(lane, i) * args_.plan.x_stride + c));
          u[n / 2][n % 2][lane].value[i] = pair.x;
          u[n / 2][n % 2][lane].value[i + 1] = pair.y;
        }
      }
    });
  }

  // Where the channels of a pixel of the map begin.
  EMO_KERNEL T* expanded_at(int pixel) const {
    const auto tile = this->tile();
    const int y = tile.row0 + pixel / tile.columns, x = tile.column0 + pixel % tile.columns;
    return part(args_.plan.e) + (y * args_.plan.span_w + x) * args_.plan.e_stride;
  }

  EMO_KERNEL Float2 activated(int chunk, int column, Float2 u) const {
    const float* const bias = taps(chunk, bias_row()) + column;
    return {activate<T>(args_.act, u.x + read(bias)), activate<T>(args_.act, u.y + read(bias + 1))};
  }

  // t of the chunk: a thread has a pair of channels, and every kSlots-th strip of columns.
  EMO_KERNEL void convolve(int chunk) {
    const BlockPlan& plan = args_.plan;
    const int thread = own_thread(thread_), channel = thread % kPairsOfChunk * 2;
    const int strips = (plan.tile_w + kStrip - 1) / kStrip;
    const float* const shift = taps(chunk, shift_row()) + channel;
    Float2 total{0.0f, 0.0f};
#pragma unroll 1
    for (int i = thread / kPairsOfChunk; i < plan.tile_h * strips; i += kSlots) {
      const int row = i / strips, column = i % strips * kStrip;
      Float2 sums[kStrip];
#pragma unroll
      for (int j = 0; j < kStrip; ++j) sums[j] = {read(shift), read(shift + 1)};
      const int at = (row * step() * plan.span_w + column * step()) * plan.e_stride + channel;
      add_taps(chunk, channel, part(plan.e) + at, sums);
#pragma unroll
      for (int j = 0; j < kStrip; ++j) {
        if (column + j >= plan.tile_w) continue;
        const Float2 c{silu<T>(sums[j].x), silu<T>(sums[j].y)};
        if constexpr (kPairs > 0) {
          put_convolved(chunk, row, column + j, channel, c);
        } else if (is_inside(row, column + j)) {
          total = total + c;
        }
      }
    }
    if constexpr (kPairs == 0) {
      write_packed<Float2>(sum_of_slot(thread / kPairsOfChunk) + channel, pack<float>(total));
    }
  }

  EMO_KERNEL void add_taps(int chunk, int channel, const T* u, Float2 (&sums)[kStrip]) const {
    const int down = dilation() * args_.plan.span_w * args_.plan.e_stride;
#pragma unroll 1
    for (int a = 0; a < filter(); ++a) {
      const float* const tap = taps(chunk, a * filter()) + channel;
      if constexpr (K == 0) {
        for (int b = 0; b < filter(); ++b) {
          const Float2 x =
              widen(read_packed<Float2>(u + a * down + b * dilation() * args_.plan.e_stride));
          sums[0] = fused(widen(read_packed<Float2>(tap + b * kChunk)), x, sums[0]);
        }
      } else {
        Float2 taps_of_row[K];
#pragma unroll
        for (int b = 0; b < K; ++b) taps_of_row[b] = widen(read_packed<Float2>(tap + b * kChunk));
#pragma unroll
        for (int p = 0; p < kColumns; ++p) {
          const Float2 x = widen(read_packed<Float2>(u + a * down + p * args_.plan.e_stride));
#pragma unroll
          for (int j = 0; j < kStrip; ++j) {
            const int b = p - S * j;
            if (b >= 0 && b < K) sums[j] = fused(taps_of_row[b], x, sums[j]);
          }
        }
      }
    }
  }

  EMO_KERNEL void put_convolved(int chunk, int row, int column, int channel, Float2 c) {
    const BlockPlan& plan = args_.plan;
    Float2 t = c;
    if (kTakesAll && args_.gate != nullptr) {
      const Float2 gate = widen(read_packed<Float2>(taps(chunk, gate_row()) + channel));
      t = {t.x * gate.x, t.y * gate.y};
    }
    if (args_.skip) {
      const int at = (row + args_.shape.P) * plan.span_w + column + args_.shape.P;
      t = t + widen(read_packed<Float2>(part(plan.e) + at * plan.e_stride + channel));
    }
    T* const to = part(plan.t) + (row * plan.tile_w + column) * plan.e_stride + channel;
    write_packed<Float2>(to, pack<T>(t));
  }

  // ---- the sums of c ----------------------------------------------------------------------------

  // Whether a pixel of the tile is one of the output.
  EMO_KERNEL bool is_inside(int row, int column) const {
    const auto tile = this->tile();
    return tile.row + row < args_.shape.HO && tile.column + column < args_.shape.WO;
  }

  // A slot's sums of the chunk's channels, where t would lie.
  EMO_KERNEL float* sum_of_slot(int slot) const { return floats(args_.plan.t) + slot * kChunk; }

  EMO_KERNEL void store_sums(int chunk) {
    const int m = chunk * kChunk + thread_;
    if (thread_ >= kChunk || m >= args_.shape.M) return;
    float sum = 0.0f;
    for (int slot = 0; slot < kSlots; ++slot) sum += read(sum_of_slot(slot) + thread_);
    const auto tile = this->tile();
    const int tiles = args_.plan.tiles_h * args_.plan.tiles_w;
    const int of =
        tile.row / args_.plan.tile_h * args_.plan.tiles_w + tile.column / args_.plan.tile_w;
    write(args_.sums + (int64_t{tile.n} * tiles + of) * args_.shape.M + m, sum);
  }

  // ---- the result -------------------------------------------------------------------------------

  template <class Each>
  EMO_KERNEL static void finish(const Each& each) {
    each.barrier();
    each.warps([](Block& self) { self.publish(); });
    each.barrier();
    each.then([](Block& self) {
      if (self.args_.in_pairs) return self.template store<Float2>();
      self.template store<float>();
    });
  }

  // Which 16 output channels a warp's j-th are.
  EMO_KERNEL int wide_tile(int warp, int j) const {
    return warp / args_.plan.warps_m + args_.plan.warps_n * j;
  }

  EMO_KERNEL void shrink() {
    const int stride = args_.plan.e_stride, warp = this->warp();
    const T* const t = part(args_.plan.t) + warp % args_.plan.warps_m * 32 * stride;
#pragma unroll 1  // unrolled, the sums leave no registers
    for (int k = 0; k < kChunk; k += 16) {
      PerLane<FragmentA<T>> a[2];
      load_a(a[0], t + k, stride);
      load_a(a[1], t + 16 * stride + k, stride);
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        if (wide_tile(warp, j) * 16 >= args_.shape.O) continue;
        PerLane<FragmentB<T>> b[2];
        load_b(b, part(args_.plan.proj) + wide_tile(warp, j) * 16 * stride + k, stride);
#pragma unroll
        for (int i = 0; i < 4; ++i) multiply_add(sums_[i / 2][j][i % 2], a[i / 2], b[i % 2]);
      }
    }
  }

  // The sums of pixel r of the tile, in shared memory that held pixels and chunks before.
  EMO_KERNEL float* sums_at(int r) const {
    return floats(0) + r * (rounded(args_.shape.O, 16) + 8);
  }

  EMO_KERNEL void publish() {
    const int warp = this->warp(), pixels = args_.plan.tile_h * args_.plan.tile_w;
    for_lanes([&](int lane) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = warp % args_.plan.warps_m * 32 + i / 2 * 16 + row_of(lane, i % 2 * 2);
        if (kWarps != kBlockWarps && r >= pixels) continue;
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          if (wide_tile(warp, j) * 16 >= args_.shape.O) continue;
          float* const to = sums_at(r) + wide_tile(warp, j) * 16 + column_of(lane, 0);
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float* const value = sums_[i / 2][j][h][lane].value + i % 2 * 2;
            write_packed<Float2>(to + h * 8, pack<float>(Float2{value[0], value[1]}));
          }
        }
      }
    });
  }

  // Value is two output channels, or one.
  template <class Value>
  EMO_KERNEL void store() {
    const BlockShape& s = args_.shape;
    const auto tile = this->tile();
    const int values = s.O / kChannels<Value>;
    for (int i = thread_; i < args_.plan.tile_h * args_.plan.tile_w * values; i += kTeam) {
      const int r = i / values, o = i % values * kChannels<Value>;
      const int row = tile.row + r / args_.plan.tile_w;
      const int column = tile.column + r % args_.plan.tile_w;
      if (row >= s.HO || column >= s.WO) continue;
      const Value y = widen(read_packed<Value>(sums_at(r) + o));
      const int64_t at = ((int64_t{tile.n} * s.HO + row) * s.WO + column) * s.O + o;
      if (args_.partials != nullptr) {
        const int64_t size = s.N * s.HO * s.WO * s.O;
        write_packed<Value>(args_.partials + tile.split * size + at, pack<float>(y));
      } else {
        write_packed<Value>(args_.out + at, pack<T>(finished(args_, at, o, y)));
      }
    }
  }

  PerLane<Accumulator> sums_[2][kPairs > 0 ? kPairs : 1][2];
};

}  // namespace emo_kernels::cuda
