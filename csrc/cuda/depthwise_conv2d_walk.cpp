// The depthwise kernels on the host: the same code as on the GPU, block after block, thread after
// thread between two barriers, every access to memory checked.
//
// Proves: each element of a result is written once and all are; nothing outside the operands is
// read; no shared memory is read before it is written, or while a copy into it is under way; and
// that the numbers are right, for they are the kernels', to the bit.
#include <memory>

#include "cuda/depthwise_dispatch.h"

namespace emo_kernels::cuda {
namespace {

// A range of memory that a launch may touch.
struct Range {
  uintptr_t begin;
  int64_t bytes;
  bool written;                 // to be written, each byte once
  std::vector<uint8_t> writes;  // by byte
};

class Watch {
 public:
  void may_read(const void* data, int64_t bytes) { add(data, bytes, false); }
  void must_write(const void* data, int64_t bytes) { add(data, bytes, true); }
  void scratch(const void* data, int64_t bytes) {
    shared_ = reinterpret_cast<uintptr_t>(data);
    shared_bytes_ = bytes;
  }

  void read(const void* data, int64_t bytes) {
    if (aligned_inside(data, bytes, shared_, shared_bytes_)) return;
    for (const Range& range : ranges_) {
      if (!range.written && aligned_inside(data, bytes, range.begin, range.bytes)) return;
    }
    fail("reads outside its operands");
  }

  void write(const void* data, int64_t bytes) {
    if (aligned_inside(data, bytes, shared_, shared_bytes_)) return;
    for (Range& range : ranges_) {
      if (!range.written || !aligned_inside(data, bytes, range.begin, range.bytes)) continue;
      uint8_t* const writes =
          range.writes.data() + (reinterpret_cast<uintptr_t>(data) - range.begin);
      for (int64_t i = 0; i < bytes; ++i) {
        if (writes[i]++ != 0) fail("writes an element twice");
      }
      return;
    }
    fail("writes outside its results");
  }

  void all_is_written() {
    for (const Range& range : ranges_) {
      for (const uint8_t writes : range.writes) {
        if (writes != 1) fail("leaves an element unwritten");
      }
    }
  }

  std::string name;

 private:
  static bool aligned_inside(const void* data, int64_t bytes, uintptr_t begin, int64_t size) {
    const auto address = reinterpret_cast<uintptr_t>(data);
    return address % static_cast<uintptr_t>(bytes) == 0 && address >= begin &&
           address + static_cast<uintptr_t>(bytes) <= begin + static_cast<uintptr_t>(size);
  }

  void add(const void* data, int64_t bytes, bool written) {
    if (data == nullptr) return;
    const std::vector<uint8_t> writes(written ? static_cast<size_t>(bytes) : 0);
    ranges_.push_back({reinterpret_cast<uintptr_t>(data), bytes, written, writes});
  }

  [[noreturn]] void fail(const char* what) const { throw std::logic_error(name + " " + what); }

  std::vector<Range> ranges_;
  uintptr_t shared_ = 0;
  int64_t shared_bytes_ = 0;
};

thread_local Watch* watch = nullptr;  // of the launch at work

int64_t bytes_of(DType dtype, int64_t count) {
  return count * (dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2);
}

void may_read(Watch& watch, const Vector& vector, int64_t count) {
  watch.may_read(vector.data, bytes_of(vector.dtype, count));
}

int64_t pixels_in(const Geometry& g) { return g.N * g.H * g.W * g.C; }
int64_t pixels_out(const Geometry& g) { return g.N * g.HO * g.WO * g.C; }

template <class T>
void operands(Watch& watch, const ForwardArgs<T>& args) {
  const Geometry& g = args.g;
  watch.may_read(args.x, pixels_in(g) * int64_t{sizeof(T)});
  watch.must_write(args.y, pixels_out(g) * int64_t{sizeof(T)});
  may_read(watch, args.weight, int64_t{g.C} * g.K * g.K);
  may_read(watch, args.pivot, g.C);
  watch.must_write(args.partials, args.plan.programs * 2 * g.C * int64_t{sizeof(double)});
}

template <class T>
void operands(Watch& watch, const BackwardArgs<T>& args) {
  const Geometry& g = args.g;
  const int64_t in = pixels_in(g) * int64_t{sizeof(T)}, out = pixels_out(g) * int64_t{sizeof(T)};
  const bool input = args.first_role == kInputGradient, filters = args.partials != nullptr;
  watch.may_read(args.grad, out);
  watch.may_read(args.y, out);
  may_read(watch, args.coefficients, 4 * g.C);
  if (filters) watch.may_read(args.x, in);
  watch.must_write(args.partials, args.plan.programs * g.K * g.K * g.C * int64_t{sizeof(float)});
  if (!input) return;
  may_read(watch, args.weight, int64_t{g.C} * g.K * g.K);
  watch.may_read(args.local_grad, in);
  watch.must_write(args.dx, in);
}

template <class Partial>
void operands(Watch& watch, const SumArgs<Partial>& args) {
  const int64_t size = args.taps * args.C;
  watch.may_read(args.partials, args.rows * size * int64_t{sizeof(Partial)});
  watch.must_write(args.out, bytes_of(args.dtype, size));
}

// The threads of a block, each step on all of them before the next.
template <class Program>
struct EachOf {
  std::vector<Program>& threads;

  template <class Step>
  void operator()(const Step& step) const {
    for (Program& thread : threads) step(thread);
  }
  template <class Step>
  void then(const Step& step) const {
    (*this)(step);
  }
};

struct Walker {
  template <class Program>
  void launch(const typename Program::Args& args, const Grid& grid, const std::string& name) {
    std::vector<double> shared(static_cast<size_t>(ceil_div(Program::shared_bytes(args), 8)));
    Watch here;
    here.name = name;
    operands(here, args);
    here.scratch(shared.data(), Program::shared_bytes(args));
    watch = &here;
    for (int64_t block = 0; block < grid.blocks; ++block) {
      std::memset(shared.data(), 0xff, shared.size() * sizeof(double));
      std::vector<Program> threads;
      threads.reserve(static_cast<size_t>(grid.x * grid.y * grid.z));
      for (int z = 0; z < grid.z; ++z) {
        for (int y = 0; y < grid.y; ++y) {
          for (int x = 0; x < grid.x; ++x) {
            threads.emplace_back(args, Place{block, x, y, z}, shared.data());
          }
        }
      }
      Program::run(args, block, EachOf<Program>{threads});
    }
    here.all_is_written();
  }
};

template <class Call>
void walk(const Call& call) {
  struct Unwatched {
    ~Unwatched() { watch = nullptr; }
  } unwatched;
  Walker walker;
  dispatch(call, walker);
}

}  // namespace

void note_read(const void* address, int64_t bytes) { watch->read(address, bytes); }
void note_write(const void* address, int64_t bytes) { watch->write(address, bytes); }

void walk_depthwise_conv2d(const DepthwiseCall& call) { walk(call); }
void walk_depthwise_conv2d_backward(const DepthwiseBackwardCall& call) { walk(call); }

int64_t scratch_bytes(const DepthwiseCall& call) {
  NoLauncher nothing;
  return dispatch(call, nothing);
}

int64_t scratch_bytes(const DepthwiseBackwardCall& call) {
  NoLauncher nothing;
  return dispatch(call, nothing);
}

}  // namespace emo_kernels::cuda
