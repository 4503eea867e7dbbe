#include "map_memory.h"

#include <cstdlib>
#include <iterator>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#define EMO_HAS_MMAP 1
#endif

namespace emo_kernels::python {
namespace {

constexpr int64_t kPage = 4096, kLargePage = int64_t{2} << 20;
constexpr int64_t kSmall = 32 << 10;  // bytes below which malloc asks for no new pages

int64_t rounded(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

// What a map takes: whole pages, at least one.
int64_t taken(int64_t bytes) { return rounded(bytes > 0 ? bytes : 1, kPage); }

struct Range {
  char* base;
  int64_t bytes;
};

Range reserve() {
#if defined(EMO_HAS_MMAP) && defined(MAP_NORESERVE)
  const int64_t bytes =
      rounded(int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE), kLargePage);
  void* const found = mmap(nullptr, static_cast<size_t>(bytes + kLargePage), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return {nullptr, 0};
  const auto address = static_cast<int64_t>(reinterpret_cast<intptr_t>(found));
  char* const base = static_cast<char*>(found) + (rounded(address, kLargePage) - address);
#if defined(MADV_HUGEPAGE)
  madvise(base, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  return {base, bytes};
#else
  return {nullptr, 0};
#endif
}

}  // namespace

MapMemory::MapMemory() {
  const Range range = reserve();
  base_ = range.base;
  reserved_ = range.bytes;
  if (reserved_ > 0) idle_[0] = reserved_;
}

void* MapMemory::take(int64_t bytes) {
  if (const int64_t size = taken(bytes); bytes >= kSmall) {
    const std::lock_guard lock(mutex_);
    for (auto gap = idle_.begin(); gap != idle_.end(); ++gap) {
      const auto [begin, length] = *gap;
      if (length < size) continue;
      const auto next = idle_.erase(gap);
      if (length > size) idle_.emplace_hint(next, begin + size, length - size);
      return base_ + begin;
    }
  }
  void* const data =
      std::aligned_alloc(64, static_cast<size_t>(rounded(bytes > 0 ? bytes : 1, 64)));
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void MapMemory::give(void* data, int64_t bytes) {
  if (data < base_ || data >= base_ + reserved_) return std::free(data);
  const std::lock_guard lock(mutex_);
  int64_t begin = static_cast<char*>(data) - base_, end = begin + taken(bytes);
  auto above = idle_.lower_bound(begin);
  if (above != idle_.end() && above->first == end) {
    end += above->second;
    above = idle_.erase(above);
  }
  if (above != idle_.begin()) {
    const auto below = std::prev(above);
    if (below->first + below->second == begin) {
      below->second = end - below->first;
      return;
    }
  }
  idle_.emplace_hint(above, begin, end - begin);
}

void MapMemory::clear() {
#if defined(EMO_HAS_MMAP)
  const std::lock_guard lock(mutex_);
  for (const auto& [begin, length] : idle_) {
    madvise(base_ + begin, static_cast<size_t>(length), MADV_DONTNEED);
  }
#endif
}

// Never destroyed: maps may outlive the module.
MapMemory& map_memory() {
  static auto* const memory = [] {
    auto* const made = new MapMemory;
#if defined(EMO_HAS_MMAP)
    // A child forked while another thread takes memory finds it whole and unlocked.
    pthread_atfork([] { map_memory().hold(); }, [] { map_memory().let_go(); },
                   [] { map_memory().let_go(); });
#endif
    return made;
  }();
  return *memory;
}

}  // namespace emo_kernels::python
