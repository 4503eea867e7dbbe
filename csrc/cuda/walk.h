// The kernels on the host: the same code as on the GPU, block after block, thread after thread
// between two barriers, every access to memory checked.
//
// Proves: each element of a result is written once and all are; nothing outside the operands is
// read; shared memory is read only where it was written, with a barrier between what one thread
// writes and another reads or writes; and that the numbers are right, for they are the kernels': to
// the bit, but for what mma.h says of the order of a tensor core's sums.
//
// A kernel's file of walks says, for its arguments, what a launch may touch: an overload
// `void operands(Watch&, const Args&)` beside the arguments' type, before it calls walk().
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/mma.h"
#include "cuda/sum_partials.h"

namespace emo_kernels::cuda {

// What a launch may touch, and what it has touched.
class Watch {
 public:
  void may_read(const void* data, int64_t bytes) { add(data, bytes, false); }
  void may_read(const Vector& vector, int64_t count);
  void must_write(const void* data, int64_t bytes) { add(data, bytes, true); }
  void shares(const void* data, int64_t bytes);
  void all_is_written() const;

  void begin_block() { written_since_ = ++epoch_; }
  void barrier() { ++epoch_; }
  void at_thread(int thread) { thread_ = first_lane_ = thread; }
  void at_lane(int lane) { thread_ = first_lane_ + lane; }

  void read(const void* data, int64_t bytes);
  void write(const void* data, int64_t bytes);
  // A copy into shared memory is under way: until it lands, which writes, nobody may read there.
  void copy_begins(const void* data, int64_t bytes);

  std::string name;

 private:
  // A range of memory that a launch may touch.
  struct Range {
    uintptr_t begin;
    int64_t bytes;
    bool written;                 // to be written, each byte once
    std::vector<uint8_t> writes;  // by byte
  };
  // The last accesses to two bytes of shared memory; epochs count barriers, 0: never.
  struct Shadow {
    uint32_t write_epoch = 0, read_epoch = 0;
    int writer = 0, reader = 0;
  };
  static constexpr int kMany = -1;  // a reader

  void add(const void* data, int64_t bytes, bool written);
  bool is_shared(const void* data, int64_t bytes) const;
  void write_shared(const void* data, int64_t bytes, uint32_t epoch);
  template <class Visit>
  void for_shadows(const void* data, int64_t bytes, const Visit& visit);
  [[noreturn]] void fail(const char* what) const;

  std::vector<Range> ranges_;
  std::vector<Shadow> shadows_;
  uintptr_t shared_ = 0;
  int64_t shared_bytes_ = 0;
  uint32_t epoch_ = 0, written_since_ = 0;
  int thread_ = 0, first_lane_ = 0;
};

// Of the launch at work.
Watch*& watch();

int64_t bytes_of(DType dtype, int64_t count);

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
    then(step);
    barrier();
  }
  template <class Step>
  void then(const Step& step) const {
    every(1, step);
  }
  template <class Step>
  void warps(const Step& step) const {
    every(kLanes, step);
  }
  void barrier() const { watch()->barrier(); }

 private:
  template <class Step>
  void every(size_t stride, const Step& step) const {
    for (size_t thread = 0; thread < threads.size(); thread += stride) {
      watch()->at_thread(static_cast<int>(thread));
      step(threads[thread]);
    }
  }
};

// Runs a launch as a GPU would, but for the order of its threads.
struct Walker {
  template <class Program>
  void launch(const typename Program::Args& args, const Grid& grid, const std::string& name) {
    const int64_t bytes = Program::shared_bytes(args);
    std::vector<double> shared(static_cast<size_t>(ceil_div(bytes, 8)));
    Watch here;
    here.name = name;
    operands(here, args);
    here.shares(shared.data(), bytes);
    watch() = &here;
    for (int64_t block = 0; block < grid.blocks; ++block) {
      std::memset(shared.data(), 0xff, shared.size() * sizeof(double));
      here.begin_block();
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

// Runs a call's launches, which dispatch(call, launcher) makes.
template <class Call>
void walk(const Call& call) {
  struct Unwatched {
    ~Unwatched() { watch() = nullptr; }
  } unwatched;
  Walker walker;
  dispatch(call, walker);
}

}  // namespace emo_kernels::cuda
