/* io_exercise.c - the I/O engines under sanitizers: many threads submit and poll one io, with faults injected.
 *
 * io_exercise FILE SEED: FILE's bytes follow pattern(), see there. Prints nothing and returns 0 when all is well. */
#define _GNU_SOURCE
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FILE_SIZE = 1 << 20, ROOM = 32 << 10, N_THREADS = 4, READS = 400, DEPTH = 16, BUFFERS = 64 };

static uint8_t pattern(uint64_t offset) {
    return (uint8_t)(offset * 167 + (offset >> 8) * 13 + (offset >> 16));
}

#define CHECK(condition, ...)                                       \
    do {                                                            \
        if (!(condition)) {                                         \
            fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);         \
            fprintf(stderr, __VA_ARGS__);                           \
            fprintf(stderr, "\n");                                  \
            exit(1);                                                \
        }                                                           \
    } while (0)

/* One wanted range; whoever collects it checks it and hands the buffer to the next. */
struct job {
    uint64_t offset;
    uint32_t size;
    char *dst;
    atomic_bool free;
};

struct shared {
    struct io *io;
    unsigned seed;
    struct job jobs[BUFFERS];
    atomic_int started, good, bad;
};

static void check(struct shared *s, const struct io_done *done) {
    struct job *job = &s->jobs[done->tag];
    const bool past = job->offset + job->size > FILE_SIZE;
    if (done->error == 0) {
        CHECK(!past && done->offset == job->offset, "a range past the end was read");
        const uint8_t *got = (const uint8_t *)job->dst + job->offset % io_align(s->io);
        for (uint32_t i = 0; i < job->size; i++)
            CHECK(got[i] == pattern(job->offset + i), "wrong byte at %llu", (unsigned long long)job->offset + i);
        atomic_fetch_add(&s->good, 1);
    } else {
        CHECK(done->error == ENODATA || done->error == EIO, "error %d", done->error); /* the two that are injected */
        atomic_fetch_add(&s->bad, 1);
    }
    atomic_store(&job->free, true);
}

/* Submits its share of reads into whichever buffers are free, and collects anybody's. */
static void *work(void *arg) {
    struct shared *s = arg;
    unsigned seed = s->seed * N_THREADS + (unsigned)atomic_fetch_add(&s->started, 1);
    struct io_done done[8];
    for (int left = READS; left > 0;) {
        const int i = rand_r(&seed) % BUFFERS;
        struct job *job = &s->jobs[i];
        bool yes = true;
        if (atomic_compare_exchange_strong(&job->free, &yes, false)) {
            job->offset = (uint64_t)rand_r(&seed) % (FILE_SIZE + 100);
            job->size = (uint32_t)rand_r(&seed) % (ROOM - 2 * 4096);
            if (rand_r(&seed) % 8 != 0 && job->offset + job->size > FILE_SIZE) job->offset = 0;
            const struct io_read read = {0, job->offset, job->size, job->dst, (uint64_t)i};
            if (rand_r(&seed) % 32 == 0) {
                const int error[] = {EIO, EINTR, EAGAIN};
                io_inject(s->io, rand_r(&seed) % 4, error[rand_r(&seed) % 3], (uint32_t)rand_r(&seed) % 2 * 77);
            }
            const int taken = io_submit(s->io, &read, 1);
            left -= taken;
            if (taken == 0) atomic_store(&job->free, true);
        }
        const int n = io_poll(s->io, done, 8, rand_r(&seed) % 8 == 0);
        for (int k = 0; k < n; k++) check(s, &done[k]);
    }
    return NULL;
}

static void stress(int fd, enum io_engine engine, bool buffered, unsigned seed, char *memory) {
    char err[256] = "";
    static struct shared s;
    memset(&s, 0, sizeof s);
    s.seed = seed;
    const struct io_options options = {engine, DEPTH, buffered};
    s.io = io_open(&fd, 1, &options, err, sizeof err);
    CHECK(s.io != NULL, "%s", err);
    for (int i = 0; i < BUFFERS; i++) {
        s.jobs[i].dst = memory + (size_t)i * ROOM;
        atomic_init(&s.jobs[i].free, true);
    }
    if (seed % 2 == 1) io_register(s.io, memory, (size_t)BUFFERS * ROOM / 2);
    pthread_t threads[N_THREADS];
    for (int i = 0; i < N_THREADS; i++) CHECK(pthread_create(&threads[i], NULL, work, &s) == 0, "no thread");
    for (int i = 0; i < N_THREADS; i++) pthread_join(threads[i], NULL);
    struct io_done done[8];
    for (int n; (n = io_poll(s.io, done, 8, true)) > 0;)
        for (int k = 0; k < n; k++) check(&s, &done[k]);
    CHECK(io_in_flight(s.io) == 0, "still in flight");
    CHECK(s.good + s.bad == N_THREADS * READS && s.bad > 0, "%d good, %d bad", s.good, s.bad);
    io_close(s.io);
}

/* io_close waits for what nobody has collected; bad arguments come back as completions. */
static void edges(int fd, enum io_engine engine, char *memory) {
    char err[256] = "";
    struct io *io = io_open(&fd, 1, &(struct io_options){engine, 4, false}, err, sizeof err);
    CHECK(io != NULL, "%s", err);
    const struct io_read bad[] = {{7, 0, 10, memory, 1}, {0, UINT64_MAX - 5, 10, memory, 2}, {0, 0, 0, memory, 3}};
    struct io_done done[4];
    CHECK(io_submit(io, bad, 3) == 3, "not taken");
    for (int left = 3; left > 0;) {
        const int n = io_poll(io, done, 4, true);
        CHECK(n > 0, "lost");
        for (int i = 0; i < n; i++) {
            const int expected[] = {EBADF, EINVAL, 0};
            CHECK(done[i].error == expected[done[i].tag - 1], "tag %d: %d", (int)done[i].tag, done[i].error);
        }
        left -= n;
    }
    struct io_cost cost;
    CHECK(io_measure(io, 0, FILE_SIZE, 0.02, &cost, err, sizeof err) == 0 && cost.bandwidth > 0, "%s", err);
    const struct io_read late = {0, 0, ROOM, memory, 0};
    CHECK(io_submit(io, &late, 1) == 1, "not taken");
    io_close(io);
}

int main(int argc, char **argv) {
    CHECK(argc == 3, "usage: io_exercise FILE SEED");
    const int fd = open(argv[1], O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0, "%s: %s", argv[1], strerror(errno));
    void *memory;
    CHECK(posix_memalign(&memory, 4096, (size_t)BUFFERS * ROOM) == 0, "out of memory");
    const unsigned seed = (unsigned)atoi(argv[2]);
    const enum io_engine engines[] = {IO_AUTO, IO_THREADS};
    for (int i = 0; i < 2; i++) {
        stress(fd, engines[i], false, seed, memory);
        stress(fd, engines[i], true, seed + 1, memory);
        edges(fd, engines[i], memory);
    }
    free(memory);
    close(fd);
    return 0;
}
