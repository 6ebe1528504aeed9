// Mean and variance per channel as (count, mean, M2), merged in a fixed order with the formula of
// Chan, Golub and LeVeque (1983): no sum of squares, so no cancellation where |mean| >> std.
#pragma once

#include "blocking.h"

namespace densenet_fast::cpu {
namespace {

// Partial statistics of one task: mean and M2 of `columns` channels, padded to whole vectors.
template <class T>
struct PartialStatistics {
  int64_t* count;
  T* mean;
  T* m2;
};

// Adds `segments` runs of `rows` rows (runs `segment_pitch` apart) to a partial result.
template <class T, class S>
void accumulate_statistics(const S* data, int64_t pitch, int64_t rows, int64_t segments,
                           int64_t segment_pitch, int64_t columns, PartialStatistics<T> into) {
  constexpr int L = kLanes<T>;
  const int64_t added = rows * segments;
  if (added == 0) return;
  const int64_t before = *into.count;
  const int64_t total = before + added;
  const T inverse = T(1) / static_cast<T>(added);
  const T weight_new = static_cast<T>(static_cast<double>(added) / static_cast<double>(total));
  const T weight_m2 = static_cast<T>(static_cast<double>(before) * static_cast<double>(added) /
                                     static_cast<double>(total));
  for (int64_t c = 0; c < columns; c += L) {
    const int64_t n = columns - c;
    const S* p = data + c;
    Vec<T> sum = zero<T>();
    for (int64_t s = 0; s < segments; ++s) {
      for (int64_t r = 0; r < rows; ++r) {
        sum += load_upto<T>(p + s * segment_pitch + r * pitch, n);
      }
    }
    const Vec<T> mean = sum * splat<T>(inverse);
    Vec<T> m2 = zero<T>();
    for (int64_t s = 0; s < segments; ++s) {
      for (int64_t r = 0; r < rows; ++r) {
        const Vec<T> d = load_upto<T>(p + s * segment_pitch + r * pitch, n) - mean;
        m2 = fma<T>(d, d, m2);
      }
    }
    if (before == 0) {
      store<T>(into.mean + c, mean);
      store<T>(into.m2 + c, m2);
    } else {
      const Vec<T> old_mean = load<T>(into.mean + c);
      const Vec<T> delta = mean - old_mean;
      store<T>(into.mean + c, fma<T>(delta, splat<T>(weight_new), old_mean));
      store<T>(into.m2 + c, load<T>(into.m2 + c) + fma<T>(delta * delta, splat<T>(weight_m2), m2));
    }
  }
  *into.count = total;
}

// The partial statistics of all tasks of one operator call.
template <class T>
class TaskStatistics {
 public:
  // `groups`: tasks that share rows, each with columns of its own.
  TaskStatistics(int64_t tasks, int64_t columns, int64_t groups = 1)
      : tasks_(tasks),
        columns_(columns),
        groups_(groups),
        width_(padded<T>(columns)),
        counts_(tasks * groups),
        values_(2 * tasks * width_) {
    for (int64_t i = 0; i < tasks * groups; ++i) counts_.get()[i] = 0;
  }

  // From a group's first column on.
  PartialStatistics<T> of(int64_t task, int64_t group = 0, int64_t column = 0) const {
    T* mean = values_.get() + 2 * task * width_ + column;
    return {counts_.get() + task * groups_ + group, mean, mean + width_};
  }

  // Merges in task order, in double whatever T is.
  void finish(Statistics<T> out) const {
    CallMemory<double> merged(2 * columns_);
    double* mean = merged.get();
    double* m2 = mean + columns_;
    for (int64_t c = 0; c < columns_; ++c) mean[c] = m2[c] = 0;
    double count = 0;
    for (int64_t i = 0; i < tasks_; ++i) {
      const double added = static_cast<double>(counts_.get()[i * groups_]);
      if (added == 0) continue;
      const PartialStatistics<T> part = of(i);
      const double share = added / (count + added);
      const double weight = count * share;
      for (int64_t c = 0; c < columns_; ++c) {
        const double delta = static_cast<double>(part.mean[c]) - mean[c];
        mean[c] += delta * share;
        m2[c] += static_cast<double>(part.m2[c]) + delta * delta * weight;
      }
      count += added;
    }
    for (int64_t c = 0; c < columns_; ++c) {
      out.mean[c] = static_cast<T>(mean[c]);
      out.var[c] = static_cast<T>(m2[c] / count);
    }
  }

 private:
  int64_t tasks_, columns_, groups_, width_;
  CallMemory<int64_t> counts_;
  CallMemory<T> values_;
};

constexpr int64_t kMostTasks = 64;  // of an operator that has statistics to merge

template <class S>
void channel_statistics(Image<const S> features, Statistics<Compute<S>> statistics) {
  using T = Compute<S>;
  constexpr int64_t kTile = 32;
  const EqualParts tasks(features.rows(), kMostTasks, kTile);
  TaskStatistics<T> partial(tasks.count, features.c);
  for_each_task(tasks.count, [&](int64_t task) {
    const int64_t end = tasks.end(task);
    for (int64_t r = tasks.begin(task); r < end; r += kTile) {
      accumulate_statistics<T>(features.data + r * features.pitch, features.pitch,
                               smaller(kTile, end - r), 1, 0, features.c, partial.of(task));
    }
  });
  partial.finish(statistics);
}

}  // namespace
}  // namespace densenet_fast::cpu
