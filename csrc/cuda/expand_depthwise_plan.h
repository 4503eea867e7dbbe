// Sizes of a launch of expand_depthwise.h: which block has which channels and rows, and where what
// lies in its shared memory.
//
// A unit of work is a segment of rows of y by a span of its columns, of one image; a block has a
// chunk of the expanded channels and takes `rounds` units one after the other. It goes down a unit
// `step` rows of y at a time.
#pragma once

#include <cmath>

#include "cuda/depthwise_tiles.h"
#include "cuda/mma.h"
#include "cuda/plan_cache.h"

namespace emo_kernels::cuda {

constexpr int kExpandThreads = 256, kExpandWarps = kExpandThreads / kLanes;
constexpr int kExpandStrip = 7;          // columns of y of a thread: divides EMO's maps at 224
constexpr int kTileP = 32, kTileM = 32;  // pixels and channels of a warp's product
constexpr int kMostShared = 99 * 1024;   // of a block, on sm_86 and sm_89
constexpr int kExpandBlocks = 264;       // at most about: those that an H200 has at work at once

struct ExpandPlan {
  int chunk = 0, blocks_c = 1;              // channels of a block, blocks for all of them
  int groups = 1, slots = 1;                // pairs of channels; threads of each pair
  int span = 1, spans = 1;                  // columns of y of a unit
  int segment = 1, segments = 1, step = 1;  // rows of y of a unit, and at a time
  int ring = 0, columns = 0, room = 0;      // rows and columns of e; pixels of x
  int tile_stride = 0, ring_stride = 0;     // elements from one pixel to the next
  int tile_at = 0, ring_at = 0, filters_at = 0, bias_at = 0, norm_at = 0, bytes = 0;
  int64_t units = 0, rounds = 0, programs = 0;
};

// The convolution's sizes, and those of the expansion in front: what a plan is made for.
struct ExpandTask {
  Geometry g;  // C: expanded channels
  int C = 0;   // of x
  int itemsize = 0;
};

// Places the parts of shared memory one behind the other.
inline void place_parts(ExpandPlan& plan, const ExpandTask& task) {
  const Geometry& g = task.g;
  const auto aligned = [](int64_t bytes) { return static_cast<int>((bytes + 15) / 16 * 16); };
  const int rows_m = static_cast<int>(ceil_div(plan.chunk, 16)) * 16;
  plan.tile_stride = padded_row(task.C);
  plan.ring_stride = padded_row(plan.chunk);
  plan.tile_at = aligned(int64_t{rows_m} * plan.tile_stride * task.itemsize);
  plan.ring_at = plan.tile_at + aligned(int64_t{plan.room} * plan.tile_stride * task.itemsize);
  const int64_t pixels = int64_t{plan.ring} * plan.columns;
  plan.filters_at = plan.ring_at + aligned(pixels * plan.ring_stride * task.itemsize);
  plan.bias_at = plan.filters_at + aligned(int64_t{g.K} * g.K * plan.chunk * 4);
  plan.norm_at = plan.bias_at + aligned(int64_t{rows_m} * 4);
  const int parts = plan.norm_at + aligned(int64_t{2} * task.C * 4);
  plan.bytes = most(parts, 4 * plan.slots * plan.groups * static_cast<int>(sizeof(double)));
}

// Instructions that a warp issues for an image, about: products, taps, loads and barriers.
inline double cost_of(const ExpandPlan& plan, const ExpandTask& task) {
  const Geometry& g = task.g;
  const double width = least(plan.columns, g.W), lead = g.K - g.S;
  const double steps = static_cast<double>(ceil_div(plan.segment, plan.step));
  const double pixels = width * (plan.step * g.S + lead / steps);
  const double products = std::ceil(pixels / kTileP) * std::ceil(plan.chunk / double{kTileM});
  const double filled = std::ceil(pixels / 16) * std::ceil(plan.chunk / 16.0) / (4 * products);
  const double product = filled * (std::ceil(task.C / 16.0) * 32 + 500);
  const double strips = static_cast<double>(ceil_div(plan.span, kExpandStrip)) * plan.step;
  const int taps = 2 * kExpandStrip * g.K, reads = 3 * ((kExpandStrip - 1) * g.S + g.K) + 2 * g.K;
  const double strip = g.K * (taps + reads) + 60.0;
  const double loads = pixels * task.C * task.itemsize / 16 / kExpandThreads * 15;
  const double step = std::ceil(products / kExpandWarps) * product +
                      std::ceil(strips / plan.slots) * strip + loads + 100;
  return step * steps * plan.segments * plan.spans * plan.blocks_c;
}

// A plan with so many chunks of channels, spans of columns and rows a step.
inline ExpandPlan plan_with(const ExpandTask& task, int chunks, int spans, int step) {
  const Geometry& g = task.g;
  ExpandPlan plan;
  plan.chunk = static_cast<int>(ceil_div(ceil_div(g.C, chunks), 2)) * 2;
  plan.blocks_c = static_cast<int>(ceil_div(g.C, plan.chunk));
  plan.groups = plan.chunk / 2;
  plan.slots = kExpandThreads / plan.groups;
  const int64_t strips = ceil_div(g.WO, kExpandStrip);
  plan.span = static_cast<int>(ceil_div(strips, spans)) * kExpandStrip;
  plan.spans = static_cast<int>(ceil_div(g.WO, plan.span));
  // Few images: shorter segments, though each begins with K - S rows of e that it shares.
  const int64_t columns = g.N * plan.spans * plan.blocks_c;
  const int64_t wanted = ceil_div(kExpandBlocks, columns), most_segments = ceil_div(g.HO, 7);
  plan.segment = static_cast<int>(ceil_div(g.HO, wanted < most_segments ? wanted : most_segments));
  plan.segments = static_cast<int>(ceil_div(g.HO, plan.segment));
  plan.step = least(step, plan.segment);
  plan.ring = (plan.step - 1) * g.S + g.K;
  plan.columns = (plan.span - 1) * g.S + g.K;
  plan.room =
      static_cast<int>(ceil_div(int64_t{least(plan.ring, g.H)} * least(plan.columns, g.W), 16)) *
      16;
  plan.units = g.N * plan.spans * plan.segments;
  plan.rounds = ceil_div(plan.units, most(kExpandBlocks / plan.blocks_c, 1));
  plan.programs = ceil_div(plan.units, plan.rounds);
  place_parts(plan, task);
  return plan;
}

// The cheapest plan that fits into shared memory; its bytes are 0 where none does.
inline ExpandPlan cheapest_plan(const ExpandTask& task) {
  const int M = task.g.C;
  ExpandPlan best;
  double least_cost = 0.0;
  const int fewest = static_cast<int>(ceil_div(M, 128)),
            most_chunks = static_cast<int>(ceil_div(M, 16));
  for (int chunks = fewest; chunks <= least(most_chunks, fewest * 4 + 1); ++chunks) {
    for (int spans = 1; spans <= 16; spans *= 2) {
      for (int step = 1; step <= 14; ++step) {
        const ExpandPlan plan = plan_with(task, chunks, spans, step);
        if (plan.step < step || plan.bytes > kMostShared) break;
        const double cost = cost_of(plan, task);
        if (best.bytes == 0 || cost < least_cost) best = plan, least_cost = cost;
      }
      if (spans * kExpandStrip >= task.g.WO) break;
    }
  }
  return best;
}

inline ExpandPlan make_plan(const ExpandTask& task) {
  const Geometry& g = task.g;
  const std::array<int64_t, 11> key{g.N, g.C, g.H, g.W,    g.HO,         g.WO,
                                    g.K, g.S, g.P, task.C, task.itemsize};
  return remembered(key, [&] { return cheapest_plan(task); });
}

// ---- where a unit lies --------------------------------------------------------------------------

// One unit, the same for all threads of its block. Row and column 0 of e lie at (row0, col0) of the
// map, perhaps outside.
struct Piece {
  int64_t n = 0;
  int first_row = 0, rows = 0, first_col = 0, cols = 0;  // of y
  int row0 = 0, col0 = 0;
  int low = 0, width = 0;  // columns of the map that its e has
  uint32_t inverse = 0;    // 2^32 / width, rounded up

  // pixel / width, exact below 2^16.
  EMO_KERNEL int row_of_pixel(int pixel) const {
    const uint64_t product = static_cast<uint64_t>(static_cast<uint32_t>(pixel)) * inverse;
    return width == 1 ? pixel : static_cast<int>(product >> 32);
  }
};

EMO_KERNEL Piece piece_of(const ExpandPlan& plan, const Geometry& g, int64_t unit) {
  Piece piece;
  piece.first_col = static_cast<int>(unit % plan.spans) * plan.span;
  unit /= plan.spans;
  piece.first_row = static_cast<int>(unit % plan.segments) * plan.segment;
  piece.n = unit / plan.segments;
  piece.rows = least(plan.segment, g.HO - piece.first_row);
  piece.cols = least(plan.span, g.WO - piece.first_col);
  piece.row0 = g.S * piece.first_row - g.P;
  piece.col0 = g.S * piece.first_col - g.P;
  piece.low = most(piece.col0, 0);
  piece.width = most(least(piece.col0 + (piece.cols - 1) * g.S + g.K, g.W) - piece.low, 0);
  piece.inverse = piece.width > 1 ? 0xffffffffu / static_cast<uint32_t>(piece.width) + 1 : 0;
  return piece;
}

// Rows of e, counted from the unit's first, that lie in the map and that step t needs first.
struct NewRows {
  int first, count;
};

EMO_KERNEL NewRows new_rows(const ExpandPlan& plan, const Geometry& g, const Piece& piece, int t) {
  const int done = t == 0 ? 0 : g.S * (plan.step * t - 1) + g.K;
  const int needed = g.S * (least(plan.step * (t + 1), piece.rows) - 1) + g.K;
  const int first = most(done, -piece.row0), end = least(needed, g.H - piece.row0);
  return {first, most(end - first, 0)};
}

}  // namespace emo_kernels::cuda
