// Sizes of a launch, and which thread of which block has which pixels.
//
// A map with dilation D is D x D interleaved maps without one, its lattices: pixel (i, j) is pixel
// (i / D, j / D) of lattice (i % D, j % D). A plane is one lattice of one image. A block has
// `groups` pairs of channels by `slots` strips of columns: `span` strips side by side in each of
// `planes` planes. It walks down a segment of their rows, one such unit of work after the other.
#pragma once

#include "cuda/element.h"

namespace emo_kernels::cuda {

constexpr int kThreads = 256;         // of a block at most
constexpr int kMostGroups = 64;       // pairs of channels of a block: 256 bytes in 16 bits
constexpr int kFewThreads = 1 << 17;  // threads below which segments get shorter
constexpr int kBlocks = 2112;         // about as many: 16 for each multiprocessor of an H200
constexpr int kPartialBlocks = 1056;  // where each leaves sums for every tap behind

struct Geometry {
  int64_t N = 0;
  int C = 0, H = 0, W = 0, HO = 0, WO = 0, K = 0, S = 1, P = 0, D = 1;
};

struct Plan {
  int vectors = 0, groups = 1, blocks_c = 1;  // of channels: in all, of a block, blocks
  int slots = 1, span = 1, planes = 1;        // of a block
  int strip = 1;                              // columns of a slot
  int segment = 1;                            // rows of a unit
  int lattices = 1, rows = 0, cols = 0;       // along one side; of a plane
  int spans = 0, segments = 0;                // of a plane
  int64_t all_planes = 0, units = 0, rounds = 0, programs = 0;

  EMO_ANYWHERE int64_t blocks() const { return programs * blocks_c; }
};

struct Grid {
  int64_t blocks;
  int x, y, z;  // threads of a block
};

// The place of a thread in the grid.
struct Place {
  int64_t block = 0;
  int group = 0, slot = 0, role = 0;  // threadIdx.x, .y, .z
};

// Rows of a segment and columns of a strip, counted in the plan's rows and columns of one plane.
struct Tile {
  bool live = false;  // whether the plane exists
  int64_t n = 0;
  int lattice_row = 0, lattice_col = 0;
  int first_row = 0, rows = 0;
  int first_col = 0;  // of the span
};

EMO_ANYWHERE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
EMO_ANYWHERE int least(int a, int b) { return a < b ? a : b; }
EMO_ANYWHERE int most(int a, int b) { return a > b ? a : b; }

// Whether 0 <= index < size.
EMO_KERNEL bool inside(int index, int size) {
  return static_cast<unsigned>(index) < static_cast<unsigned>(size);
}

// What a launch is for.
struct Task {
  int64_t N;
  int C, width;  // channels, of a thread
  int threads;   // of a block at most
  int roles;     // threads that share a strip
  int lattices, rows, cols, strip;
  int lead;    // steps of a segment before its first row is complete
  int blocks;  // about as many
};

inline Plan make_plan(const Task& task) {
  Plan plan;
  plan.vectors = task.C / task.width;
  plan.blocks_c = static_cast<int>(ceil_div(plan.vectors, kMostGroups));
  plan.groups = static_cast<int>(ceil_div(plan.vectors, plan.blocks_c));
  plan.slots = most(task.threads / task.roles / plan.groups, 1);
  plan.strip = task.strip;
  plan.lattices = task.lattices;
  plan.rows = task.rows;
  plan.cols = task.cols;
  const int strips = static_cast<int>(ceil_div(task.cols, task.strip));
  plan.span = least(plan.slots, strips);
  plan.planes = plan.slots / plan.span;
  plan.slots = plan.planes * plan.span;
  plan.spans = static_cast<int>(ceil_div(strips, plan.span));
  plan.all_planes = task.N * task.lattices * task.lattices;
  const int64_t columns = ceil_div(plan.all_planes, plan.planes) * plan.spans;
  const int64_t threads = columns * plan.slots * plan.groups * plan.blocks_c;
  const int64_t wanted = ceil_div(kFewThreads, threads > 0 ? threads : 1);
  const int64_t highest = ceil_div(task.rows, 4 * task.lead + 1);  // more would be mostly lead
  plan.segment = static_cast<int>(ceil_div(task.rows, wanted < highest ? wanted : highest));
  plan.segments = static_cast<int>(ceil_div(task.rows, plan.segment));
  plan.units = columns * plan.segments;
  plan.rounds = ceil_div(plan.units, most(task.blocks / plan.blocks_c, 1));
  plan.programs = plan.rounds > 0 ? ceil_div(plan.units, plan.rounds) : 0;
  return plan;
}

// The first channel of a thread, or -1 behind the last.
EMO_KERNEL int first_channel(const Plan& plan, const Place& place, int width) {
  const int vector = static_cast<int>(place.block % plan.blocks_c) * plan.groups + place.group;
  return vector < plan.vectors ? vector * width : -1;
}

// Which unit a block has in a round; units() and more: none.
EMO_KERNEL int64_t unit_of(const Plan& plan, int64_t block, int64_t round) {
  return block / plan.blocks_c * plan.rounds + round;
}

// Rows of a unit: the same for all its threads.
EMO_KERNEL int unit_rows(const Plan& plan, int64_t unit) {
  const int first = static_cast<int>(unit / plan.spans % plan.segments) * plan.segment;
  return least(plan.segment, plan.rows - first);
}

// The tile of a slot in a unit; neighbouring units share the columns between them.
EMO_KERNEL Tile tile_of(const Plan& plan, int64_t unit, int slot) {
  Tile tile;
  tile.rows = unit_rows(plan, unit);
  tile.first_col = static_cast<int>(unit % plan.spans) * plan.span * plan.strip;
  unit /= plan.spans;
  tile.first_row = static_cast<int>(unit % plan.segments) * plan.segment;
  int64_t plane = unit / plan.segments * plan.planes + slot / plan.span;
  tile.live = plane < plan.all_planes;
  tile.lattice_col = static_cast<int>(plane % plan.lattices);
  plane /= plan.lattices;
  tile.lattice_row = static_cast<int>(plane % plan.lattices);
  tile.n = plane / plan.lattices;
  return tile;
}

}  // namespace emo_kernels::cuda
