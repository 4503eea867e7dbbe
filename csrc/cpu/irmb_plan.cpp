#include "cpu/irmb_plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace emo_kernels::cpu {
namespace {

constexpr int64_t kCacheBudget = 640 * 1024;        // of a 1 MB L2: what one thread keeps in flight
constexpr int64_t kTilePixels = 56;                 // output pixels of a tile on narrow maps
constexpr int64_t kSharedDepthwiseLimit = 4 << 20;  // bytes that may pass between cores

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(result, factor, &result)) {
      throw std::invalid_argument("irmb: a tensor of more than 2^63 bytes");
    }
  }
  return result;
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("irmb: " + message);
}

void check_size(const char* name, int64_t value, int64_t least, int64_t most) {
  require(value >= least && value <= most, std::string(name) + " must lie in " +
                                               std::to_string(least) + ".." + std::to_string(most) +
                                               ", got " + std::to_string(value));
}

void check_param(const char* name, const Param& param, int64_t count, bool optional) {
  if (optional && param.data == nullptr) return;
  require(param.data != nullptr, std::string(name) + " is missing");
  require(param.count == count, std::string(name) + " must have " + std::to_string(count) +
                                    " elements, got " + std::to_string(param.count));
}

int64_t output_size(int64_t size, const IrmbCall& c) {
  const int64_t room = size + 2 * c.padding - c.dilation * (c.K - 1) - 1;
  require(room >= 0, "the depthwise kernel does not fit the map");
  return room / c.stride + 1;
}

}  // namespace

void check_irmb(const IrmbCall& c) {
  constexpr int64_t kMost = int64_t{1} << 40, kSmall = 1 << 20;
  require(c.dtype == DType::kFloat32 || c.dtype == DType::kFloat64, "dtype must be fp32 or fp64");
  require(c.norm >= Norm::kNone && c.norm <= Norm::kLayer, "unknown norm");
  require(c.act >= Activation::kNone && c.act <= Activation::kSilu, "unknown activation");
  check_size("N", c.N, 0, kMost);
  check_size("C", c.C, 1, kSmall);
  check_size("H", c.H, 1, kMost);
  check_size("W", c.W, 1, kMost);
  check_size("M", c.M, 1, kSmall);
  check_size("O", c.O, 1, kSmall);
  check_size("K", c.K, 1, kMaxTaps);
  check_size("R", c.R, 0, kSmall);
  check_size("stride", c.stride, 1, kSmall);
  check_size("padding", c.padding, 0, kSmall);
  check_size("dilation", c.dilation, 1, kSmall);
  check_size("threads", c.threads, 1, 4096);
  const int64_t Ho = output_size(c.H, c), Wo = output_size(c.W, c);
  product({c.N, c.H, c.W, c.C, 8});
  product({c.N, Ho, Wo, c.O, 8});
  product({c.N, Ho, Wo, c.M, 8});
  const bool batch = c.norm == Norm::kAffine;
  check_param("norm_weight", c.norm_weight, c.C, true);
  check_param("norm_bias", c.norm_bias, c.C, true);
  check_param("norm_mean", c.norm_mean, c.C, !batch);
  check_param("norm_var", c.norm_var, c.C, !batch);
  check_param("v_weight", c.v_weight, product({c.M, c.C}), true);
  check_param("v_bias", c.v_bias, c.M, true);
  check_param("dw_weight", c.dw_weight, product({c.M, c.K, c.K}), false);
  check_param("bn_weight", c.bn_weight, c.M, true);
  check_param("bn_bias", c.bn_bias, c.M, true);
  check_param("bn_mean", c.bn_mean, c.M, false);
  check_param("bn_var", c.bn_var, c.M, false);
  check_param("se_reduce_weight", c.se_reduce_weight, product({c.R, c.M}), c.R == 0);
  check_param("se_reduce_bias", c.se_reduce_bias, c.R, true);
  check_param("se_expand_weight", c.se_expand_weight, product({c.R, c.M}), c.R == 0);
  check_param("se_expand_bias", c.se_expand_bias, c.M, true);
  check_param("proj_weight", c.proj_weight, product({c.O, c.M}), false);
  check_param("gamma", c.gamma, c.O, true);
  require(c.v_weight.data != nullptr || c.M == c.C, "without an expansion M must equal C");
  require(!c.skip || (c.stride == 1 && c.C == c.O && Ho == c.H && Wo == c.W),
          "a skip needs stride 1 and an output of the input's shape");
  require(c.N == 0 || (c.x != nullptr && c.out != nullptr), "x and out must not be null");
}

namespace {

int64_t reach(const IrmbCall& c) { return (c.K - 1) * c.dilation; }

// Sizes of a thread's working set for `rows` x `columns` output tiles and `group` panels in flight.
void size_tile(IrmbPlan& p, int64_t rows, int64_t columns, int64_t group, bool whole_map) {
  const IrmbCall& c = p.call;
  p.tile_rows = rows;
  p.block_columns = columns;
  p.group_panels = group;
  p.ring_columns = (columns - 1) * c.stride + reach(c) + 1;
  p.ring_rows = (rows - 1) * c.stride + reach(c) + 1;
  const int64_t in_rows = std::min(c.H, p.ring_rows);
  const int64_t in_columns = std::min(c.W, p.ring_columns);
  p.chunk_rows = whole_map ? in_rows : std::min(in_rows, std::max<int64_t>(1, rows * c.stride));
  p.chunk_pixels = p.chunk_rows * in_columns + p.gemm_rows;
  p.tile_pixels = rows * columns + p.gemm_rows;
}

int64_t thread_bytes(const IrmbPlan& p, int64_t element) {
  const int64_t ring = (p.ring_rows * p.ring_columns + 1) * p.group_panels;
  const int64_t d = p.by_panels ? 0 : p.tile_pixels * p.group_panels;
  return (ring + d + p.chunk_pixels * p.panels_c) * p.panel * element;
}

// Expanded panels in flight: as many as keep their weights, ring and tile inside the budget.
void choose_tile(IrmbPlan& p, int64_t element) {
  const IrmbCall& c = p.call;
  const int64_t weights = p.panel * element * (c.C + c.O + c.K * c.K);
  const int64_t rows = std::clamp<int64_t>(ceil_div(kTilePixels, p.Wo), 1, p.Ho);
  const auto fits = [&](int64_t columns, int64_t group) {
    size_tile(p, rows, columns, group, false);
    return thread_bytes(p, element) + group * weights <= kCacheBudget;
  };
  const int64_t chunk = p.chunk_panels, chunks = ceil_div(p.panels_m, chunk);
  int64_t columns = p.Wo;
  while (!fits(columns, chunk) && columns > 4 * p.gemm_rows) columns = ceil_div(columns, 2);
  int64_t in_flight = chunks;
  while (in_flight > 1 && !fits(columns, in_flight * chunk)) --in_flight;
  const int64_t groups = ceil_div(chunks, in_flight);
  size_tile(p, rows, columns, std::min(p.panels_m, ceil_div(chunks, groups) * chunk), false);
}

// Rows cost every thread its halo, panels a meeting of all threads and uneven shares.
bool panels_pay(const IrmbPlan& p, int64_t element) {
  const IrmbCall& c = p.call;
  if (p.threads == 1 || c.N >= p.threads || c.R > 0) return false;
  if (p.Ho * p.Wo * p.panels_m * p.panel * element > kSharedDepthwiseLimit) return false;
  const double expand = static_cast<double>(c.H) * c.W * c.C;
  const double rest = static_cast<double>(p.Ho) * p.Wo * (c.O + c.K * c.K);
  const double rows = static_cast<double>(ceil_div(c.N * p.Ho, p.threads));
  const double in_rows =
      std::min<double>(c.H * c.N, rows * c.stride + std::max<int64_t>(0, reach(c) - c.stride + 1));
  const double by_rows = expand * in_rows / c.H + rest * rows / p.Ho;
  const double per_image = expand * ceil_div(p.panels_m, p.threads) / p.panels_m + rest / p.threads;
  return 1.05 * per_image * c.N < by_rows;
}

void place_buffers(IrmbPlan& p) {
  const IrmbCall& c = p.call;
  const int64_t P = p.panel, M = p.panels_m * P, O = p.panels_o * P, C = p.panels_c * P;
  int64_t at = 0;
  const auto place = [&at](int64_t elements) {
    const int64_t start = at;
    at += round_up(elements, 32);
    return start;
  };
  p.v_weight = place(c.v_weight.data ? M * c.C : 0);
  p.v_bias = place(M);
  p.dw_weight = place(M * c.K * c.K);
  p.bn_shift = place(M);
  p.proj_weight = place(O * c.M);
  p.gamma = place(O);
  p.row_sums = place(c.R > 0 ? c.N * p.Ho * M : 0);
  p.gates = place(c.R > 0 ? c.N * M : 0);
  p.d_shared = place(p.by_panels ? p.tile_pixels * M : 0);
  p.shared_elements = at;
  at = 0;
  p.norm_scale = place(C);
  p.norm_shift = place(C);
  p.x_panels = place(std::max(p.chunk_pixels * C, c.R > 0 ? M : 0));
  p.ring = place((p.ring_rows * p.ring_columns + 1) * p.group_panels * P);
  p.d = place(p.by_panels ? 0 : p.tile_pixels * p.group_panels * P);
  p.thread_elements = at;
  p.thread_offsets = p.chunk_pixels + p.tile_pixels;
}

}  // namespace

IrmbPlan plan_irmb(const IrmbCall& call, const IrmbKernel& kernel) {
  IrmbPlan p{};
  p.call = call;
  p.Ho = output_size(call.H, call);
  p.Wo = output_size(call.W, call);
  p.panel = kernel.panel;
  p.gemm_rows = kernel.gemm_rows;
  p.chunk_panels = kernel.chunk_panels;
  p.panels_c = ceil_div(call.C, p.panel);
  p.panels_m = ceil_div(call.M, p.panel);
  p.panels_o = ceil_div(call.O, p.panel);
  p.threads = call.threads;
  const int64_t element = call.dtype == DType::kFloat64 ? 8 : 4;
  p.by_panels = panels_pay(p, element);
  if (p.by_panels) {
    size_tile(p, p.Ho, p.Wo, 1, true);
  } else {
    choose_tile(p, element);
  }
  place_buffers(p);
  return p;
}

}  // namespace emo_kernels::cpu
