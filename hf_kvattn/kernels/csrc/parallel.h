// Threads: one OpenMP team of the size PyTorch is set to. PyTorch has loaded its OpenMP runtime before this library is
// loaded, under the same name, so that both share one pool. Two pools of spinning threads would halve the speed.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

// Calls f(thread, count) on each thread of a team of at most `threads`.
template <typename F>
void parallel(int threads, F f) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    f(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  (void)threads;
  f(0, 1);
}

}  // namespace
