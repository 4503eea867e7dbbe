#include "cpu/threads.h"

#include <omp.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "emo_kernels.h"

namespace emo_kernels::cpu {
namespace {

constexpr int64_t kAlignment = 64;
std::atomic<int64_t> g_bytes{0};

struct Scratch {
  void* data = nullptr;
  int64_t bytes = 0;

  void release() {
    std::free(data);
    g_bytes -= bytes;
    data = nullptr;
    bytes = 0;
  }
  ~Scratch() { release(); }
};

thread_local Scratch t_scratch;

const pid_t g_loading_process = getpid();

}  // namespace

void run_team(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1 || omp_in_parallel() || getpid() != g_loading_process) {
    body(context, 0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  body(context, omp_get_thread_num(), omp_get_num_threads());
}

void team_barrier() {
#pragma omp barrier
}

void* thread_scratch(int64_t bytes) {
  Scratch& scratch = t_scratch;
  if (scratch.bytes < bytes) {
    scratch.release();
    const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    scratch.data = std::aligned_alloc(kAlignment, static_cast<size_t>(rounded));
    if (scratch.data == nullptr) throw std::bad_alloc();
    scratch.bytes = rounded;
    g_bytes += rounded;
  }
  return scratch.data;
}

int64_t scratch_bytes() { return g_bytes; }

void release_scratch() { t_scratch.release(); }

}  // namespace emo_kernels::cpu
