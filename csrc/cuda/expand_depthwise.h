// Computes: y = the depthwise convolution of e = act(W n + b), n = x, its layer norm over the
//     channels of a pixel, or scale[c] x + shift[c] (SPEC, steps 2 to 4 without attention), zeros
//     outside the map of e; and where asked the batch-norm sums of y as stored: of y - pivot and of
//     its square, over the pixels.
// Tiling: a block has a chunk of the expanded channels and goes down a segment of rows, `step` rows
//     of y at a time: the new rows of x come into shared memory by asynchronous copies while the
//     step before is convolved; warps multiply tiles of 32 pixels by 32 channels on tensor cores
//     and leave e, activated, in a ring of (step - 1) S + K rows; then each thread convolves strips
//     of 7 columns of two channels. e is never written to memory.
// Traffic: x once for each chunk, from the caches but for the first; y once. 2 C + 2 K K operations
//     an element of e.
// Numerics: n and e rounded to the type of the map, products as mma.h says, the rest in fp32. The
//     layer norm's variance from deviations, a second pass. Sums as the depthwise kernel's. The
//     same bits on every run.
// Limits: K 3 or 5, stride 1 or 2, no dilation, an even M, one group. x in accesses of 16 bytes
//     where its channels and address allow, else element by element.
#pragma once

#include "cuda/activation.h"
#include "cuda/channel_sums.h"
#include "cuda/depthwise_rows.h"
#include "cuda/expand_depthwise_plan.h"

namespace emo_kernels::cuda {

template <class T>
struct ExpandDepthwiseArgs {
  Geometry g;  // of the convolution: C is M
  ExpandPlan plan;
  int C;
  Activation act;
  Norm norm;
  float eps;                      // of the layer norm
  bool in_vectors;                // x in accesses of 16 bytes
  const T* x;                     // (N, H, W, C)
  T* y;                           // (N, HO, WO, M)
  Vector norm_weight, norm_bias;  // (C,) or absent
  Vector weight, bias;            // (M, C), (M,) or absent
  Vector filters;                 // (M, K, K)
  Vector pivot;                   // (M,) or absent
  double* partials;               // (programs, 2, M), or null: no statistics
};

template <class T, int K, int S>
class ExpandDepthwise {
 public:
  using Args = ExpandDepthwiseArgs<T>;

  EMO_KERNEL ExpandDepthwise(const Args& args, const Place& place, void* shared)
      : args_(args),
        shared_(static_cast<unsigned char*>(shared)),
        thread_(place.group),
        place_{place.block, place.group % args.plan.groups, place.group / args.plan.groups, 0},
        first_m_(static_cast<int>(place.block % args.plan.blocks_c) * args.plan.chunk) {}

  static int64_t shared_bytes(const Args& args) { return args.plan.bytes; }

  // The steps of a block: `each` runs a step on all its threads, and ends with a barrier; each.then
  // without one, and so each.warps, on its warps.
  template <class Each>
  EMO_KERNEL static void run(const Args& args, int64_t block, const Each& each) {
    const ExpandPlan& plan = args.plan;
    const int64_t first = block / plan.blocks_c * plan.rounds;
    const int64_t end = first + plan.rounds < plan.units ? first + plan.rounds : plan.units;
    each([](ExpandDepthwise& self) { self.prepare(); });
    Piece piece = piece_of(plan, args.g, first);
    each.then([&](ExpandDepthwise& self) { self.fetch(piece, new_rows(plan, args.g, piece, 0)); });
    for (int64_t unit = first; unit < end; ++unit) {
      const bool other_columns = unit == first || plan.spans > 1;
      const Piece next = unit + 1 < end ? piece_of(plan, args.g, unit + 1) : piece;
      for (int t = 0; t * plan.step < piece.rows; ++t) {
        const NewRows rows = new_rows(plan, args.g, piece, t);
        each([&](ExpandDepthwise& self) { self.land(piece, rows); });
        if (args.norm == Norm::kLayer) {
          each.warps([&](ExpandDepthwise& self) { self.normalize(rows.count * piece.width); });
          each.barrier();
        }
        each.then([&](ExpandDepthwise& self) {
          if (t == 0 && other_columns) self.clear_outside(piece);
        });
        each.warps([&](ExpandDepthwise& self) { self.expand(piece, rows); });
        each.barrier();
        each.then([&](ExpandDepthwise& self) {
          if ((t + 1) * plan.step < piece.rows) {
            self.fetch(piece, new_rows(plan, args.g, piece, t + 1));
          } else if (unit + 1 < end) {
            self.fetch(next, new_rows(plan, args.g, next, 0));
          }
          self.convolve(piece, t);
        });
      }
      piece = next;
    }
    if (args.partials == nullptr) return;
    each.barrier();
    each([](ExpandDepthwise& self) { self.publish(); });
    each.then([](ExpandDepthwise& self) { self.collect(); });
  }

 private:
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes
  static constexpr int kColumns = (kExpandStrip - 1) * S + K;       // of e, that a strip meets
  struct alignas(16) Vector16 {
    uint32_t words[4];
  };

  // ---- shared memory

  EMO_KERNEL T* weight() const { return reinterpret_cast<T*>(shared_); }
  EMO_KERNEL T* tile() const { return reinterpret_cast<T*>(shared_ + args_.plan.tile_at); }
  EMO_KERNEL float* floats(int at) const { return reinterpret_cast<float*>(shared_ + at); }

  // Row `row` of e, counted from the unit's first, in the ring.
  EMO_KERNEL T* ring_row(int slot) const {
    const ExpandPlan& plan = args_.plan;
    slot = slot < plan.ring ? slot : slot - plan.ring;
    return reinterpret_cast<T*>(shared_ + plan.ring_at) + slot * plan.columns * plan.ring_stride;
  }

  // The first channel of a thread of the convolution, or -1: none.
  EMO_KERNEL int first_channel() const {
    const int m = first_m_ + 2 * place_.group;
    return place_.slot < args_.plan.slots && m < args_.g.C ? m : -1;
  }

  // ---- once for a block

  EMO_KERNEL void prepare() {
    const ExpandPlan& plan = args_.plan;
    const int rows = (plan.chunk + 15) / 16 * 16, live = least(plan.chunk, args_.g.C - first_m_);
    const int width = plan.tile_stride;
    for (int i = thread_; i < rows * width; i += kExpandThreads) {
      const int m = i / width, c = i % width;
      const bool inside = m < live && c < args_.C;
      write(weight() + i, inside ? rounded(int64_t{first_m_ + m} * args_.C + c) : T{});
    }
    for (int i = thread_; i < plan.room * width; i += kExpandThreads) write(tile() + i, T{});
    for (int i = thread_; i < rows; i += kExpandThreads) {
      const bool biased = args_.bias.data != nullptr && i < live;
      write(floats(plan.bias_at) + i, biased ? elements<float>(args_.bias, first_m_ + i) : 0.0f);
    }
    for (int i = thread_; i < K * K * plan.chunk; i += kExpandThreads) {
      const int m = i % plan.chunk, tap = i / plan.chunk;
      const int64_t at = int64_t{first_m_ + m} * (K * K) + tap;
      write(floats(plan.filters_at) + i, m < live ? elements<float>(args_.filters, at) : 0.0f);
    }
    if (args_.norm == Norm::kNone) return;
    for (int c = thread_; c < args_.C; c += kExpandThreads) {
      const bool scaled = args_.norm_weight.data != nullptr,
                 shifted = args_.norm_bias.data != nullptr;
      write(floats(plan.norm_at) + c, scaled ? elements<float>(args_.norm_weight, c) : 1.0f);
      write(floats(plan.norm_at) + args_.C + c,
            shifted ? elements<float>(args_.norm_bias, c) : 0.0f);
    }
  }

  EMO_KERNEL T rounded(int64_t index) const {
    if (args_.weight.dtype == DType::kFloat32) {  // without the detour over fp64
      return narrow<T>(read(static_cast<const float*>(args_.weight.data) + index));
    }
    return narrow<T>(static_cast<float>(element(args_.weight, index)));
  }

  // ---- rows of x

  // visit(offset in x, place in the tile, channel) for the accesses of kWidth elements of a thread.
  template <int kWidth, class Visit>
  EMO_KERNEL void for_accesses(const Piece& piece, const NewRows& rows, const Visit& visit) const {
    const Geometry& g = args_.g;
    const int parts = args_.C / kWidth, stride = args_.plan.tile_stride;
    const int more_pixels = kExpandThreads / parts, more_parts = kExpandThreads % parts;
    const bool whole = piece.width == g.W;  // then rows follow one another without a gap
    const int runs = whole ? 1 : rows.count, length = whole ? rows.count * g.W : piece.width;
    for (int run = 0; run < runs; ++run) {
      const int64_t row = piece.n * g.H + piece.row0 + rows.first + run;
      const int64_t first = (row * g.W + piece.low) * args_.C;
      int pixel = thread_ / parts, part = thread_ % parts;
      while (pixel < length) {
        const int c = part * kWidth;
        visit(first + int64_t{pixel} * args_.C + c, tile() + (run * length + pixel) * stride + c,
              c);
        pixel += more_pixels;
        part += more_parts;
        if (part >= parts) part -= parts, ++pixel;
      }
    }
  }

  EMO_KERNEL void fetch(const Piece& piece, const NewRows& rows) {
    if (args_.in_vectors) {
      for_accesses<kVector>(piece, rows, [&](int64_t offset, T* to, int) {
        copies_.start(reinterpret_cast<Vector16*>(to),
                      reinterpret_cast<const Vector16*>(args_.x + offset), true);
      });
      copies_.close_group();
    } else {
      for_accesses<1>(piece, rows, [&](int64_t offset, T* to, int c) {
        const T x = read(args_.x + offset);
        write(to, args_.norm == Norm::kAffine ? narrow<T>(normed(widen(x), c)) : x);
      });
    }
  }

  // Waits for what this thread has fetched, and scales and shifts it.
  EMO_KERNEL void land(const Piece& piece, const NewRows& rows) {
    if (!args_.in_vectors) return;
    copies_.template wait<0>();
    if (args_.norm != Norm::kAffine) return;
    for_accesses<kVector>(piece, rows, [&](int64_t, T* at, int c) {
      auto* const place = reinterpret_cast<Vector16*>(at);
      Vector16 values = read(place);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        values.words[i] = normed_word(values.words[i], c + i * kVector / 4);
      write(place, values);
    });
  }

  // The layer norm of the tile's pixels: four lanes share one, each every fourth pair of channels.
  EMO_KERNEL void normalize(int pixels) const {
    constexpr int kPixels = kLanes / 4;
    for (int first = thread_ / kLanes * kPixels; first < pixels; first += kExpandWarps * kPixels) {
      PerLane<float> mean, variance;
      for_lanes([&](int lane) {
        for_pairs(first + lane / 4, pixels, lane, [&](Pair<T>* at, int c) {
          const Float2 x = widen(read(at));
          mean[lane] = mean[lane] + (x.x + (c + 1 < args_.C ? x.y : 0.0f));
        });
      });
      sum_of_four(mean);
      for_lanes([&](int lane) {
        mean[lane] = mean[lane] / static_cast<float>(args_.C);
        for_pairs(first + lane / 4, pixels, lane, [&](Pair<T>* at, int c) {
          const Float2 d = widen(read(at)) - Float2{mean[lane], mean[lane]};
          variance[lane] = fused(d.x, d.x, variance[lane]);
          if (c + 1 < args_.C) variance[lane] = fused(d.y, d.y, variance[lane]);
        });
      });
      sum_of_four(variance);
      for_lanes([&](int lane) {
        const float scale = 1.0f / sqrtf(variance[lane] / static_cast<float>(args_.C) + args_.eps);
        for_pairs(first + lane / 4, pixels, lane, [&](Pair<T>* at, int c) {
          const Float2 d = widen(read(at)) - Float2{mean[lane], mean[lane]};
          const float right = c + 1 < args_.C ? normed(d.y * scale, c + 1) : 0.0f;
          write(at, pack<T>(Float2{normed(d.x * scale, c), right}));
        });
      });
    }
  }

  // visit(place in the tile, channel) for a lane's pairs of channels of a pixel.
  template <class Visit>
  EMO_KERNEL void for_pairs(int pixel, int pixels, int lane, const Visit& visit) const {
    if (pixel >= pixels) return;
    auto* const row = reinterpret_cast<Pair<T>*>(tile() + pixel * args_.plan.tile_stride);
    for (int pair = lane % 4; 2 * pair < args_.C; pair += 4) visit(row + pair, 2 * pair);
  }

  EMO_KERNEL float normed(float x, int c) const {
    const float* const norm = floats(args_.plan.norm_at);
    return fused(read(norm + c), x, read(norm + args_.C + c));
  }

  // The one or two elements of four bytes.
  EMO_KERNEL uint32_t normed_word(uint32_t word, int c) const {
    if constexpr (sizeof(T) == 4) {
      return bits_of_float(normed(float_of_bits(word), c));
    } else {
      const Float2 x = widen(Pair<T>{word});
      return pack<T>(Float2{normed(x.x, c), normed(x.y, c + 1)}).bits;
    }
  }

  // ---- e

  // Zeros in the ring's columns that lie outside the map.
  EMO_KERNEL void clear_outside(const Piece& piece) const {
    const ExpandPlan& plan = args_.plan;
    const int left = piece.low - piece.col0, outside = plan.columns - piece.width;
    const int words = outside * plan.groups;
    for (int i = thread_; i < plan.ring * words; i += kExpandThreads) {
      const int column = i % words / plan.groups, pair = i % words % plan.groups;
      const int at = column < left ? column : column + piece.width;
      write_packed<Float2>(ring_row(i / words) + at * plan.ring_stride + 2 * pair,
                           pack<T>(Float2{0.0f, 0.0f}));
    }
  }

  EMO_KERNEL void expand(const Piece& piece, const NewRows& rows) const {
    const int pixels = rows.count * piece.width, stride = args_.plan.tile_stride;
    const int tiles_m = (args_.plan.chunk + kTileM - 1) / kTileM;
    const int tiles = (pixels + kTileP - 1) / kTileP * tiles_m;
    for (int index = thread_ / kLanes; index < tiles; index += kExpandWarps) {
      const int pixel = index / tiles_m * kTileP, m = index % tiles_m * kTileM;
      const T *const x = tile() + pixel * stride, *const w = weight() + m * stride;
      PerLane<Accumulator> sums[2][4];
      multiply(sums, x, w, pixels - pixel > 16, args_.plan.chunk - m > 16);
      switch (args_.act) {  // known in each, so that nothing is asked element by element
        case Activation::kSilu:
          keep<Activation::kSilu>(sums, piece, rows, pixel, m);
          break;
        case Activation::kGelu:
          keep<Activation::kGelu>(sums, piece, rows, pixel, m);
          break;
        case Activation::kRelu:
          keep<Activation::kRelu>(sums, piece, rows, pixel, m);
          break;
        default:
          keep<Activation::kNone>(sums, piece, rows, pixel, m);
      }
    }
  }

  // sums += x w^T, 16 or 32 pixels by 16 or 32 channels.
  EMO_KERNEL void multiply(PerLane<Accumulator> (&sums)[2][4], const T* x, const T* w,
                           bool more_pixels, bool more_channels) const {
    const int stride = args_.plan.tile_stride;
    for (int c = 0; c < args_.C; c += 16) {
      PerLane<FragmentA<T>> a[2];
      PerLane<FragmentB<T>> b[2];
      load_a(a[0], x + c, stride);
      if (more_pixels) load_a(a[1], x + 16 * stride + c, stride);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (j == 1 && !more_channels) break;
        load_b(b, w + 16 * j * stride + c, stride);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_add(sums[0][2 * j + i], a[0], b[i]);
          if (more_pixels) multiply_add(sums[1][2 * j + i], a[1], b[i]);
        }
      }
    }
  }

  // Bias and activation, and e into the ring.
  template <Activation kAct>
  EMO_KERNEL void keep(PerLane<Accumulator> (&sums)[2][4], const Piece& piece, const NewRows& rows,
                       int first_pixel, int m) const {
    const ExpandPlan& plan = args_.plan;
    const int pixels = rows.count * piece.width, slot = rows.first % plan.ring;
    const float* const bias = floats(plan.bias_at);
    for_lanes([&](int lane) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rows lane / 4 + 8 i of the tile
        const int pixel = first_pixel + row_of(lane, 0) + 8 * i;
        if (pixel >= pixels) break;
        const int row = piece.row_of_pixel(pixel);
        const int column = pixel - row * piece.width + piece.low - piece.col0;
        T* const e = ring_row(slot + row) + column * plan.ring_stride;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = m + 8 * j + column_of(lane, 0);
          if (at >= plan.chunk) break;
          const float* const a = sums[i / 2][j][lane].value + i % 2 * 2;
          const Float2 both{activate<T>(kAct, a[0] + read(bias + at)),
                            activate<T>(kAct, a[1] + read(bias + at + 1))};
          write_packed<Float2>(e + at, pack<T>(both));
        }
      }
    });
  }

  // ---- y

  EMO_KERNEL void convolve(const Piece& piece, int t) {
    const ExpandPlan& plan = args_.plan;
    if (first_channel() < 0) return;
    const int strips = (piece.cols + kExpandStrip - 1) / kExpandStrip;
    const int rows = least(plan.step, piece.rows - t * plan.step);
    const int slot = S * plan.step * t % plan.ring;
    for (int i = place_.slot; i < rows * strips; i += plan.slots) {
      const int row = i / strips, col = i % strips * kExpandStrip;
      Float2 values[kExpandStrip];
#pragma unroll
      for (int j = 0; j < kExpandStrip; ++j) values[j] = {0.0f, 0.0f};
#pragma unroll
      for (int a = 0; a < K; ++a) {
        if (!inside(piece.row0 + S * (plan.step * t + row) + a, args_.g.H)) continue;
        add_row(values, a, ring_row(slot + S * row + a) + S * col * plan.ring_stride);
      }
      store(values, piece, piece.first_row + plan.step * t + row, col);
    }
  }

  // What one row of e adds to a strip of y, through row a of the filters.
  EMO_KERNEL void add_row(Float2 (&values)[kExpandStrip], int a, const T* e) const {
    const ExpandPlan& plan = args_.plan;
    const float* const filters = floats(plan.filters_at) + a * K * plan.chunk + 2 * place_.group;
    Float2 taps[K];
#pragma unroll
    for (int b = 0; b < K; ++b) taps[b] = widen(read_packed<Float2>(filters + b * plan.chunk));
    e += 2 * place_.group;
#pragma unroll
    for (int p = 0; p < kColumns; ++p) {
      const Float2 value = widen(read_packed<Float2>(e + p * plan.ring_stride));
#pragma unroll
      for (int j = 0; j < kExpandStrip; ++j) {
        const int b = p - S * j;
        if (b >= 0 && b < K) values[j] = fused(taps[b], value, values[j]);
      }
    }
  }

  EMO_KERNEL void store(const Float2 (&values)[kExpandStrip], const Piece& piece, int row,
                        int col) {
    const Geometry& g = args_.g;
    const int64_t pixel = (piece.n * g.HO + row) * g.WO + piece.first_col + col;
    T* const y = args_.y + pixel * g.C + first_channel();
#pragma unroll
    for (int j = 0; j < kExpandStrip; ++j) {
      if (col + j >= piece.cols) break;
      const Pair<T> packed = pack<T>(values[j]);
      write_packed<Float2>(y + int64_t{j} * g.C, packed);
      if (args_.partials != nullptr) statistics_.add(widen(packed));
    }
  }

  EMO_KERNEL void publish() {
    if (first_channel() < 0) return;
    statistics_.publish(args_.plan, place_, args_.pivot, first_channel(),
                        reinterpret_cast<double*>(shared_));
  }

  EMO_KERNEL void collect() const {
    Statistics<Float2>::collect(args_.plan, place_, first_channel(), args_.g.C,
                                reinterpret_cast<double*>(shared_), args_.partials);
  }

  const Args& args_;
  unsigned char* const shared_;
  const int thread_;
  const Place place_;  // pair of channels and slot of the convolution
  const int first_m_;
  Copies copies_;
  Statistics<Float2> statistics_;
};

}  // namespace emo_kernels::cuda
