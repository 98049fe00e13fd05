/* io_threads.c - the engine for where io_uring is refused: threads that sleep until there is something to pread. */
#define _GNU_SOURCE
#include "io_engine.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    MAX_THREADS = 32,      /* more only cost switches; reads beyond wait in the queue */
    STACK_SIZE = 256 << 10, /* address space, of which a page or two is touched */
};

struct io_pool {
    struct io *io;
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    struct io_queue wanted;   /* under lock */
    struct io_queue finished; /* pushed under lock, popped under collect_lock */
    int idle;                 /* threads asleep on work */
    bool waiting;             /* somebody sleeps on done */
    bool stop;
    int n_threads;
    pthread_t threads[MAX_THREADS];
};

static void read_slot(struct io *io, struct io_slot *slot) {
    const int fd = io->files[slot->read.file].fd;
    int64_t result;
    do {
        uint64_t offset;
        void *dst;
        const uint32_t size = io_slot_next(slot, &offset, &dst);
        result = pread(fd, dst, size, (off_t)offset);
        if (result < 0) result = -errno;
    } while (!io_slot_advance(io, slot, result));
}

static void *worker(void *arg) {
    struct io_pool *pool = arg;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        uint32_t index;
        if (io_queue_pop(&pool->wanted, &index)) {
            pthread_mutex_unlock(&pool->lock);
            read_slot(pool->io, &pool->io->slots[index]);
            pthread_mutex_lock(&pool->lock);
            io_queue_push(&pool->finished, index);
            if (pool->waiting) pthread_cond_signal(&pool->done);
        } else if (pool->stop) {
            break;
        } else {
            pool->idle++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

void io_threads_send(struct io *io, const uint32_t *slots, int n) {
    struct io_pool *pool = io->pool;
    pthread_mutex_lock(&pool->lock);
    for (int i = 0; i < n; i++) io_queue_push(&pool->wanted, slots[i]);
    for (int i = 0; i < n && i < pool->idle; i++) pthread_cond_signal(&pool->work);
    pthread_mutex_unlock(&pool->lock);
}

int io_threads_collect(struct io *io, struct io_done *done, int max) {
    int n = 0;
    for (uint32_t index; n < max && io_queue_pop(&io->pool->finished, &index);) io_slot_finish(io, index, &done[n++]);
    return n;
}

void io_threads_sleep(struct io *io) {
    struct io_pool *pool = io->pool;
    pthread_mutex_lock(&pool->lock);
    pool->waiting = true;
    while (io_queue_empty(&pool->finished)) pthread_cond_wait(&pool->done, &pool->lock);
    pool->waiting = false;
    pthread_mutex_unlock(&pool->lock);
}

/* Starts as many threads as the system gives, up to n; they take no signals, those are the host's. Returns why there
 * are not n, or 0. */
static int start_threads(struct io_pool *pool, int n) {
    pthread_attr_t attributes;
    sigset_t all, before;
    int error = pthread_attr_init(&attributes);
    if (error != 0) return error;
    pthread_attr_setstacksize(&attributes, STACK_SIZE);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (pool->n_threads < n && error == 0) {
        error = pthread_create(&pool->threads[pool->n_threads], &attributes, worker, pool);
        if (error == 0) pool->n_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

int io_threads_start(struct io *io, char *err, size_t err_len) {
    struct io_pool *pool = io->pool = calloc(1, sizeof *pool);
    if (pool == NULL) {
        snprintf(err, err_len, "out of memory for the reading threads");
        return -1;
    }
    pool->io = io;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    io->ready_head = &pool->finished.head;
    io->ready_tail = &pool->finished.tail;
    if (io_queue_init(&pool->wanted, io->depth) != 0 || io_queue_init(&pool->finished, io->depth) != 0) {
        snprintf(err, err_len, "out of memory for the reading threads");
        return -1;
    }
    const int error = start_threads(pool, io->depth < MAX_THREADS ? io->depth : MAX_THREADS);
    if (pool->n_threads == 0) { /* fewer than wanted will do */
        snprintf(err, err_len, "no thread can be started to read with: %s", strerror(error));
        return -1;
    }
    return 0;
}

void io_threads_stop(struct io *io) {
    struct io_pool *pool = io->pool;
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (int i = 0; i < pool->n_threads; i++) pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    io_queue_free(&pool->wanted);
    io_queue_free(&pool->finished);
    free(pool);
    io->pool = NULL;
}
