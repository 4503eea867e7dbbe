// Programs with one fault each, and what the walk says of them; tests/test_cuda_walk.py compiles
// and runs this. Prints what is wrong, and returns 0 where every fault is found and the sound one
// passes.
#include "cuda/walk.h"

#include <cstdio>

namespace emo_kernels::cuda {
namespace {

enum class Fault {
  kNone,
  kReadsUnwritten,
  kReadsTooEarly,
  kOverwritesTooEarly,
  kLanesReadTooEarly,
  kReadsCopyUnderWay,
  kReadsOutside,
  kWritesOutside,
  kWritesTwice,
  kLeavesOut,
  kMisaligned,
};

struct FaultyArgs {
  const float* in;
  float* out;
  Fault fault;
};

constexpr int kThreadsHere = 64;

// out[i] = in[neighbour of i], through shared memory.
class Faulty {
 public:
  using Args = FaultyArgs;
  Faulty(const Args& args, const Place& place, void* shared)
      : args_(args), thread_(place.group), shared_(static_cast<float*>(shared)) {}

  static int64_t shared_bytes(const Args&) { return 2 * kThreadsHere * int64_t{sizeof(float)}; }

  template <class Each>
  static void run(const Args& args, int64_t, const Each& each) {
    const bool early = args.fault == Fault::kReadsTooEarly;
    const bool lanes_early = args.fault == Fault::kLanesReadTooEarly;
    each.then([](Faulty& self) { self.publish(); });
    if (!early && !lanes_early) each.barrier();
    if (lanes_early) {
      each.warps([](Faulty& self) {
        for_lanes([&](int lane) { read(self.shared_ + (lane + 1) % kLanes); });
      });
    }
    each.then([](Faulty& self) { self.collect(); });
    if (args.fault != Fault::kOverwritesTooEarly) each.barrier();
    each([](Faulty& self) { write(self.shared_ + self.thread_, 0.0f); });
  }

 private:
  void publish() {
    const bool outside = args_.fault == Fault::kReadsOutside && thread_ == 5;
    const float value = read(args_.in + (outside ? kThreadsHere : thread_));
    if (args_.fault == Fault::kReadsCopyUnderWay) {
      note_copy(shared_ + thread_, sizeof(float));
    } else {
      write(shared_ + thread_, value);
    }
  }

  void collect() {
    const int from = (thread_ + 1) % kThreadsHere;
    const float value =
        read(shared_ + (args_.fault == Fault::kReadsUnwritten ? kThreadsHere : from));
    if (args_.fault == Fault::kLeavesOut && thread_ == 7) return;
    if (args_.fault == Fault::kMisaligned) {
      note_write(reinterpret_cast<char*>(args_.out) + 2, sizeof(float));
    }
    const bool outside = args_.fault == Fault::kWritesOutside && thread_ == 9;
    write(args_.out + (outside ? -1 : thread_), value);
    if (args_.fault == Fault::kWritesTwice && thread_ == 3) write(args_.out + thread_, value);
  }

  const Args& args_;
  const int thread_;
  float* const shared_;
};

void operands(Watch& watch, const FaultyArgs& args) {
  watch.may_read(args.in, kThreadsHere * int64_t{sizeof(float)});
  watch.must_write(args.out, kThreadsHere * int64_t{sizeof(float)});
}

struct FaultyCall {
  FaultyArgs args;
};

template <class Launcher>
void dispatch(const FaultyCall& call, Launcher& launcher) {
  launcher.template launch<Faulty>(call.args, Grid{1, kThreadsHere, 1, 1}, "faulty");
}

std::string fault_found(Fault fault) {
  std::vector<float> in(kThreadsHere + 1), out(kThreadsHere + 1);
  for (int i = 0; i <= kThreadsHere; ++i) in[i] = static_cast<float>(i);
  try {
    walk(FaultyCall{{in.data(), out.data() + 1, fault}});
  } catch (const std::logic_error& error) {
    return error.what();
  }
  for (int i = 0; i < kThreadsHere; ++i) {
    if (out[i + 1] != static_cast<float>((i + 1) % kThreadsHere)) return "wrong numbers";
  }
  return "";
}

}  // namespace
}  // namespace emo_kernels::cuda

int main() {
  using namespace emo_kernels::cuda;
  const std::pair<Fault, const char*> faults[] = {
      {Fault::kNone, ""},
      {Fault::kReadsUnwritten, "faulty reads shared memory that is not written"},
      {Fault::kReadsTooEarly, "faulty reads what another thread wrote with no barrier between"},
      {Fault::kLanesReadTooEarly, "faulty reads what another thread wrote with no barrier between"},
      {Fault::kOverwritesTooEarly,
       "faulty overwrites what another thread uses with no barrier between"},
      {Fault::kReadsCopyUnderWay, "faulty reads shared memory that is not written"},
      {Fault::kReadsOutside, "faulty reads outside its operands"},
      {Fault::kWritesOutside, "faulty writes outside its results"},
      {Fault::kWritesTwice, "faulty writes an element twice"},
      {Fault::kLeavesOut, "faulty leaves an element unwritten"},
      {Fault::kMisaligned, "faulty writes outside its results"},
  };
  int missed = 0;
  for (const auto& [fault, expected] : faults) {
    const std::string found = fault_found(fault);
    if (found == expected) continue;
    std::printf("fault %d: expected '%s', got '%s'\n", static_cast<int>(fault), expected,
                found.c_str());
    ++missed;
  }
  return missed;
}
