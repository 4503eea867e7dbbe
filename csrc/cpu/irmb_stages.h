// The stages of the block on one thread: pack, normalise, expand, depthwise, gate, shrink.
#pragma once

#include "cpu/depthwise.h"
#include "cpu/gemm.h"
#include "cpu/irmb_plan.h"
#include "cpu/normalize.h"
#include "cpu/pack.h"
#include "cpu/panels.h"

namespace emo_kernels::cpu {
namespace {

// The weights that Stages::pack_expanded reads.
template <class T>
Ahead expansion_of(const IrmbPlan& plan, int64_t panel);

template <class Ty>
class Stages {
 public:
  using T = typename Ty::T;
  using Map = typename Ty::Map;
  using Term = typename Ty::Term;

  const IrmbPlan& plan;
  bool gates_ready = false;
  Ahead ahead;  // fetched while panels are expanded and shrunk

  Stages(const IrmbPlan& p, T* shared, T* own, int64_t* offsets)
      : plan(p),
        call_(p.conv),
        shared_(shared),
        own_(own),
        packed_(p.by_panels ? own : shared),
        ring_offsets_(offsets),
        out_offsets_(offsets + p.chunk_pixels),
        depthwise_(
            depthwise_row_for<T, BlockEpilogue<T, Term>>(call_.K, call_.stride, call_.dilation)) {
    norm_affine<T>(call_, own_ + plan.norm_scale, own_ + plan.norm_shift);
  }

  // Pack the weights of an expanded panel, of an output panel, and gamma.
  void pack_expanded(int64_t panel);
  void pack_outputs(int64_t panel);
  void pack_gamma();
  // The weights pack_outputs reads.
  Ahead projection_of(int64_t panel) const;

  // Names the maps of `images` images: read for the expansion, added at the end, written.
  void set_images(const Map* source, const Map* residual, Map* out) {
    source_ = source;
    residual_ = residual;
    out_ = out;
    n_ = -1;
  }

  // Names the tile's image and output columns, and clears the ring's columns outside the map.
  void set_block(int64_t n, int64_t column0, int64_t column1);
  void set_group(int64_t panel0, int64_t panel1) {
    group0_ = panel0;
    group1_ = panel1;
  }

  // Expands the input rows that output rows [y0, y1) need, from row `expanded` on.
  int64_t expand_for(int64_t y0, int64_t y1, int64_t expanded);
  // Depthwise convolution of output rows [y0, y1), or (sums_only) their sums for squeeze-excite.
  void depthwise(int64_t y0, int64_t y1, bool sums_only);
  // Adds the group's channels into output rows [y0, y1).
  void shrink(int64_t y0, int64_t y1);
  // A thread's share of one image's pixels and outputs, all channels at once: output panels from
  // first_share on.
  void shrink_share(int thread, int threads);
  int64_t first_share(int thread, int threads) const;
  // The squeeze-excite gate of image n out of its row sums.
  void gate(int64_t n);

 private:
  struct PixelRange {
    int64_t begin, end;
  };
  PixelRange share_of_panel(int64_t panel, int thread, int threads) const;
  template <class D>
  void normalize_row(int64_t row, int64_t panel0, int64_t panel1, D* dst, int64_t panel_stride);
  void pack_x(int64_t row0, int64_t row1);
  void expand_rows(int64_t row0, int64_t row1);
  void expand_panel(int64_t panel, int64_t pixels);
  void shrink_panel(int64_t panel, int64_t pixel0, int64_t pixel1, const Term* d, int64_t d_stride,
                    int64_t channel0, int64_t channels);
  T* ring_of(int64_t panel) const {
    return own_ + plan.ring +
           (panel - group0_) * (plan.ring_rows * plan.ring_columns + 1) * kPanel<T>;
  }
  Term* d_of(int64_t panel) const {
    Term* const first = terms(plan.by_panels ? shared_ + plan.d_shared : own_ + plan.d);
    return first + (plan.by_panels ? panel : panel - group0_) * plan.tile_pixels * kPanel<T>;
  }
  int64_t slot(int64_t panel) const { return plan.by_panels ? 0 : panel * kPanel<T>; }
  T* partial_sums() const;
  static Term* terms(T* place) { return reinterpret_cast<Term*>(place); }

  const IrmbCall& call_;
  T* const shared_;
  T* const own_;
  T* const packed_;  // the buffer of the packed weights
  int64_t* const ring_offsets_;
  int64_t* const out_offsets_;
  const DepthwiseRowFunction<T> depthwise_;

  const Map* source_ = nullptr;
  const Map* residual_ = nullptr;
  Map* out_ = nullptr;
  int64_t n_ = -1, column0_ = 0, column1_ = 0;  // image and output columns
  int64_t in_column0_ = 0, in_column1_ = 0;     // input columns they need, inside the map
  int64_t ring_column0_ = 0;                    // where in_column0_ lies in the ring
  int64_t cleared0_ = -1, cleared1_ = -1;       // output columns the ring is cleared for
  int64_t packed_row0_ = 0, packed_row1_ = 0;   // input rows in x_panels
  int64_t group0_ = 0, group1_ = 0;             // expanded panels in flight
};

}  // namespace
}  // namespace emo_kernels::cpu

#include "cpu/irmb_stages_impl.h"
