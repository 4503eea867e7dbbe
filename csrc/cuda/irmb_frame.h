// What a block of threads of the whole-block kernels stands on: its parts of shared memory, its
// tile, and the copies that bring pixels, weights and filters there.
#pragma once

#include "cuda/irmb_tiles.h"
#include "cuda/norm_rows.h"

namespace emo_kernels::cuda {

// K = 0: any filter, stride and dilation, as the shape says. kTakesAll: there may be a gate, and no
// expansion.
template <class T, int K, int S, int kWarps, bool kTakesAll>
class BlockFrame {
 public:
  using Args = BlockArgs<T>;

  EMO_KERNEL BlockFrame(const Args& args, int thread, void* shared)
      : args_(args), thread_(thread), shared_(static_cast<char*>(shared)) {}

  EMO_KERNEL NormRows<T> rows() const {
    const BlockPlan& plan = args_.plan;
    return {part(plan.x), floats(plan.norm), floats(plan.e), plan.x_stride, args_.shape.C,
            plan.pixels,  tile().pixels(),   thread_,        kTeam};
  }

  // Where the attention leaves the pixels of a whole image: zeros behind its channels and its rows.
  EMO_KERNEL void begin_image(const BlockTile& tile) {
    note_tile(tile);
    const BlockPlan& plan = args_.plan;
    const int C = args_.shape.C, wide = rounded(C, 16), pixels = tile.rows * tile.columns;
    const auto clear = [&](int row, int column) {
      write(part(plan.x) + row * plan.x_stride + column, narrow<T>(0.0f));
    };
    for (int i = thread_; i < pixels * (wide - C); i += kTeam) {
      clear(i / (wide - C), C + i % (wide - C));
    }
    for (int i = thread_; i < (plan.pixels - pixels) * wide; i += kTeam) {
      clear(pixels + i / wide, i % wide);
    }
  }

 protected:
  static constexpr int kTeam = kWarps * kLanes;  // threads of a block
  static constexpr int kPairsOfChunk = kChunk / 2;

  EMO_KERNEL T* part(int at) const { return reinterpret_cast<T*>(shared_ + at); }
  EMO_KERNEL float* floats(int at) const { return reinterpret_cast<float*>(shared_ + at); }
  EMO_KERNEL int filter() const { return K == 0 ? args_.shape.K : K; }
  EMO_KERNEL int step() const { return K == 0 ? args_.shape.S : S; }
  EMO_KERNEL int dilation() const { return K == 0 ? args_.shape.D : 1; }
  EMO_KERNEL int warp() const { return own_thread(thread_) / kLanes; }

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
  EMO_KERNEL void note_tile(const BlockTile& tile) const {
    if (thread_ != 0) return;
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

  // Row `row` of a chunk's filters, biases, shifts and gates.
  EMO_KERNEL float* taps(int chunk, int row) const {
    return floats(args_.plan.taps) + (chunk % 2 * taps_rows(filter()) + row) * kChunk;
  }
  EMO_KERNEL int bias_row() const { return filter() * filter(); }
  EMO_KERNEL int shift_row() const { return bias_row() + 1; }
  EMO_KERNEL int gate_row() const { return bias_row() + 2; }

  // ---- pixels -----------------------------------------------------------------------------------

  EMO_KERNEL void load_pixels(const BlockTile& tile) {
    const BlockShape& s = args_.shape;
    note_tile(tile);
    Matrix image = args_.pixels;
    image.values.data =
        static_cast<const T*>(image.values.data) + int64_t{tile.n} * image.rows * s.C;
    const int pixels = tile.rows * tile.columns;
    const TileOf whole{0, rounded(pixels, 16), rounded(s.C, 16), thread_, kTeam};
    start_tile(copies_, part(args_.plan.x), args_.plan.x_stride, image, whole, [&](int r) {
      if (r >= pixels) return int64_t{-1};
      const int row = tile.first_row + r / tile.columns;
      return int64_t{row} * s.W + tile.first_column + r % tile.columns;
    });
    copies_.close_group();
    const BlockPlan& plan = args_.plan;
    const NormRows<T> front{part(plan.x), floats(plan.norm), nullptr, 0, s.C, 0, 0, thread_, kTeam};
    front.load_affine(args_.norm, args_.front);
    copies_.template wait<0>();
  }

  // ---- weights ----------------------------------------------------------------------------------

  // Begins to bring Wv's rows of a chunk, and its filters times their norm's scales.
  EMO_KERNEL void fetch_expansion(int chunk, int end_chunk) {
    if (chunk < end_chunk) {
      if (!kTakesAll || args_.v.values.data != nullptr) {
        const TileOf rows{0, kChunk, rounded(args_.shape.C, 16), own_thread(thread_), kTeam};
        start_tile(copies_, part(args_.plan.v), args_.plan.x_stride, args_.v, rows, [&](int r) {
          const int row = chunk * kChunk + r;
          return int64_t{row < args_.v.rows ? row : -1};
        });
      }
      const int filters = filter() * filter();
#pragma unroll 1
      for (int i = own_thread(thread_); i < taps_rows(filter()) * kChunk; i += kTeam) {
        const int row = i / kChunk, m = chunk * kChunk + i % kChunk;
        write(taps(chunk, row) + i % kChunk, m < args_.shape.M ? tap(row, m, filters) : 0.0f);
      }
    }
    copies_.close_group();
  }

  EMO_KERNEL float tap(int row, int m, int filters) const {
    if (row == filters) return value_at(args_.bias, m);
    if (kTakesAll && row == filters + 2) return gate_of(m);
    const Float2 affine = affine_of(args_.bn, m);
    if (row > filters) return affine.y;
    return value_at(args_.stencil, int64_t{m} * filters + row) * affine.x;
  }

  EMO_KERNEL float gate_of(int m) const {
    if (args_.gate == nullptr) return 1.0f;
    return read(args_.gate + int64_t{read(tile_at(4))} * args_.shape.M + m);
  }

  // Begins to bring Wp's columns of a chunk.
  EMO_KERNEL void fetch_projection(int chunk) {
    const TileOf columns{chunk * kChunk, rounded(args_.shape.O, 16), kChunk, own_thread(thread_),
                         kTeam};
    start_tile(copies_, part(args_.plan.proj), args_.plan.e_stride, args_.proj, columns,
               [&](int r) { return int64_t{r < args_.proj.rows ? r : -1}; });
    copies_.close_group();
  }

  // Zeros where no chunk writes: outside the map, and behind the tile's pixels.
  EMO_KERNEL void clear_borders() {
    const BlockPlan& plan = args_.plan;
    const Tile tile = this->tile();
    for (int i = thread_; i < plan.span_h * plan.span_w * kPairsOfChunk; i += kTeam) {
      const int at = i / kPairsOfChunk, row = at / plan.span_w, column = at % plan.span_w;
      const bool is_map =
          inside(row - tile.row0, tile.rows) && inside(column - tile.column0, tile.columns);
      if (!is_map) clear_pair(part(plan.e) + at * plan.e_stride + i % kPairsOfChunk * 2);
    }
    const int first = plan.tile_h * plan.tile_w, end = 32 * plan.warps_m;
    for (int i = thread_; i < (end - first) * kPairsOfChunk; i += kTeam) {
      const int row = first + i / kPairsOfChunk;
      clear_pair(part(plan.t) + row * plan.e_stride + i % kPairsOfChunk * 2);
    }
  }

  EMO_KERNEL static void clear_pair(T* at) {
    write_packed<Float2>(at, pack<T>(Float2{0.0f, 0.0f}));
  }

  const Args& args_;
  const int thread_;
  char* const shared_;
  Copies copies_;
};

}  // namespace emo_kernels::cuda
