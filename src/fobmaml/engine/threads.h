/* Rows shared out among threads, for fused.c and images.c: by OpenMP where the compiler has it, and by POSIX threads
where it has not, as Apple's. */

#ifndef THREADS_H
#define THREADS_H

#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#else
#include <pthread.h>
#endif

/* ``each`` is called in every thread, of numbers from 0 on, with what ``job`` points to, and takes rows until
``next_row`` gives no more. */
typedef struct Shared {
    void (*each)(struct Shared *shared, int thread);
    const void *job;
    int64_t rows, taken;
} Shared;

/* A row that nobody has taken, or -1. */
static inline int64_t next_row(Shared *shared) {
    int64_t row = __atomic_fetch_add(&shared->taken, 1, __ATOMIC_RELAXED);
    return row < shared->rows ? row : -1;
}

#ifndef _OPENMP
typedef struct {
    Shared *shared;
    int number;
    pthread_t id;
} Thread;

static void *begin(void *thread) {
    Thread *own = thread;
    own->shared->each(own->shared, own->number);
    return NULL;
}
#endif

/* Returns when all rows are done; fewer threads do, where the system does not give so many. */
static void share(void (*each)(Shared *shared, int thread), const void *job, int64_t rows, int threads) {
    Shared shared = {each, job, rows, 0};
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    each(&shared, omp_get_thread_num());
#else
    Thread others[threads];
    int started = 1;
    for (; started < threads; started++) {
        others[started] = (Thread){.shared = &shared, .number = started};
        if (pthread_create(&others[started].id, NULL, begin, others + started)) break;
    }
    each(&shared, 0);
    while (--started) pthread_join(others[started].id, NULL);
#endif
}

#endif
