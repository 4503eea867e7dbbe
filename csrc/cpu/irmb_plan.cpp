#include "cpu/irmb_plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace emo_kernels::cpu {
namespace {

constexpr int64_t kCacheBudget = 640 * 1024;  // of a 1 MB L2: what one thread keeps in flight
constexpr int64_t kPanelsBudget = 1 << 20;    // the same by panels, where d is written once
constexpr int64_t kTilePixels = 56;           // output pixels of a tile on narrow maps
constexpr int64_t kAttendedBudget = 2 << 20;  // bytes of attention results in flight, all threads
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

void check_attention(const IrmbCall& c) {
  require(c.C % c.head_dim == 0, "head_dim must divide C");
  require(c.attention_first || c.M % (c.C / c.head_dim) == 0, "the heads must divide M");
  require(c.windows >= Windows::kGrid && c.windows <= Windows::kBoth, "unknown windows");
  const int64_t wh = c.window_size > 0 ? c.window_size : c.H;
  const int64_t ww = c.window_size > 0 ? c.window_size : c.W;
  check_size("tokens of a window", product({wh, ww}), 1, 1 << 20);
}

}  // namespace

void check_irmb(const IrmbCall& c) {
  constexpr int64_t kMost = int64_t{1} << 40, kSmall = 1 << 20;
  require(c.dtype >= DType::kFloat32 && c.dtype <= DType::kBFloat16,
          "dtype must be fp32, fp64 or bf16");
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
  check_size("head_dim", c.head_dim, 0, kSmall);
  check_size("window_size", c.window_size, -kSmall, kSmall);
  if (c.head_dim > 0) check_attention(c);
  check_param("qk_weight", c.qk_weight, product({2, c.C, c.C}), true);
  check_param("qk_bias", c.qk_bias, 2 * c.C, true);
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
  const IrmbCall& c = p.conv;
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

int64_t thread_bytes(const IrmbPlan& p) {
  const int64_t ring = (p.ring_rows * p.ring_columns + 1) * p.group_panels;
  const int64_t d = p.by_panels ? 0 : p.tile_pixels * p.group_panels;
  return (ring * p.element + (d + p.chunk_pixels * p.panels_c) * p.term) * p.panel;
}

// Expanded panels in flight: as many as keep their weights, ring and tile inside the budget.
void choose_tile(IrmbPlan& p) {
  const IrmbCall& c = p.conv;
  const int64_t weights = p.panel * (p.term * (c.C + c.O) + p.element * c.K * c.K);
  const int64_t rows = std::clamp<int64_t>(ceil_div(kTilePixels, p.Wo), 1, p.Ho);
  const auto fits = [&](int64_t columns, int64_t group) {
    size_tile(p, rows, columns, group, false);
    return thread_bytes(p) + group * weights <= kCacheBudget;
  };
  const int64_t chunk = p.chunk_panels, chunks = ceil_div(p.panels_m, chunk);
  int64_t columns = p.Wo;
  while (!fits(columns, chunk) && columns > 4 * p.gemm_rows) columns = ceil_div(columns, 2);
  int64_t in_flight = chunks;
  while (in_flight > 1 && !fits(columns, in_flight * chunk)) --in_flight;
  const int64_t groups = ceil_div(chunks, in_flight);
  size_tile(p, rows, columns, std::min(p.panels_m, ceil_div(chunks, groups) * chunk), false);
}

// What one thread keeps in flight by panels: x, one ring, all of the depthwise result, and a panel
// of weights of the expansion.
int64_t panel_bytes(const IrmbPlan& p) {
  const IrmbCall& c = p.conv;
  const int64_t ring = (c.H + reach(c)) * (c.W + reach(c)) * p.panel;
  const int64_t x = c.H * c.W * p.panels_c * p.panel, d = p.Ho * p.Wo * p.panels_m * p.panel;
  return ring * p.element + (x + d + p.panel * c.C) * p.term;
}

// Rows cost every thread its halo, panels a meeting of all threads and uneven shares.
bool panels_pay(const IrmbPlan& p) {
  const IrmbCall& c = p.conv;
  if (c.R > 0) return false;
  if (p.threads == 1) return p.call.N == 1 && panel_bytes(p) <= kPanelsBudget;
  if (p.images >= p.threads) return false;
  if (p.Ho * p.Wo * p.panels_m * p.panel * p.term > kSharedDepthwiseLimit) return false;
  const double expand = static_cast<double>(c.H) * c.W * c.C;
  const double rest = static_cast<double>(p.Ho) * p.Wo * (c.O + c.K * c.K);
  const double rows = static_cast<double>(ceil_div(p.images * p.Ho, p.threads));
  const double in_rows = std::min<double>(
      c.H * p.images, rows * c.stride + std::max<int64_t>(0, reach(c) - c.stride + 1));
  const double by_rows = expand * in_rows / c.H + rest * rows / p.Ho;
  const double per_image = expand * ceil_div(p.panels_m, p.threads) / p.panels_m + rest / p.threads;
  return 1.05 * per_image * p.images < by_rows;
}

// Hands out stretches of a buffer, each from a cache line on.
class Buffer {
 public:
  int64_t place(int64_t elements) {
    const int64_t start = size_;
    size_ += round_up(elements, 32);
    return start;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

void place_attention(IrmbPlan& p, Buffer& shared, Buffer& own) {
  AttentionPlan& a = p.attention;
  const auto terms = [&p](int64_t count) { return ceil_div(count * p.term, p.element); };
  const int64_t P = p.panel, C = p.call.C, room = a.tokens + p.gemm_rows;
  const int64_t d = round_up(a.head_dim, P), dv = round_up(a.value_dim, P);
  const bool projects = p.call.qk_weight.data != nullptr;
  const bool pairs = p.term < p.element;
  a.qk_weight = shared.place(projects ? terms(2 * a.heads * d * p.depth(C)) : 0);
  a.qk_bias = shared.place(projects ? 2 * a.heads * d : 0);
  a.v_weight = shared.place(a.values_expanded ? terms(a.heads * dv * p.depth(C)) : 0);
  a.v_bias = shared.place(a.values_expanded ? a.heads * dv : 0);
  const int64_t pixels = p.images * p.call.H * p.call.W + p.threads;
  a.z = shared.place(ceil_div(pixels * a.z_channels * p.map, p.element));
  a.row_stride = round_up(C, P) + P;
  a.norm_scale = own.place(round_up(C, P));
  a.norm_shift = own.place(round_up(C, P));
  a.no_bias = own.place(P);
  a.h_rows = own.place(a.tokens * a.row_stride);
  a.h_panels = own.place(terms(round_up(C, P) * room));
  a.q = own.place(terms(d * room));
  a.k = own.place(terms(d * room));
  a.keys = own.place(terms(round_up(a.tokens, P) * p.depth(a.head_dim)));
  a.values = own.place(terms(dv * room));
  a.value_rows = own.place(a.values_expanded && pairs ? dv * room : 0);
  const int64_t scores = round_up(a.tokens, P) * (kAttentionQueries + p.gemm_rows);
  a.scores = own.place(scores);
  a.weights = pairs ? own.place(terms(scores)) : a.scores;
  a.offset_rows = std::max(room, kAttentionQueries + p.gemm_rows);
  a.thread_offsets = a.offset_rows + a.tokens + kAttentionQueries;
}

void place_buffers(IrmbPlan& p) {
  const IrmbCall& c = p.conv;
  const int64_t P = p.panel, M = p.panels_m * P, O = p.panels_o * P, C = p.panels_c * P;
  Buffer shared, own;
  const auto terms = [&p](int64_t count) { return ceil_div(count * p.term, p.element); };
  Buffer& packed = p.by_panels ? own : shared;  // by panels, one panel at a time
  const int64_t packed_m = p.by_panels ? P : M, packed_o = p.by_panels ? P : O;
  p.v_weight = packed.place(c.v_weight.data ? terms(packed_m * p.depth(c.C)) : 0);
  p.v_bias = packed.place(packed_m);
  p.dw_weight = packed.place(packed_m * c.K * c.K);
  p.bn_shift = packed.place(packed_m);
  p.proj_weight = packed.place(terms(packed_o * p.depth(c.M)));
  p.gamma = shared.place(O);
  p.row_sums = shared.place(c.R > 0 ? p.images * p.Ho * M : 0);
  p.gates = shared.place(c.R > 0 ? p.images * M : 0);
  p.d_shared = shared.place(p.by_panels ? terms(p.tile_pixels * M) : 0);
  p.norm_scale = own.place(C);
  p.norm_shift = own.place(C);
  p.x_panels = own.place(std::max(terms(p.chunk_pixels * C), c.R > 0 ? M : 0));
  p.ring = own.place((p.ring_rows * p.ring_columns + 1) * p.group_panels * P);
  p.d = own.place(p.by_panels ? 0 : terms(p.tile_pixels * p.group_panels * P));
  const bool in_groups = !p.by_panels && p.group_panels < p.panels_m;
  p.partial = own.place(in_groups && p.map < p.element ? p.Ho * p.Wo * c.O : 0);
  p.thread_offsets = p.chunk_pixels + p.tile_pixels;
  if (p.attention.attends) {
    Buffer beside;  // the attention is over when the convolutions begin: the same memory
    place_attention(p, shared, beside);
    p.thread_elements = std::max(own.size(), beside.size());
    p.thread_offsets = std::max(p.thread_offsets, p.attention.thread_offsets);
  } else {
    p.thread_elements = own.size();
  }
  p.shared_elements = shared.size();
}

// The block behind the attention reads z, normalised and, with expanded values, expanded already.
void plan_attention(IrmbPlan& p) {
  const IrmbCall& call = p.call;
  AttentionPlan& a = p.attention;
  a.attends = call.head_dim > 0;
  p.conv = call;
  p.images = call.N;
  if (!a.attends) return;
  a.grid = call.windows != Windows::kBlock;
  a.block = call.windows != Windows::kGrid;
  a.values_expanded = !call.attention_first && call.v_weight.data != nullptr;
  a.head_dim = call.head_dim;
  a.heads = call.C / call.head_dim;
  a.z_channels = a.values_expanded ? call.M : call.C;
  a.value_dim = a.z_channels / a.heads;
  a.wh = call.window_size > 0 ? call.window_size : call.H;
  a.ww = call.window_size > 0 ? call.window_size : call.W;
  a.n1 = ceil_div(call.H, a.wh);
  a.n2 = ceil_div(call.W, a.ww);
  a.tokens = a.wh * a.ww;
  a.scale = 1.0 / __builtin_sqrt(static_cast<double>(a.head_dim));
  p.conv.C = a.z_channels;
  p.conv.norm = Norm::kNone;
  if (a.values_expanded) p.conv.v_weight = p.conv.v_bias = Param{};
  const int64_t image = call.H * call.W * a.z_channels * p.map;
  const int64_t fit = std::max<int64_t>(1, kAttendedBudget / image);
  p.images = std::min(call.N, fit >= p.threads ? fit / p.threads * p.threads : p.threads);
}

}  // namespace

IrmbPlan plan_irmb(const IrmbCall& call, const IrmbKernel& kernel) {
  IrmbPlan p{};
  p.call = call;
  p.threads = call.threads;
  p.panel = kernel.panel;
  p.gemm_rows = kernel.gemm_rows;
  p.chunk_panels = kernel.chunk_panels;
  p.element = kernel.element;
  p.map = kernel.map;
  p.term = kernel.term;
  plan_attention(p);
  p.Ho = output_size(call.H, call);
  p.Wo = output_size(call.W, call);
  p.panels_c = ceil_div(p.conv.C, p.panel);
  p.panels_m = ceil_div(call.M, p.panel);
  p.panels_o = ceil_div(call.O, p.panel);
  p.by_panels = panels_pay(p);
  if (p.by_panels) {
    size_tile(p, p.Ho, p.Wo, 1, true);
  } else {
    choose_tile(p);
  }
  place_buffers(p);
  return p;
}

}  // namespace emo_kernels::cpu
