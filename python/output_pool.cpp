#include "output_pool.h"

#include <cstdlib>
#include <new>

namespace emo_kernels::python {
namespace {

constexpr int64_t kMostIdleBytes = int64_t{64} << 20;

}  // namespace

void* OutputPool::take(int64_t bytes) {
  if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {
    for (auto idle = idle_.rbegin(); idle != idle_.rend(); ++idle) {
      if (idle->bytes != bytes) continue;
      void* const data = idle->data;
      idle_.erase(std::next(idle).base());
      idle_bytes_ -= bytes;
      return data;
    }
  }
  void* const data = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void OutputPool::give(void* data, int64_t bytes) {
  if (const std::unique_lock lock(mutex_, std::try_to_lock); lock && bytes <= kMostIdleBytes) {
    idle_.push_back({data, bytes});
    idle_bytes_ += bytes;
    size_t oldest = 0;
    for (; idle_bytes_ > kMostIdleBytes; ++oldest) {
      std::free(idle_[oldest].data);
      idle_bytes_ -= idle_[oldest].bytes;
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<int64_t>(oldest));
    return;
  }
  std::free(data);
}

void OutputPool::clear() {
  const std::lock_guard lock(mutex_);
  for (const Idle& idle : idle_) std::free(idle.data);
  idle_.clear();
  idle_bytes_ = 0;
}

// Never destroyed: results may outlive the module.
OutputPool& output_pool() {
  static auto* const pool = new OutputPool;
  return *pool;
}

}  // namespace emo_kernels::python
