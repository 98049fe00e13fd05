/* io_measure.c - what a read costs on this device. See io_measure in io.h. */
#define _GNU_SOURCE
#include "io.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { N_SIZES = 5, SMALLEST = 4096, STEP = 4, SCRATCH = 4 << 20, BATCH = 64 };

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

/* What goes in while the reads of one size run. */
struct run {
    struct io *io;
    int file;
    uint64_t file_size;
    uint32_t size;
    char *scratch; /* SCRATCH bytes; reads that do not fit side by side overwrite each other, nobody looks */
    uint64_t random, started, finished;
};

static void start_one(struct run *r, struct io_read *read) {
    const uint64_t places = (r->file_size - r->size) / SMALLEST + 1;
    *read = (struct io_read){
        .file = r->file,
        .offset = next_random(&r->random) % places * SMALLEST,
        .size = r->size,
        .dst = r->scratch + r->started % (SCRATCH / r->size) * r->size,
    };
}

/* Collects what there is, waiting for at least one. Returns 0 or the errno of a read that failed. */
static int collect(struct run *r) {
    struct io_done done[BATCH];
    const int n = io_poll(r->io, done, BATCH, true);
    r->finished += (uint64_t)n;
    for (int i = 0; i < n; i++)
        if (done[i].error != 0) return done[i].error;
    return 0;
}

/* Reads for that many seconds with the queue kept full. Seconds per read, or minus the errno of a read that failed. */
static double time_reads(struct run *r, double seconds) {
    const double start = now();
    double end = start;
    int error = 0;
    while (error == 0 && (r->started == 0 || end - start < seconds)) {
        struct io_read read;
        for (;;) {
            start_one(r, &read);
            if (io_submit(r->io, &read, 1) == 0) break;
            r->started++;
        }
        error = collect(r);
        end = now();
    }
    while (io_in_flight(r->io) > 0) {
        const int late = collect(r);
        if (error == 0) error = late;
    }
    return error != 0 ? -error : (now() - start) / (double)r->finished;
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

int io_measure(struct io *io, int file, uint64_t file_size, double seconds, struct io_cost *out, char *err,
               size_t err_len) {
    double size[N_SIZES], cost[N_SIZES];
    int n = 0;
    if (io_in_flight(io) != 0) {
        snprintf(err, err_len, "reads are in flight: measure before the first");
        return -1;
    }
    if (file_size < SMALLEST * STEP || SMALLEST % io_align(io) != 0) {
        snprintf(err, err_len, "the file is too small to measure its device with (%llu bytes)",
                 (unsigned long long)file_size);
        return -1;
    }
    void *scratch = NULL;
    if (posix_memalign(&scratch, SMALLEST, SCRATCH) != 0) {
        snprintf(err, err_len, "out of memory for %d bytes to measure with", SCRATCH);
        return -1;
    }
    memset(scratch, 0, SCRATCH); /* page faults now, not in the first reads */
    struct run r = {.io = io, .file = file, .file_size = file_size, .size = SMALLEST, .scratch = scratch};
    r.random = 0x9e3779b97f4a7c15u;
    double per_read = 0;
    for (; n < N_SIZES && r.size <= file_size && per_read >= 0; r.size *= STEP) {
        r.started = r.finished = 0;
        per_read = time_reads(&r, seconds / N_SIZES);
        size[n] = r.size;
        cost[n++] = per_read;
    }
    free(scratch);
    if (per_read < 0) {
        snprintf(err, err_len, "reading to measure the device failed: %s", strerror((int)-per_read));
        return -1;
    }
    fit(size, cost, n, out);
    return 0;
}
