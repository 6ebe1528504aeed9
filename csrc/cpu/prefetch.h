// Software prefetch of what the next tile needs, a few lines at a time from inside the microkernel:
// without it the time of memory adds to the time of arithmetic instead of hiding behind it.
#pragma once

#include "simd.h"

namespace densenet_fast::cpu {
namespace {

class PrefetchStream {
 public:
  // `rows` rows of `row_bytes`, `pitch_bytes` apart, in each of `slices`, `slice_bytes` apart.
  void add(const void* data, int64_t row_bytes, int64_t pitch_bytes, int64_t rows, bool for_write,
           int64_t slices = 1, int64_t slice_bytes = 0) {
    if (rows <= 0 || row_bytes <= 0 || count_ == kMaxRanges) return;
    const int64_t lines = (row_bytes + kCacheLine - 1) / kCacheLine;
    ranges_[count_++] = {
        static_cast<const char*>(data),  pitch_bytes, lines, rows, for_write, rows, slices,
        slice_bytes - rows * pitch_bytes};
    total_ += lines * rows * slices;
  }

  // Spreads all lines evenly over `steps` calls of issue().
  void start(int64_t steps) {
    per_step_ = steps > 0 ? static_cast<int>((total_ + steps - 1) / steps) : 0;
    range_ = 0;
    line_ = 0;
  }

  void clear() {
    count_ = 0;
    total_ = 0;
    per_step_ = 0;
    range_ = 0;
    line_ = 0;
  }

  void issue() {
    for (int i = 0; i < per_step_; ++i) {
      if (range_ == count_) return;
      Range& r = ranges_[range_];
      const char* p = r.data + line_ * kCacheLine;
      if (r.for_write) {
        prefetch_write(p);
      } else {
        prefetch_read(p);
      }
      if (++line_ == r.lines) {
        line_ = 0;
        r.data += r.pitch;
        if (--r.left == 0) {
          r.left = r.rows;
          r.data += r.to_next_slice;
          if (--r.slices == 0) ++range_;
        }
      }
    }
  }

 private:
  static constexpr int kMaxRanges = 6;
  struct Range {
    const char* data;
    int64_t pitch;
    int64_t lines;
    int64_t rows;
    bool for_write;
    int64_t left;  // rows of this slice
    int64_t slices, to_next_slice;
  };
  Range ranges_[kMaxRanges];
  int count_ = 0;
  int range_ = 0;
  int per_step_ = 0;
  int64_t line_ = 0;
  int64_t total_ = 0;
};

}  // namespace
}  // namespace densenet_fast::cpu
