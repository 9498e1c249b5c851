// Work shared by the threads of XLA's own pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace dancemoe {

// body(task) for each task, by this thread and as many of the pool as are free; returns when all are done.
//
// Finished tasks are counted, not helpers. With several devices in one process all threads of the pool may be inside calls
// like this one, and waiting for a helper that has not started could be for ever. A helper that starts too late finds no
// task left and touches only what it shares the ownership of.
template <class Body>
void parallel(xla::ffi::ThreadPool& pool, int64_t tasks, Body&& body) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), tasks) - 1;
  if (helpers <= 0) {
    for (int64_t task = 0; task < tasks; task++) body(task);
    return;
  }
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, tasks, &body] {
    for (int64_t task; (task = progress->next.fetch_add(1)) < tasks;) {
      body(task);
      if (progress->done.fetch_add(1) + 1 == tasks) {
        std::lock_guard<std::mutex> lock(progress->mutex);
        progress->all_done.notify_all();
      }
    }
  };
  for (int64_t i = 0; i < helpers; i++) {
    auto helper = work;
    pool.Schedule(std::move(helper));
  }
  work();
  // The last tasks of others are about to end: sleeping at once would cost more than they take.
  for (int i = 0; i < 2000 && progress->done.load() != tasks; i++) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  if (progress->done.load() == tasks) return;
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done.load() == tasks; });
}

}  // namespace dancemoe
