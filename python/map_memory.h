// Memory of maps: what a dead map leaves is the next one's, without new pages.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

namespace emo_kernels::python {

// One range of addresses, as long as the machine's memory; pages come when they are written, in
// 2 MB where the system has them, and stay until clear(). Maps lie as low as they fit, so that no
// more pages are held than the maps alive at one time took. Small ones are malloc's, and all are
// where no such range is to be had or it is full. Any thread may take and give back; so may a
// forked child.
class MapMemory {
 public:
  MapMemory();
  void* take(int64_t bytes);  // 64-byte aligned; throws std::bad_alloc
  void give(void* data, int64_t bytes);
  void clear();                   // gives the pages of dead maps back to the system
  void hold() { mutex_.lock(); }  // around a fork
  void let_go() { mutex_.unlock(); }

 private:
  std::mutex mutex_;
  char* base_ = nullptr;
  int64_t reserved_ = 0;
  std::map<int64_t, int64_t> idle_;  // where a gap begins, and its bytes; gaps never touch
};

MapMemory& map_memory();

// A map of ours for as long as this lives.
class HeldMap {
 public:
  explicit HeldMap(int64_t bytes) : bytes_(bytes), data_(map_memory().take(bytes)) {}
  ~HeldMap() { map_memory().give(data_, bytes_); }
  HeldMap(const HeldMap&) = delete;
  HeldMap& operator=(const HeldMap&) = delete;
  void* data() const { return data_; }

 private:
  int64_t bytes_;
  void* data_;
};

}  // namespace emo_kernels::python
