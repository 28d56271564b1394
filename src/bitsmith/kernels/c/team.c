/* Threads: those that the process already has. torch's own OpenMP team is found by name and shared, so that two
   teams do not fight for the cores; without one, plain threads are started for the call. */
#define _GNU_SOURCE
#include "kernels.h"
#include <dlfcn.h>
#include <pthread.h>

enum { MOST_THREADS = 256 };

typedef void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
    void (*work)(void *);
    void *data;
} job;

static void *run(void *data) {
    job *j = data;
    j->work(j->data);
    return NULL;
}

int64_t draw(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

/* Runs work(data) in up to `threads` threads at once, the caller's among them; they share tasks by `draw`. */
void team(void (*work)(void *), void *data, int64_t threads) {
    if (threads <= 1) {
        work(data);
        return;
    }
    parallel openmp = (parallel)(uintptr_t)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    if (openmp) {
        openmp(work, data, (unsigned)threads, 0);
        return;
    }
    job j = {work, data};
    pthread_t others[MOST_THREADS];
    int started = 0;
    while (started < minimum(threads - 1, MOST_THREADS) && !pthread_create(&others[started], NULL, run, &j))
        started++;
    work(data);
    while (started)
        pthread_join(others[--started], NULL);
}
