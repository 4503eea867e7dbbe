// What a walk on the host checks of each access; see walk.h.
#include "cuda/walk.h"

namespace emo_kernels::cuda {
namespace {

// Whether an aligned access lies inside a range.
bool aligned_inside(const void* data, int64_t bytes, uintptr_t begin, int64_t size) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  return address % static_cast<uintptr_t>(bytes) == 0 && address >= begin &&
         address + static_cast<uintptr_t>(bytes) <= begin + static_cast<uintptr_t>(size);
}

}  // namespace

int64_t bytes_of(DType dtype, int64_t count) {
  return count * (dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2);
}

Watch*& watch() {
  thread_local Watch* current = nullptr;
  return current;
}

void note_read(const void* address, int64_t bytes) { watch()->read(address, bytes); }
void note_write(const void* address, int64_t bytes) { watch()->write(address, bytes); }
void note_copy(const void* address, int64_t bytes) { watch()->copy_begins(address, bytes); }
void note_lane(int lane) { watch()->at_lane(lane); }

void Watch::may_read(const Vector& vector, int64_t count) {
  may_read(vector.data, bytes_of(vector.dtype, count));
}

void Watch::add(const void* data, int64_t bytes, bool written) {
  if (data == nullptr) return;
  const std::vector<uint8_t> writes(written ? static_cast<size_t>(bytes) : 0);
  ranges_.push_back({reinterpret_cast<uintptr_t>(data), bytes, written, writes});
}

void Watch::shares(const void* data, int64_t bytes) {
  shared_ = reinterpret_cast<uintptr_t>(data);
  shared_bytes_ = bytes;
  shadows_.resize(static_cast<size_t>((bytes + 1) / 2));
}

bool Watch::is_shared(const void* data, int64_t bytes) const {
  return aligned_inside(data, bytes, shared_, shared_bytes_);
}

template <class Visit>
void Watch::for_shadows(const void* data, int64_t bytes, const Visit& visit) {
  Shadow* const first = shadows_.data() + (reinterpret_cast<uintptr_t>(data) - shared_) / 2;
  for (Shadow* shadow = first; shadow < first + bytes / 2; ++shadow) visit(*shadow);
}

void Watch::read(const void* data, int64_t bytes) {
  if (is_shared(data, bytes)) {
    for_shadows(data, bytes, [&](Shadow& shadow) {
      if (shadow.write_epoch < written_since_) fail("reads shared memory that is not written");
      if (shadow.write_epoch == epoch_ && shadow.writer != thread_) {
        fail("reads what another thread wrote with no barrier between");
      }
      const bool alone = shadow.read_epoch != epoch_ || shadow.reader == thread_;
      shadow.reader = alone ? thread_ : kMany;
      shadow.read_epoch = epoch_;
    });
    return;
  }
  for (const Range& range : ranges_) {
    if (!range.written && aligned_inside(data, bytes, range.begin, range.bytes)) return;
  }
  fail("reads outside its operands");
}

void Watch::write_shared(const void* data, int64_t bytes, uint32_t epoch) {
  for_shadows(data, bytes, [&](Shadow& shadow) {
    const bool written = shadow.write_epoch == epoch_ && shadow.writer != thread_;
    const bool read = shadow.read_epoch == epoch_ && shadow.reader != thread_;
    if (written || read) fail("overwrites what another thread uses with no barrier between");
    shadow.write_epoch = epoch;
    shadow.writer = thread_;
  });
}

void Watch::copy_begins(const void* data, int64_t bytes) {
  if (!is_shared(data, bytes)) fail("copies elsewhere than to shared memory");
  write_shared(data, bytes, 0);
}

void Watch::write(const void* data, int64_t bytes) {
  if (is_shared(data, bytes)) return write_shared(data, bytes, epoch_);
  for (Range& range : ranges_) {
    if (!range.written || !aligned_inside(data, bytes, range.begin, range.bytes)) continue;
    uint8_t* const writes = range.writes.data() + (reinterpret_cast<uintptr_t>(data) - range.begin);
    for (int64_t i = 0; i < bytes; ++i) {
      if (writes[i]++ != 0) fail("writes an element twice");
    }
    return;
  }
  fail("writes outside its results");
}

void Watch::all_is_written() const {
  for (const Range& range : ranges_) {
    for (const uint8_t writes : range.writes) {
      if (writes != 1) fail("leaves an element unwritten");
    }
  }
}

void Watch::fail(const char* what) const { throw std::logic_error(name + " " + what); }

}  // namespace emo_kernels::cuda
