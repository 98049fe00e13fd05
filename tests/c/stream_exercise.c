/* stream_exercise.c - the store under sanitizers: several threads wait for units that one of them wants, in rounds, with
 * reads that fail, in one file whose stores share a flash.
 *
 * stream_exercise FILE SEED: FILE's bytes follow pattern(), see there. Prints nothing and returns 0 when all is well. */
#define _GNU_SOURCE
#include "store.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FILE_SIZE = 1 << 20, N_THREADS = 3, ROUNDS = 60, MOST = 48 };

static uint8_t pattern(uint64_t offset) {
    return (uint8_t)(offset * 167 + (offset >> 8) * 13 + (offset >> 16));
}

#define CHECK(condition, ...)                           \
    do {                                                \
        if (!(condition)) {                             \
            fprintf(stderr, "line %d: ", __LINE__);     \
            fprintf(stderr, __VA_ARGS__);               \
            fprintf(stderr, "\n");                      \
            exit(1);                                    \
        }                                               \
    } while (0)

static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13, *state ^= *state >> 7, *state ^= *state << 17; /* xorshift64 */
    return *state >> 11;
}

/* What the threads of a round share. */
struct round {
    struct store *store;
    const int32_t *units;
    int n;
    atomic_int next, failed;
};

/* Takes units one by one, waits for each and looks at its bytes. */
static void *consume(void *argument) {
    struct round *r = argument;
    for (int i; (i = atomic_fetch_add(&r->next, 1)) < r->n;) {
        const uint32_t unit = (uint32_t)r->units[i];
        if (store_wait(r->store, unit) != 0) {
            atomic_fetch_add(&r->failed, 1);
            continue;
        }
        const struct store_spec *spec = &r->store->spec;
        const uint8_t *bytes = store_unit(r->store, unit);
        for (uint64_t k = 0; k < spec->unit_size; k++)
            CHECK(bytes[k] == pattern(spec->offset + unit * spec->unit_size + k), "a wrong byte in unit %u", unit);
        store_release(r->store, unit);
    }
    return NULL;
}

/* Different units in ascending order, at most n_slots / 2 of them. */
static int choose(const struct store *s, int32_t *units, uint64_t *state) {
    const int most = (int)(s->spec.n_slots / 2 > MOST ? MOST : s->spec.n_slots / 2);
    const int want = 1 + (int)(next_random(state) % (uint64_t)(most > 0 ? most : 1));
    int32_t unit = (int32_t)(next_random(state) % s->spec.n_units);
    int n = 0;
    while (n < want && unit < (int32_t)s->spec.n_units) {
        units[n++] = unit;
        unit += 1 + (int32_t)(next_random(state) % 4);
    }
    return n;
}

static void run_round(struct store *s, uint64_t *state, bool faults) {
    int32_t units[MOST], ahead[MOST];
    struct round r = {.store = s, .units = units, .n = choose(s, units, state)};
    const bool fault = faults && next_random(state) % 4 == 0;
    if (fault) io_inject(flash_io(s->flash), (int64_t)(next_random(state) % 4), EIO, 0);
    store_begin(s);
    for (int got = 0; got < r.n;) {
        const int n = store_want(s, units + got, r.n - got, false);
        got += n;
        store_flush(s);
        if (n > 0 || got == r.n || flash_wait(s->flash, flash_generation(s->flash))) continue;
        store_begin(s); /* what was read ahead for this round keeps its slots: a new one forgets that */
        got = 0;
    }
    pthread_t threads[N_THREADS];
    for (int t = 0; t < N_THREADS; t++) CHECK(pthread_create(&threads[t], NULL, consume, &r) == 0, "no thread");
    if (store_pays(s)) {
        const int n = choose(s, ahead, state);
        (void)store_want(s, ahead, n, true);
        store_flush(s);
    }
    for (int t = 0; t < N_THREADS; t++) pthread_join(threads[t], NULL);
    int file;
    uint64_t offset;
    const int error = flash_error(s->flash, &file, &offset);
    CHECK(error == 0 || (error == EIO && faults && offset < FILE_SIZE), "error %d", error);
    CHECK(atomic_load(&r.failed) == 0 || error == EIO, "%d units failed without a reason", r.failed);
    io_inject(flash_io(s->flash), -1, 0, 0);
}

static void exercise(int fd, enum io_engine engine, uint64_t unit_size, uint32_t n_slots, uint32_t n_pinned, bool faults,
                     uint64_t *state) {
    char err[256];
    const struct flash_options options = {.engine = engine, .depth = 8, .gap = 2048, .run = 16384};
    struct flash *flash = flash_open(&fd, 1, &options, err, sizeof err);
    if (flash == NULL && engine == IO_URING) return; /* refused here */
    CHECK(flash != NULL, "%s", err);
    struct store *stores[2];
    for (int i = 0; i < 2; i++) {
        const uint64_t offset = 1000 + (uint64_t)i * 77;
        const struct store_spec spec = {.offset = offset,
                                        .unit_size = unit_size,
                                        .n_units = (uint32_t)((FILE_SIZE - offset) / unit_size),
                                        .n_slots = n_slots,
                                        .n_pinned = n_pinned,
                                        .policy = i == 0 ? STORE_LFU : STORE_LRU};
        stores[i] = store_open(flash, &spec, err, sizeof err);
        CHECK(stores[i] != NULL, "%s", err);
        CHECK(store_fill(stores[i]) == 0, "the first units cannot be read");
    }
    for (int k = 0; k < ROUNDS; k++) run_round(stores[k % 2], state, faults);
    for (int i = 0; i < 2; i++) store_close(stores[i]);
    flash_close(flash);
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    const int fd = open(argv[1], O_RDONLY);
    CHECK(fd >= 0, "%s: %s", argv[1], strerror(errno));
    uint64_t state = strtoull(argv[2], NULL, 10) * 0x9e3779b97f4a7c15u + 1;
    for (int engine = IO_URING; engine <= IO_THREADS; engine++) {
        for (int faults = 0; faults < 2; faults++) {
            exercise(fd, (enum io_engine)engine, 1500, 2, 0, faults, &state);   /* small units, in runs */
            exercise(fd, (enum io_engine)engine, 1500, 60, 20, faults, &state);
            exercise(fd, (enum io_engine)engine, 40000, 4, 0, faults, &state);  /* large ones, straight into slots */
            exercise(fd, (enum io_engine)engine, 40000, 20, 3, faults, &state);
        }
    }
    close(fd);
    return 0;
}
