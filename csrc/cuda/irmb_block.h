// Computes: the convolutional block in inference, whole: u = act(Wv norm(x) + bv) on the window
//     under a tile, zero outside the map; c = silu(bn(dwconv(u))); t = u + c with skips, else c;
//     out = residual + gamma Wp t, each term where it exists. Behind the attention kernel, which
//     gives x, it is the rest of the attention block.
// Tiling: irmb_tiles.h. The pixels under the tile lie in shared memory, normalised; then for 32 of
//     the expanded channels at a time: u on tensor cores into shared memory, t from it by strips of
//     columns, Wp t into registers. The weights of the next step arrive meanwhile.
// Traffic: x once, halos from the caches; weights once a tile, from the caches; out once. The
//     expanded map never leaves the multiprocessor. 2 M (C halo + K K + O) operations for C + O
//     elements.
// Numerics: norm(x), u and t rounded to T, as eager does; all else in fp32, the residual added, one
//     rounding. Wp t is summed by ascending channel, and where few tiles share M out, split by
//     split after that (irmb_sum.h): the order depends on the shapes alone, the batch's size too.
// Limits: what fits in shared memory (irmb_tiles.h); up to 640 output channels.
#pragma once

#include "cuda/activation.h"
#include "cuda/irmb_tiles.h"
#include "cuda/norm_rows.h"

namespace emo_kernels::cuda {

// K = 0: any filter, stride and dilation, as the shape says.
template <class T, int K, int S, int kPairs>
class Block {
 public:
  using Args = BlockArgs<T>;

  EMO_KERNEL Block(const Args& args, const Place& place, void* shared)
      : args_(args), thread_(place.group), shared_(static_cast<char*>(shared)) {}

  static int64_t shared_bytes(const Args& args) { return args.plan.shared; }

  template <class Each>
  EMO_KERNEL static void run(const Args& args, int64_t block, const Each& each) {
    const BlockTile tile = block_tile(args.shape, args.plan, block);
    each([&](Block& self) { self.load_pixels(tile); });
    normalize_rows(args.norm, args.front.eps, each, [](const Block&, int) { return true; });
    each.then([&](Block& self) {
      self.fetch_expansion(tile.first_chunk, tile.end_chunk);
      self.clear_borders();
    });
    for (int chunk = tile.first_chunk; chunk < tile.end_chunk; ++chunk) {
      each([](Block& self) { self.copies_.template wait<0>(); });
      each.then([&](Block& self) { self.fetch_projection(chunk); });
      each.warps([&](Block& self) { self.expand(chunk); });
      each.barrier();
      each.then([&](Block& self) { self.fetch_expansion(chunk + 1, tile.end_chunk); });
      each([&](Block& self) {
        self.convolve(chunk);
        self.copies_.template wait<1>();  // the projection's
      });
      each.warps([](Block& self) { self.shrink(); });
    }
    each.barrier();
    each.warps([](Block& self) { self.publish(); });
    each.barrier();
    each.then([](Block& self) {
      if (self.args_.in_pairs) return self.template store<Float2>();
      self.template store<float>();
    });
  }

  EMO_KERNEL NormRows<T> rows() const {
    const BlockPlan& plan = args_.plan;
    return {part(plan.x),  floats(plan.norm), floats(plan.e),  plan.x_stride,
            args_.shape.C, plan.pixels,       tile().pixels(), thread_};
  }

 private:
  static constexpr int kStrip = kBlockStrip<K, S>;
  static constexpr int kColumns = (kStrip - 1) * S + K;  // of u that a strip of t meets

  EMO_KERNEL T* part(int at) const { return reinterpret_cast<T*>(shared_ + at); }
  EMO_KERNEL float* floats(int at) const { return reinterpret_cast<float*>(shared_ + at); }
  EMO_KERNEL int filter() const { return K == 0 ? args_.shape.K : K; }
  EMO_KERNEL int step() const { return K == 0 ? args_.shape.S : S; }
  EMO_KERNEL int dilation() const { return K == 0 ? args_.shape.D : 1; }

  EMO_KERNEL int warp() const { return thread_ / kLanes; }
  // The tile, in shared memory to spare registers: where in the window its part inside the map
  // lies, and where in the output it begins.
  struct Tile {
    int row0, column0, rows, columns, n, row, column, split;

    EMO_KERNEL int pixels() const { return rows * columns; }
  };
  EMO_KERNEL int* tile_at(int i) const {
    return reinterpret_cast<int*>(shared_ + args_.plan.tile) + i;
  }
  EMO_KERNEL Tile tile() const {
    return {read(tile_at(0)), read(tile_at(1)), read(tile_at(2)), read(tile_at(3)),
            read(tile_at(4)), read(tile_at(5)), read(tile_at(6)), read(tile_at(7))};
  }

  // Row `row` of a chunk's filters, biases and shifts.
  EMO_KERNEL float* taps(int chunk, int row) const {
    return floats(args_.plan.taps) + (chunk % 2 * taps_rows(filter()) + row) * kChunk;
  }

  // ---- pixels -----------------------------------------------------------------------------------

  EMO_KERNEL void load_pixels(const BlockTile& tile) {
    const BlockShape& s = args_.shape;
    if (thread_ == 0) {
      const int values[] = {tile.first_row - tile.top,
                            tile.first_column - tile.left,
                            tile.rows,
                            tile.columns,
                            tile.n,
                            tile.row,
                            tile.column,
                            tile.split};
#pragma unroll
      for (int i = 0; i < 8; ++i) write(tile_at(i), values[i]);
    }
    Matrix image = args_.pixels;
    image.values.data =
        static_cast<const T*>(image.values.data) + int64_t{tile.n} * image.rows * s.C;
    const int pixels = tile.rows * tile.columns;
    const TileOf whole{0, rounded(pixels, 16), rounded(s.C, 16), thread_, kBlockThreads};
    start_tile(copies_, part(args_.plan.x), args_.plan.x_stride, image, whole, [&](int r) {
      if (r >= pixels) return int64_t{-1};
      const int row = tile.first_row + r / tile.columns;
      return int64_t{row} * s.W + tile.first_column + r % tile.columns;
    });
    copies_.close_group();
    const BlockPlan& plan = args_.plan;
    const NormRows<T> front{part(plan.x), floats(plan.norm), nullptr, 0, s.C, 0, 0, thread_};
    front.load_affine(args_.norm, args_.front);
    copies_.template wait<0>();
  }

  // ---- weights ----------------------------------------------------------------------------------

  // Begins to bring Wv's rows of a chunk, and its filters times their norm's scales.
  EMO_KERNEL void fetch_expansion(int chunk, int end_chunk) {
    if (chunk < end_chunk) {
      const TileOf rows{0, kChunk, rounded(args_.shape.C, 16), anew(thread_), kBlockThreads};
      start_tile(copies_, part(args_.plan.v), args_.plan.x_stride, args_.v, rows, [&](int r) {
        const int row = chunk * kChunk + r;
        return int64_t{row < args_.v.rows ? row : -1};
      });
      const int filters = filter() * filter();
#pragma unroll 1
      for (int i = anew(thread_); i < taps_rows(filter()) * kChunk; i += kBlockThreads) {
        const int row = i / kChunk, m = chunk * kChunk + i % kChunk;
        write(taps(chunk, row) + i % kChunk, m < args_.shape.M ? tap(row, m, filters) : 0.0f);
      }
    }
    copies_.close_group();
  }

  EMO_KERNEL float tap(int row, int m, int filters) const {
    if (row == filters) return value_at(args_.bias, m);
    const Float2 affine = affine_of(args_.bn, m);
    if (row > filters) return affine.y;
    return value_at(args_.stencil, int64_t{m} * filters + row) * affine.x;
  }

  // Begins to bring Wp's columns of a chunk.
  EMO_KERNEL void fetch_projection(int chunk) {
    const TileOf columns{chunk * kChunk, rounded(args_.shape.O, 16), kChunk, anew(thread_),
                         kBlockThreads};
    start_tile(copies_, part(args_.plan.proj), args_.plan.e_stride, args_.proj, columns,
               [&](int r) { return int64_t{r < args_.proj.rows ? r : -1}; });
    copies_.close_group();
  }

  // Zeros where no chunk writes: outside the map, and behind the tile's pixels.
  EMO_KERNEL void clear_borders() {
    const BlockPlan& plan = args_.plan;
    const Tile tile = this->tile();
    constexpr int kPairsOfChunk = kChunk / 2;
    const auto clear = [&](int at, int row, int pair) {
      write_packed<Float2>(part(at) + row * plan.e_stride + 2 * pair, pack<T>(Float2{0.0f, 0.0f}));
    };
    for (int i = thread_; i < plan.span_h * plan.span_w * kPairsOfChunk; i += kBlockThreads) {
      const int at = i / kPairsOfChunk, row = at / plan.span_w, column = at % plan.span_w;
      const bool is_map =
          inside(row - tile.row0, tile.rows) && inside(column - tile.column0, tile.columns);
      if (!is_map) clear(plan.e, at, i % kPairsOfChunk);
    }
    const int first = plan.tile_h * plan.tile_w, end = 32 * plan.warps_m;
    for (int i = thread_; i < (end - first) * kPairsOfChunk; i += kBlockThreads) {
      clear(plan.t, first + i / kPairsOfChunk, i % kPairsOfChunk);
    }
  }

  // ---- a chunk ----------------------------------------------------------------------------------

  // u of the chunk: a warp has every eighth 16 pixels, all 32 channels.
  EMO_KERNEL void expand(int chunk) {
    const int stride = args_.plan.x_stride, pixels = tile().pixels();
#pragma unroll 1
    for (int m = anew(warp()); m * 16 < pixels; m += kBlockWarps) {
      PerLane<Accumulator> u[kChunk / 16][2];
#pragma unroll 1
      for (int k = 0; k < rounded(args_.shape.C, 16); k += 16) {
        PerLane<FragmentA<T>> a;
        load_a(a, part(args_.plan.x) + m * 16 * stride + k, stride);
#pragma unroll
        for (int n = 0; n < kChunk / 16; ++n) {
          PerLane<FragmentB<T>> b[2];
          load_b(b, part(args_.plan.v) + n * 16 * stride + k, stride);
          multiply_add(u[n][0], a, b[0]);
          multiply_add(u[n][1], a, b[1]);
        }
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

  // Where the channels of a pixel of the map begin.
  EMO_KERNEL T* expanded_at(int pixel) const {
    const Tile tile = this->tile();
    const int y = tile.row0 + pixel / tile.columns, x = tile.column0 + pixel % tile.columns;
    return part(args_.plan.e) + (y * args_.plan.span_w + x) * args_.plan.e_stride;
  }

  EMO_KERNEL Float2 activated(int chunk, int column, Float2 u) const {
    const float* const bias = taps(chunk, filter() * filter()) + column;
    return {activate<T>(args_.act, u.x + read(bias)), activate<T>(args_.act, u.y + read(bias + 1))};
  }

  // t of the chunk: a thread has a pair of channels, and every 16th strip of columns.
  EMO_KERNEL void convolve(int chunk) {
    constexpr int kPairsOfChunk = kChunk / 2, kSlots = kBlockThreads / kPairsOfChunk;
    const BlockPlan& plan = args_.plan;
    const int thread = anew(thread_), channel = thread % kPairsOfChunk * 2;
    const int strips = (plan.tile_w + kStrip - 1) / kStrip;
    const float* const shift = taps(chunk, filter() * filter() + 1) + channel;
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
        if (column + j < plan.tile_w) put_convolved(row, column + j, channel, sums[j]);
      }
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

  EMO_KERNEL void put_convolved(int row, int column, int channel, Float2 z) {
    const BlockPlan& plan = args_.plan;
    Float2 t{silu<T>(z.x), silu<T>(z.y)};
    if (args_.skip) {
      const int at = (row + args_.shape.P) * plan.span_w + column + args_.shape.P;
      t = t + widen(read_packed<Float2>(part(plan.e) + at * plan.e_stride + channel));
    }
    T* const to = part(plan.t) + (row * plan.tile_w + column) * plan.e_stride + channel;
    write_packed<Float2>(to, pack<T>(t));
  }

  // Which 16 output channels a warp's j-th are.
  EMO_KERNEL int wide_tile(int warp, int j) const {
    return warp / args_.plan.warps_m + args_.plan.warps_n * j;
  }

  EMO_KERNEL void shrink() {
    const int stride = args_.plan.e_stride, warp = anew(this->warp());
    const T* const t = part(args_.plan.t) + warp % args_.plan.warps_m * 32 * stride;
#pragma unroll
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

  // ---- the result -------------------------------------------------------------------------------

  // The sums of pixel r of the tile, in shared memory that held pixels and chunks before.
  EMO_KERNEL float* sums_at(int r) const {
    return floats(0) + r * (rounded(args_.shape.O, 16) + 8);
  }

  EMO_KERNEL void publish() {
    const int warp = this->warp();
    for_lanes([&](int lane) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = warp % args_.plan.warps_m * 32 + i / 2 * 16 + row_of(lane, i % 2 * 2);
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
    const Tile tile = this->tile();
    const int values = s.O / kChannels<Value>;
    for (int i = thread_; i < args_.plan.tile_h * args_.plan.tile_w * values; i += kBlockThreads) {
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

  const Args& args_;
  const int thread_;
  char* const shared_;
  Copies copies_;
  PerLane<Accumulator> sums_[2][kPairs][2];
};

}  // namespace emo_kernels::cuda
