// How one call of the block is cut up: a pure function of its shapes and of the panel width.
#pragma once

#include <cstdint>

#include "cpu/launch.h"
#include "emo_kernels.h"

namespace emo_kernels::cpu {

constexpr int64_t kMaxTaps = 64;

constexpr int64_t kAttentionQueries = 56;  // of a head that attend at a time

// The window attention in front: which windows, and where its operands lie.
struct AttentionPlan {
  bool attends, grid, block;
  bool values_expanded;  // attention over act(Wv h + bv) instead of h
  int64_t heads, head_dim, value_dim;
  int64_t wh, ww, n1, n2, tokens;  // n1 x n2 windows of wh x ww
  int64_t z_channels;              // of the result
  int64_t row_stride;              // of a normalised pixel, with room for a panel behind it
  double scale;
  // Elements from the start of the shared buffer.
  int64_t qk_weight, qk_bias, v_weight, v_bias, z;
  // Elements from the start of a thread's buffer.
  int64_t norm_scale, norm_shift, no_bias, h_rows, h_panels, q, k, keys, values, value_rows;
  int64_t scores, weights;  // before and behind the softmax
  int64_t offset_rows, thread_offsets;
};

struct IrmbPlan {
  IrmbCall call;
  IrmbCall conv;  // the block behind the attention: its input is z; without attention, the call
  AttentionPlan attention;
  int64_t images;  // worked on at a time
  int64_t Ho, Wo;
  int threads;

  int64_t panel, gemm_rows;         // channels of a panel, most pixels of a GEMM tile
  int64_t chunk_panels;             // panels that are summed in one go
  int64_t element, map, term;       // bytes: computed with, of maps, of what GEMMs multiply
  int64_t depth(int64_t K) const {  // of a GEMM's operands: K, filled up to whole lanes
    return (K * term + element - 1) / element * element / term;
  }
  int64_t panels_c, panels_m, panels_o;  // panels of each channel count

  // By rows: threads share out N * Ho output rows, each walks its rows in tiles. By panels: threads
  // share out the expanded channels of one image, meet, and share out its pixels and outputs.
  bool by_panels;
  int64_t tile_rows;      // output rows of a tile
  int64_t block_columns;  // output columns of a tile
  int64_t group_panels;   // panels of expanded channels in flight
  int64_t chunk_rows;     // input rows normalised and expanded at a time
  int64_t ring_rows, ring_columns;
  int64_t chunk_pixels, tile_pixels;  // capacities, with room for a whole last GEMM tile

  // Elements from the start of the shared buffer; terms and maps lie there at their own size.
  int64_t v_weight, v_bias, dw_weight, bn_shift, proj_weight, gamma, row_sums, gates, d_shared;
  int64_t shared_elements;
  // Elements from the start of a thread's buffer; the offsets are int64 arrays of their own.
  int64_t norm_scale, norm_shift, x_panels, ring, d, partial, thread_elements;
  int64_t thread_offsets;
};

struct IrmbKernel {
  int64_t panel, gemm_rows, chunk_panels;
  int64_t element, map, term;
  void (*run)(const IrmbPlan& plan, void* shared, void* own, int64_t* offsets, int thread,
              int threads, void (*barrier)());
};

EMO_DECLARE_KERNELS(IrmbKernel, irmb_kernel);

// Checks every size and pointer the kernels rely on: std::invalid_argument otherwise.
void check_irmb(const IrmbCall& call);
IrmbPlan plan_irmb(const IrmbCall& call, const IrmbKernel& kernel);

}  // namespace emo_kernels::cpu
