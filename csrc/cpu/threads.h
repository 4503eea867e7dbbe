// One team of threads for one call: torch's OpenMP runtime, never a second one.
#pragma once

#include <cstdint>

namespace emo_kernels::cpu {

// Runs body(context, thread, threads) on `threads` threads (fewer where the runtime gives fewer),
// serially in a forked child, whose OpenMP team died with the fork. The body must not throw.
void run_team(int threads, void (*body)(void* context, int thread, int threads), void* context);

// Inside a body: waits for the whole team.
void team_barrier();

// A buffer of the calling thread, 64-byte aligned, kept for its next call; contents undefined.
void* thread_scratch(int64_t bytes);

}  // namespace emo_kernels::cpu
