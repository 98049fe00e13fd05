/* io_measure.c - what a read costs on this device. See io_measure in io.h. */
#define _GNU_SOURCE
#include "io.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum {
    SMALLEST = 4096,
    STEP = 4,
    N_SIZES = 5,
    N_ROUNDS = 3,      /* of which the median counts: another program may use the device too */
    SCRATCH = 8 << 20, /* bytes in flight at most: enough to fill any queue with large reads */
    MAX_READS = SCRATCH / SMALLEST,
    MAX_PLACES = 4096, /* that are read twice */
    HUGE_PAGE = 2 << 20,
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t next_random(uint64_t *state) { /* xorshift64: where the reads go needs no more */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

struct run {
    struct io *io;
    int file;
    uint64_t file_size, random;
    char *scratch; /* SCRATCH bytes; read number i of a size goes to scratch + i * size */
    int n_free;    /* reads that are not in flight, and their numbers */
    int free[MAX_READS];
    struct io_read reads[MAX_READS];
    uint64_t places[MAX_PLACES]; /* offsets of what was read for the first time */
    int n_places, next;          /* next: which of them to read again */
};

/* Submits as many reads of this size as the io takes: at places that have been read already, or at new ones. */
static void submit(struct run *r, uint32_t size, bool again) {
    const uint64_t n_offsets = (r->file_size - size) / SMALLEST + 1;
    const int most = !again && MAX_PLACES - r->n_places < r->n_free ? MAX_PLACES - r->n_places : r->n_free;
    for (int i = 0; i < most; i++) {
        const int number = r->free[r->n_free - 1 - i];
        if (!again) r->places[r->n_places + i] = next_random(&r->random) % n_offsets * SMALLEST;
        r->reads[i] = (struct io_read){
            .file = r->file,
            .offset = r->places[again ? (r->next + i) % r->n_places : r->n_places + i],
            .size = size,
            .dst = r->scratch + (size_t)number * size,
            .tag = (uint64_t)number,
        };
    }
    const int taken = io_submit(r->io, r->reads, most);
    r->n_free -= taken;
    if (again) r->next = (r->next + taken) % r->n_places;
    else r->n_places += taken;
}

/* Collects what there is, waiting for at least one. Returns 0 or the errno of a read that failed. */
static int collect(struct run *r, uint64_t *finished) {
    struct io_done done[64];
    const int n = io_poll(r->io, done, 64, true);
    int error = 0;
    *finished += (uint64_t)n;
    for (int i = 0; i < n; i++) {
        r->free[r->n_free++] = (int)done[i].tag;
        if (done[i].error != 0) error = done[i].error;
    }
    return error;
}

/* Reads for that many seconds, or until places are full, with the queue kept full. Seconds per read, or minus the errno
 * of a read that failed. */
static double time_reads(struct run *r, uint32_t size, double seconds, bool again) {
    const double start = now();
    uint64_t finished = 0;
    int error = 0;
    r->n_free = r->next = 0;
    if (!again) r->n_places = 0;
    while (r->n_free < SCRATCH / (int)size) {
        r->free[r->n_free] = r->n_free;
        r->n_free++;
    }
    do {
        submit(r, size, again);
        error = collect(r, &finished);
    } while (error == 0 && now() - start < seconds && (again || r->n_places < MAX_PLACES));
    while (io_in_flight(r->io) > 0) {
        const int late = collect(r, &finished);
        if (error == 0) error = late;
    }
    return error != 0 ? -error : (now() - start) / (double)finished;
}

/* The line that is least wrong in relative terms: small reads are as important as large ones. */
static void fit(const double *size, const double *seconds, int n, struct io_cost *out) {
    double w = 0, x = 0, y = 0, xx = 0, xy = 0;
    for (int i = 0; i < n; i++) {
        const double weight = 1 / (seconds[i] * seconds[i]);
        w += weight;
        x += weight * size[i];
        y += weight * seconds[i];
        xx += weight * size[i] * size[i];
        xy += weight * size[i] * seconds[i];
    }
    const double slope = (w * xy - x * y) / (w * xx - x * x), largest = seconds[n - 1] / size[n - 1];
    const double latency = (y - slope * x) / w;
    const bool sensible = slope > 0 && latency > 0; /* else noise is larger than what is looked for */
    out->bandwidth = sensible ? 1 / slope : 1 / largest;
    out->latency = sensible ? latency : 0;
}

static double median_of_three(const double *x) {
    const double low = x[0] < x[1] ? x[0] : x[1], high = x[0] < x[1] ? x[1] : x[0];
    return x[2] < low ? low : x[2] > high ? high : x[2];
}

/* Fills in the sizes that fit into the file and what a read of each costs, at new places and at known ones. Returns how
 * many, or minus an errno. */
static int measure_sizes(struct run *r, double seconds, double *sizes, double costs[2][N_SIZES]) {
    double rounds[2][N_SIZES][N_ROUNDS];
    int n = 0;
    for (int round = 0; round < N_ROUNDS; round++) {
        uint32_t size = SMALLEST;
        for (n = 0; n < N_SIZES && size <= r->file_size; n++, size *= STEP) {
            sizes[n] = size;
            for (int again = 0; again < 2; again++) {
                const double found = time_reads(r, size, seconds / (2 * N_SIZES * N_ROUNDS), again);
                if (found < 0) return (int)found;
                rounds[again][n][round] = found;
            }
        }
    }
    for (int i = 0; i < n; i++) {
        for (int again = 0; again < 2; again++) costs[again][i] = median_of_three(rounds[again][i]);
    }
    return n;
}

int io_measure(struct io *io, int file, uint64_t file_size, double seconds, struct io_cost *out, char *err,
               size_t err_len) {
    if (io_in_flight(io) != 0) {
        snprintf(err, err_len, "reads are in flight: measure before the first");
        return -1;
    }
    if (file_size < SMALLEST * STEP || SMALLEST % io_align(io) != 0) {
        snprintf(err, err_len, "a file of %llu bytes in blocks of %u is too small to measure its device with",
                 (unsigned long long)file_size, io_align(io));
        return -1;
    }
    struct run *r = calloc(1, sizeof *r);
    void *scratch = NULL;
    if (r == NULL || posix_memalign(&scratch, HUGE_PAGE, SCRATCH) != 0) {
        snprintf(err, err_len, "out of memory for %d bytes to measure with", SCRATCH);
        free(r);
        return -1;
    }
#ifdef MADV_HUGEPAGE
    madvise(scratch, SCRATCH, MADV_HUGEPAGE); /* as io.h recommends for what is measured here */
#endif
    memset(scratch, 0, SCRATCH); /* page faults now, not in the first reads */
    *r = (struct run){.io = io, .file = file, .file_size = file_size, .scratch = scratch};
    r->random = 0x9e3779b97f4a7c15u;
    double sizes[N_SIZES], costs[2][N_SIZES], first = 0;
    const int n = measure_sizes(r, seconds, sizes, costs);
    free(scratch);
    free(r);
    if (n < 0) {
        snprintf(err, err_len, "reading to measure the device failed: %s", strerror(-n));
        return -1;
    }
    fit(sizes, costs[1], n, out);
    for (int i = 0; i < n; i++) first += costs[0][i] / costs[1][i] / n;
    out->first = first > 1 ? first : 1;
    return 0;
}
