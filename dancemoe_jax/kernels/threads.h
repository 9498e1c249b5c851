// Work shared by the threads of XLA's own pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace dancemoe {

// Lets the processor rest for some cycles.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

using Clock = std::chrono::steady_clock;

// Helpers that have just finished, and wait a moment for the next call's work before they go back to the pool: waking a
// thread takes as long as reading a megabyte.
class WaitingHelpers {
 public:
  // Gives work to one that waits; false where none does.
  bool hand_over(const std::function<void()>& work) {
    if (count_.load(std::memory_order_relaxed) <= 0) return false;
    for (auto& place : places_) {
      Seat* seat = place.load(std::memory_order_relaxed) == nullptr ? nullptr : place.exchange(nullptr);
      if (seat == nullptr) continue;
      seat->work.store(new std::function<void()>(work));
      return true;
    }
    return false;
  }

  // Does `work`, and what is handed over after it. A helper waits no longer than it has just worked: waiting can cost
  // others, whose cores these are too, no more than that.
  void help(std::function<void()> work) {
    for (bool more = true; more;) {
      const auto begin = Clock::now();
      work();
      more = next(std::min<Clock::duration>(Clock::now() - begin, kLongest), &work);
    }
  }

 private:
  static constexpr std::chrono::microseconds kLongest{100};
  struct Seat {
    std::atomic<std::function<void()>*> work{nullptr};
  };

  bool next(Clock::duration longest, std::function<void()>* work) {
    Seat own;
    std::atomic<Seat*>* taken = nullptr;
    for (auto& place : places_) {
      Seat* nobody = nullptr;
      if (!place.compare_exchange_strong(nobody, &own)) continue;
      taken = &place;
      break;
    }
    if (taken == nullptr) return false;
    count_.fetch_add(1);
    const auto end = Clock::now() + longest;
    bool leaving = false;
    while (own.work.load() == nullptr) {
      for (int i = 0; i < 8; i++) pause();
      if (leaving || Clock::now() < end) continue;
      // Whoever empties the place first decides: where that is a caller, its work is about to come.
      Seat* self = &own;
      if (taken->compare_exchange_strong(self, nullptr)) break;
      leaving = true;
    }
    count_.fetch_sub(1);
    const std::unique_ptr<std::function<void()>> given(own.work.load());
    if (given == nullptr) return false;
    *work = std::move(*given);
    return true;
  }

  std::atomic<Seat*> places_[64] = {};
  std::atomic<int> count_{0};
};

inline WaitingHelpers waiting_helpers;

// Tasks begin to end that nobody has taken yet. Their owner takes them from the front and so reads memory in order; who has
// none left takes from the back.
class Share {
 public:
  void set(uint32_t begin, uint32_t end) { both_.store((uint64_t)begin << 32 | end); }
  // A task, or -1.
  int64_t take(bool front) {
    for (uint64_t both = both_.load();;) {
      const uint32_t begin = both >> 32, end = (uint32_t)both;
      if (begin >= end) return -1;
      const uint64_t rest = front ? (uint64_t)(begin + 1) << 32 | end : (uint64_t)begin << 32 | (end - 1);
      if (both_.compare_exchange_weak(both, rest)) return front ? begin : end - 1;
    }
  }

 private:
  alignas(64) std::atomic<uint64_t> both_{0};
};

constexpr size_t kAlways = std::numeric_limits<size_t>::max();
constexpr size_t kWorthAHelper = 128 << 10;  // bytes of each helper: reading less takes no longer than calling for it

// body(task) for each task, by this thread and as many of the pool as are free; returns when all are done. `bytes` is about
// how much memory all of them read.
//
// Finished tasks are counted, not helpers. With several devices in one process all threads of the pool may be inside calls
// like this one, and waiting for a helper that has not started could be for ever. A helper that starts too late finds no
// task left and touches only what it shares the ownership of.
template <class Body>
void parallel(xla::ffi::ThreadPool& pool, int64_t tasks, Body&& body, size_t bytes = kAlways) {
  const size_t worth = bytes == kAlways ? tasks : bytes / kWorthAHelper;
  const int64_t sharing = std::min<size_t>({(size_t)pool.num_threads(), (size_t)tasks, worth});
  if (sharing <= 1) {
    for (int64_t task = 0; task < tasks; task++) body(task);
    return;
  }
  struct Progress {
    explicit Progress(int64_t count) : shares(count) {}
    std::vector<Share> shares;
    std::atomic<int64_t> joined{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t task_for(size_t own) {
      int64_t task = shares[own].take(true);
      for (size_t other = 1; task < 0 && other < shares.size(); other++)
        task = shares[(own + other) % shares.size()].take(false);
      return task;
    }
  };
  auto progress = std::make_shared<Progress>(sharing);
  for (int64_t i = 0; i < sharing; i++) progress->shares[i].set(tasks * i / sharing, tasks * (i + 1) / sharing);
  const std::function<void()> work = [progress, tasks, &body] {
    const size_t own = progress->joined.fetch_add(1);
    for (int64_t task; (task = progress->task_for(own)) >= 0;) {
      body(task);
      if (progress->done.fetch_add(1) + 1 == tasks) {
        std::lock_guard<std::mutex> lock(progress->mutex);
        progress->all_done.notify_all();
      }
    }
  };
  for (int64_t i = 1; i < sharing; i++)
    if (!waiting_helpers.hand_over(work)) pool.Schedule([work] { waiting_helpers.help(work); });
  work();
  // The last tasks of others are about to end: sleeping at once would cost more than they take.
  for (int i = 0; i < 2000 && progress->done.load() != tasks; i++) pause();
  if (progress->done.load() == tasks) return;
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done.load() == tasks; });
}

}  // namespace dancemoe
