// Memory of results: what a dead result leaves is the next one's, without new pages.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace emo_kernels::python {

// Any thread may give back. Where another holds the lock, and so in a forked child whose parent
// did, memory comes from and goes to the system: nobody waits.
class OutputPool {
 public:
  void* take(int64_t bytes);  // 64-byte aligned; throws std::bad_alloc
  void give(void* data, int64_t bytes);
  void clear();

 private:
  struct Idle {
    void* data;
    int64_t bytes;
  };
  std::mutex mutex_;
  std::vector<Idle> idle_;  // last given last: the warmest
  int64_t idle_bytes_ = 0;
};

OutputPool& output_pool();

}  // namespace emo_kernels::python
