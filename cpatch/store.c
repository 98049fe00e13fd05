/* store.c - see store.h. */
#define _GNU_SOURCE
#include "store.h"

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

enum {
    MAX_PENDING = 4096,  /* reads queued or in flight */
    MAX_BATCH = 64,      /* reads handed to the io, and completions taken from it, at once */
    DEFAULT_DEPTH = 128,
    EARLY = 16,          /* reads that are submitted before all that is wanted has been looked at */
    STAGING_PAGE = 4096,
    LONG_READS = 64,     /* reads of several units for which there is staging memory; of shorter ones there is for more */
    SAMPLES = 12,        /* slots that are compared to find one to evict */
    AGE_ROUNDS = 64      /* uses are halved so often: the half-life of the LFU policy, in tokens */
};

/* A read that is queued or in flight: units first..last of a store, into staging memory or straight into a slot. */
struct pending {
    struct store *store;
    uint32_t first, last;
    int staging, pages; /* its memory's first page (-1: direct, or not submitted yet) and how many */
};

struct flash {
    struct io *io;
    atomic_flag lock;
    struct flash_options options;
    int n_files;
    int *fds;
    struct stat *stats; /* of the files as they were opened */
    struct pending pending[MAX_PENDING];
    int free_pending[MAX_PENDING], n_free_pending;
    int queue[MAX_PENDING], queue_head, queue_size; /* read numbers in order, not submitted yet */
    size_t in_flight; /* bytes of those that are */
    uint8_t *staging;
    uint8_t *staging_used;       /* [n_staging] */
    int n_staging, staging_next; /* pages; where to look for free ones */
    uint8_t *transit;
    uint32_t n_transit, transit_next; /* its slots; which to look at first for a free one */
    struct store **transit_owner;     /* [n_transit] whose unit a slot holds, or held last; NULL: nobody's */
    const struct store *current;      /* the last with transit memory that began a round */
    int error, error_file;
    uint64_t error_offset;
    atomic_bool stale;
    atomic_flag sleeper;         /* a thread sleeps on the device */
    _Atomic uint32_t generation; /* counts collections: others wait for it to change */
};

/* Sleeps while *word is value, for a millisecond at most: who changes it may have been too early to wake us. */
static void sleep_until_changed(_Atomic uint32_t *word, uint32_t value) {
#ifdef __linux__
    const struct timespec most = {0, 1000000};
    (void)syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &most, NULL, 0);
#else
    if (atomic_load(word) == value) sched_yield();
#endif
}

static void wake(_Atomic uint32_t *word) {
#ifdef __linux__
    (void)syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#else
    (void)word;
#endif
}

static void lock(struct flash *f) {
    while (atomic_flag_test_and_set_explicit(&f->lock, memory_order_acquire)) sched_yield();
}

static void unlock(struct flash *f) {
    atomic_flag_clear_explicit(&f->lock, memory_order_release);
}

struct io *flash_io(struct flash *flash) {
    return flash->io;
}

int flash_fd(const struct flash *flash, int file) {
    return file >= 0 && file < flash->n_files ? flash->fds[file] : -1;
}

bool flash_stale(struct flash *flash) {
    return atomic_load_explicit(&flash->stale, memory_order_relaxed);
}

/* The first failure counts, except that a file that has changed is worse than any other. */
static void record_error(struct flash *f, int error, int file, uint64_t offset) {
    if (f->error != 0 && (error != ESTALE || f->error == ESTALE)) return;
    f->error = error;
    f->error_file = file;
    f->error_offset = offset;
}

int flash_error(struct flash *f, int *file, uint64_t *offset) {
    lock(f);
    const int error = f->error;
    *file = f->error_file;
    *offset = f->error_offset;
    if (error != ESTALE) f->error = 0; /* what has changed stays so */
    unlock(f);
    return error;
}

/* Memory that reads go to. Huge pages halve what a large read costs (fewer pieces for the device), and the TLB likes them
 * too; hence the alignment. NULL when there is none. Free with munmap. */
static void *io_memory(size_t size) {
    const size_t huge = 2u << 20;
    uint8_t *p = mmap(NULL, size + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return NULL;
    uint8_t *aligned = (uint8_t *)(((uintptr_t)p + huge - 1) & ~(uintptr_t)(huge - 1));
    const size_t size_in_pages = (size + 4095) & ~(size_t)4095;
    if (aligned > p) munmap(p, (size_t)(aligned - p));
    if (p + huge > aligned) munmap(aligned + size_in_pages, (size_t)(p + huge - aligned));
    (void)madvise(aligned, size, MADV_HUGEPAGE); /* advice only */
    return aligned;
}

static size_t round64(size_t size) {
    return (size + 63) & ~(size_t)63;
}

static bool flash_memory(struct flash *f) {
    const size_t align = io_align(f->io);
    const size_t most = (f->options.run + 2 * align + STAGING_PAGE - 1) / STAGING_PAGE;
    f->n_staging = (int)most * (f->options.depth < LONG_READS ? f->options.depth : LONG_READS);
    f->staging = io_memory((size_t)f->n_staging * STAGING_PAGE);
    f->staging_used = calloc((size_t)f->n_staging, 1);
    f->n_transit = f->options.transit_slot > 0 ? (uint32_t)(f->options.transit / f->options.transit_slot) : 0;
    if (f->n_transit > 0) {
        f->transit = io_memory(f->options.transit);
        f->transit_owner = calloc(f->n_transit, sizeof(struct store *));
        if (f->transit == NULL || f->transit_owner == NULL) return false;
    }
    if (f->staging == NULL || f->staging_used == NULL) return false;
    for (int i = 0; i < MAX_PENDING; i++) f->free_pending[f->n_free_pending++] = MAX_PENDING - 1 - i;
    return true;
}

struct flash *flash_open(const int *fds, int n_files, const struct flash_options *options, char *err, size_t err_len) {
    struct flash *f = calloc(1, sizeof *f);
    if (f == NULL) {
        snprintf(err, err_len, "no memory for the queue of reads");
        return NULL;
    }
    f->options = *options;
    if (f->options.depth < 1) f->options.depth = DEFAULT_DEPTH;
    if (f->options.run < 4096) f->options.run = 4096;
    f->options.transit_slot = round64(f->options.transit_slot);
    atomic_flag_clear(&f->lock);
    atomic_flag_clear(&f->sleeper);
    f->fds = calloc((size_t)n_files, sizeof *f->fds);
    f->stats = calloc((size_t)n_files, sizeof *f->stats);
    if (f->fds == NULL || f->stats == NULL) {
        snprintf(err, err_len, "no memory for %d files", n_files);
        flash_close(f);
        return NULL;
    }
    for (; f->n_files < n_files; f->n_files++) {
        f->fds[f->n_files] = dup(fds[f->n_files]);
        if (f->fds[f->n_files] < 0 || fstat(f->fds[f->n_files], &f->stats[f->n_files]) != 0) {
            snprintf(err, err_len, "cannot open file %d again: %s", f->n_files, strerror(errno));
            f->n_files += f->fds[f->n_files] >= 0;
            flash_close(f);
            return NULL;
        }
    }
    const struct io_options io_options = {.engine = options->engine, .depth = f->options.depth};
    f->io = io_open(fds, n_files, &io_options, err, err_len);
    if (f->io != NULL && flash_memory(f)) return f;
    if (f->io != NULL) snprintf(err, err_len, "no memory for reading from flash");
    flash_close(f);
    return NULL;
}

void flash_close(struct flash *f) {
    if (f == NULL) return;
    io_close(f->io);
    if (f->staging != NULL) munmap(f->staging, (size_t)f->n_staging * STAGING_PAGE);
    if (f->transit != NULL) munmap(f->transit, f->options.transit);
    for (int i = 0; i < f->n_files; i++) close(f->fds[i]);
    free(f->fds);
    free(f->stats);
    free(f->staging_used);
    free(f->transit_owner);
    free(f);
}

static uint64_t unit_offset(const struct store *s, uint32_t unit) {
    return s->spec.offset + unit * s->spec.unit_size;
}

static struct io_read read_of(const struct pending *p, int tag, uint8_t *dst) {
    const struct store *s = p->store;
    return (struct io_read){.file = s->spec.file,
                            .offset = unit_offset(s, p->first),
                            .size = (uint32_t)((p->last - p->first + 1) * s->spec.unit_size),
                            .dst = dst,
                            .tag = (uint64_t)tag};
}

/* Takes staging memory for a read; false: there is none. Reads end about in the order in which they began, so the place
 * behind the last is the one to look at first. */
static bool take_staging(struct flash *f, struct pending *p) {
    const struct io_read read = read_of(p, 0, NULL);
    const int n = (int)((io_window(read.offset, read.size, io_align(f->io)) + STAGING_PAGE - 1) / STAGING_PAGE);
    int at = f->staging_next + n <= f->n_staging ? f->staging_next : 0, free = 0;
    for (int looked = 0; looked < f->n_staging + n; looked++) {
        if (at + free == f->n_staging) at = free = 0;
        if (f->staging_used[at + free]) at += free + 1, free = 0;
        else if (++free == n) break;
    }
    if (free < n) return false;
    memset(f->staging_used + at, 1, (size_t)n);
    f->staging_next = at + n;
    p->staging = at;
    p->pages = n;
    return true;
}

static void free_staging(struct flash *f, struct pending *p) {
    if (p->staging >= 0) memset(f->staging_used + p->staging, 0, (size_t)p->pages);
    p->staging = -1;
}

static uint8_t *staging_of(const struct flash *f, const struct pending *p) {
    return f->staging + (size_t)p->staging * STAGING_PAGE;
}

/* Submits what is queued, as far as staging memory and the io take it. Call with the lock held. */
static void pump(struct flash *f) {
    while (f->queue_size > 0) {
        struct io_read reads[MAX_BATCH];
        const int room = f->options.depth - io_in_flight(f->io), most = room < MAX_BATCH ? room : MAX_BATCH;
        size_t in_flight = f->in_flight;
        int n = 0;
        while (n < f->queue_size && n < most && (f->options.flight == 0 || in_flight < f->options.flight)) {
            const int tag = f->queue[(f->queue_head + n) % MAX_PENDING];
            struct pending *p = &f->pending[tag];
            const struct store *s = p->store;
            if (!s->direct && p->staging < 0 && !take_staging(f, p)) break;
            reads[n] = read_of(p, tag, s->direct ? s->slots + (size_t)s->slot_of[p->first] * s->slot_size : staging_of(f, p));
            in_flight += reads[n++].size;
        }
        if (n == 0) return;
        const int taken = io_submit(f->io, reads, n);
        for (int i = n - 1; i >= taken; i--) free_staging(f, &f->pending[reads[i].tag]); /* it may serve others first */
        f->queue_head = (f->queue_head + taken) % MAX_PENDING;
        f->queue_size -= taken;
        for (int i = 0; i < taken; i++) f->in_flight += reads[i].size;
        if (taken < n) return;
    }
}

/* Where a slot begins. */
static uint8_t *slot_at(const struct store *s, int32_t slot) {
    const int32_t n = (int32_t)s->spec.n_slots;
    return slot < n ? s->slots + (size_t)slot * s->slot_size : s->transit + (size_t)(slot - n) * s->transit_slot;
}

static void drop_slot(struct store *s, int32_t slot) {
    atomic_store_explicit(&s->slot_of[s->unit_of[slot]], -1, memory_order_relaxed);
    s->unit_of[slot] = -1;
    s->ahead[slot] = 0;
    if ((uint32_t)slot >= s->spec.n_slots) {
        s->round_of[slot] = s->round - 1; /* nobody needs it */
    } else {
        s->n_empty++;
        if ((uint32_t)slot < s->cursor) s->cursor = (uint32_t)slot;
    }
    atomic_store_explicit(&s->state[slot], STORE_EMPTY, memory_order_release);
}

/* Looks, after reading from it, whether a file is still the one we know: then what was read is its. Reading does not change
 * mtime, writing does before it changes a byte. Call with the lock held. */
static void check_file(struct flash *f, int file, uint64_t offset) {
    struct stat now;
    const struct stat *then = &f->stats[file];
    if (fstat(f->fds[file], &now) == 0 && now.st_size == then->st_size && now.st_mtim.tv_sec == then->st_mtim.tv_sec &&
        now.st_mtim.tv_nsec == then->st_mtim.tv_nsec)
        return;
    record_error(f, ESTALE, file, offset);
    atomic_store(&f->stale, true);
}

/* Is a unit of this read waited for, or was all of it only read ahead? Who wants that will read it again. */
static bool is_needed(const struct pending *p) {
    const struct store *s = p->store;
    for (uint32_t u = p->first; u <= p->last; u++) {
        const int32_t slot = s->slot_of[u];
        if (slot >= 0 && s->state[slot] == STORE_LOADING && !s->ahead[slot]) return true;
    }
    return false;
}

/* Serves every unit of a finished read that is still wanted from it. Call with the lock held. */
static void complete(struct flash *f, const struct io_done *done) {
    struct pending *p = &f->pending[done->tag];
    struct store *s = p->store;
    f->in_flight -= read_of(p, 0, NULL).size;
    const bool failed = done->error != 0 || flash_stale(f);
    if (done->error != 0 && is_needed(p)) record_error(f, done->error, done->file, done->offset);
    const uint8_t *from = s->direct ? NULL : staging_of(f, p) + (unit_offset(s, p->first) & (s->align - 1));
    for (uint32_t u = p->first; u <= p->last; u++) {
        const int32_t slot = s->slot_of[u];
        if (slot < 0 || s->state[slot] != STORE_LOADING) continue;
        if (failed) {
            drop_slot(s, slot);
            continue;
        }
        if (from != NULL) {
            memcpy(slot_at(s, slot), from + (size_t)(u - p->first) * s->spec.unit_size, s->spec.unit_size);
        }
        atomic_store_explicit(&s->state[slot], STORE_READY, memory_order_release);
    }
    free_staging(f, p);
    f->free_pending[f->n_free_pending++] = (int)done->tag;
}

/* Serves what was collected. Call with the lock held. */
static void serve(struct flash *f, const struct io_done *done, int n) {
    for (int i = 0; i < n; i++) {
        const int file = done[i].file;
        if (i == 0 || file != done[i - 1].file) check_file(f, file, done[i].offset);
        complete(f, &done[i]);
    }
    pump(f);
    if (n > 0) atomic_fetch_add(&f->generation, 1);
}

uint32_t flash_generation(const struct flash *f) {
    return atomic_load(&f->generation);
}

bool flash_progress(struct flash *f) {
    struct io_done done[MAX_BATCH];
    if (atomic_flag_test_and_set_explicit(&f->lock, memory_order_acquire)) return false; /* somebody else is at it */
    pump(f);
    const int n = io_poll(f->io, done, MAX_BATCH, false);
    serve(f, done, n);
    unlock(f);
    if (n > 0) wake(&f->generation);
    return n > 0;
}

bool flash_wait(struct flash *f, uint32_t generation) {
    struct io_done done[MAX_BATCH];
    if (flash_generation(f) != generation || flash_progress(f)) return true;
    /* One thread sleeps on the device, without the lock, the others until that one has collected something. */
    if (atomic_flag_test_and_set(&f->sleeper)) {
        sleep_until_changed(&f->generation, generation);
        return true;
    }
    const int n = io_poll(f->io, done, MAX_BATCH, true);
    lock(f);
    serve(f, done, n);
    unlock(f);
    atomic_flag_clear(&f->sleeper);
    if (n > 0) wake(&f->generation);
    return n > 0;
}

/* ---- stores --------------------------------------------------------------------------------------------------- */

static bool is_direct(const struct flash *f, uint64_t unit_size) {
    return unit_size > f->options.run;
}

size_t store_slot_size(const struct flash *f, uint64_t unit_size) {
    const size_t align = io_align(f->io);
    if (!is_direct(f, unit_size)) return round64(unit_size);
    return ((unit_size + 2 * align - 1) & ~(align - 1)) + (align < 64 ? 64 : 0);
}

struct store *store_open(struct flash *f, const struct store_spec *spec, char *err, size_t err_len) {
    struct store *s = calloc(1, sizeof *s);
    if (s == NULL) goto no_memory;
    s->flash = f;
    s->spec = *spec;
    s->align = io_align(f->io);
    s->direct = is_direct(f, spec->unit_size);
    s->slot_size = store_slot_size(f, spec->unit_size);
    s->random = 0x9e3779b97f4a7c15u;
    s->n_empty = spec->n_slots;
    uint64_t end;
    if (spec->file < 0 || spec->file >= f->n_files || spec->unit_size == 0 || spec->unit_size > INT32_MAX ||
        spec->n_units == 0 || spec->n_units > INT32_MAX || spec->n_slots == 0 || spec->n_slots > spec->n_units ||
        spec->n_pinned > spec->n_slots || (spec->n_pinned == spec->n_slots && spec->n_slots < spec->n_units) ||
        __builtin_mul_overflow(spec->unit_size, (uint64_t)spec->n_units, &end) ||
        __builtin_add_overflow(end, spec->offset, &end) || end > (uint64_t)f->stats[spec->file].st_size) {
        snprintf(err, err_len, "a store of %u units of %llu bytes at offset %llu does not fit the file", spec->n_units,
                 (unsigned long long)spec->unit_size, (unsigned long long)spec->offset);
        store_close(s);
        return NULL;
    }
    if (spec->transit && !s->direct && spec->n_slots < spec->n_units && s->slot_size <= f->options.transit_slot) {
        s->n_transit = f->n_transit;
        s->transit_slot = f->options.transit_slot;
        s->transit = f->transit;
    }
    const size_t n_slots = (size_t)spec->n_slots + s->n_transit;
    s->slots_size = s->slot_size * spec->n_slots;
    s->slots = io_memory(s->slots_size);
    s->slot_of = malloc(spec->n_units * sizeof *s->slot_of);
    s->uses = calloc(spec->n_units, sizeof *s->uses);
    s->unit_of = malloc(n_slots * sizeof *s->unit_of);
    s->state = calloc(n_slots, sizeof *s->state);
    s->ahead = calloc(n_slots, sizeof *s->ahead);
    s->round_of = calloc(n_slots, sizeof *s->round_of);
    if (s->slots == NULL || s->slot_of == NULL || s->uses == NULL || s->unit_of == NULL || s->state == NULL ||
        s->ahead == NULL || s->round_of == NULL)
        goto no_memory;
    for (uint32_t u = 0; u < spec->n_units; u++) atomic_init(&s->slot_of[u], -1);
    for (size_t i = 0; i < n_slots; i++) s->unit_of[i] = -1;
    /* As if this frequency had been counted for long: between AGE_ROUNDS and twice that, halved in turn. */
    for (uint32_t u = 0; u < spec->n_units && spec->frequency != NULL; u++) {
        const float share = spec->frequency[u];
        s->uses[u] = share > 0 ? (uint16_t)((share < 1 ? share : 1) * 1.5f * AGE_ROUNDS) : 0;
    }
    s->spec.frequency = NULL; /* the caller's memory */
    s->round = 2; /* so that slots never used are older than every round */
    return s;
no_memory:
    snprintf(err, err_len, "no memory for %u slots of %llu bytes", spec->n_slots, (unsigned long long)spec->unit_size);
    store_close(s);
    return NULL;
}

void store_close(struct store *s) {
    if (s == NULL) return;
    for (uint32_t k = 0; k < s->n_transit; k++) {
        if (s->flash->transit_owner[k] == s) s->flash->transit_owner[k] = NULL;
    }
    if (s->flash->current == s) s->flash->current = NULL;
    if (s->slots != NULL) munmap(s->slots, s->slots_size);
    free(s->slot_of);
    free(s->uses);
    free(s->unit_of);
    free(s->state);
    free(s->ahead);
    free(s->round_of);
    free(s);
}

void store_begin(struct store *s) {
    lock(s->flash);
    s->round++;
    if (s->n_transit > 0) s->flash->current = s;
    if (s->round % AGE_ROUNDS == 0) {
        for (uint32_t u = 0; u < s->spec.n_units; u++) s->uses[u] >>= 1;
    }
    unlock(s->flash);
}

/* In this round or in the next somebody needs it. */
static bool protected_slot(const struct store *s, uint32_t slot) {
    return s->round_of[slot] - s->round <= 1u;
}

static bool evictable(const struct store *s, uint32_t slot) {
    return slot >= s->spec.n_pinned && s->state[slot] == STORE_READY && !protected_slot(s, slot);
}

/* Is what slot a holds worth less than what slot b holds? */
static bool worth_less(const struct store *s, uint32_t a, uint32_t b) {
    const uint32_t age_a = s->round - s->round_of[a], age_b = s->round - s->round_of[b];
    if (s->spec.policy == STORE_LRU) return age_a > age_b;
    const uint16_t uses_a = s->uses[s->unit_of[a]], uses_b = s->uses[s->unit_of[b]];
    return uses_a != uses_b ? uses_a < uses_b : age_a > age_b;
}

static void count_if_wasted(struct store *s, int32_t slot) {
    s->counters.wasted += s->ahead[slot];
    s->recent_wasted += s->ahead[slot];
    s->ahead[slot] = 0;
}

/* Does its store need what is in a slot of transit memory: in its round, unless that is over, or in the next? */
static bool needed(const struct store *s, uint32_t slot) {
    const uint32_t age = s->round - s->round_of[slot];
    return age == UINT32_MAX || (age == 0 && s == s->flash->current);
}

/* A slot of transit memory, emptied; -1: all are needed. What other stores only read ahead has to go in the end. */
static int32_t take_transit(struct store *s, bool ahead) {
    struct flash *f = s->flash;
    for (int pass = 0; pass < (ahead ? 1 : 2); pass++) {
        for (uint32_t i = 0; i < f->n_transit; i++) {
            const uint32_t k = (f->transit_next + i) % f->n_transit;
            struct store *owner = f->transit_owner[k];
            const uint32_t slot = owner == NULL ? 0 : owner->spec.n_slots + k;
            if (owner != NULL && owner->unit_of[slot] >= 0) {
                if (needed(owner, slot) && (pass == 0 || owner == s)) continue;
                count_if_wasted(owner, (int32_t)slot);
                drop_slot(owner, (int32_t)slot); /* also what is on its way: its read finds nobody to serve */
            }
            f->transit_owner[k] = s;
            f->transit_next = k + 1;
            return (int32_t)(s->spec.n_slots + k);
        }
    }
    return -1;
}

/* A slot to put a unit in, emptied; -1: all are needed. The policy holds among a random sample, which is nearly as good
 * as among all and costs the same whatever the size. */
static int32_t take_slot(struct store *s, uint32_t unit, bool ahead) {
    if (s->n_empty > 0) {
        while (s->state[s->cursor] != STORE_EMPTY) s->cursor++;
        s->n_empty--;
        return (int32_t)s->cursor;
    }
    const uint32_t n = s->spec.n_slots - s->spec.n_pinned;
    int64_t best = -1;
    uint32_t start = 0;
    for (uint32_t i = 0; i < SAMPLES && n > 0; i++) {
        s->random ^= s->random << 13, s->random ^= s->random >> 7, s->random ^= s->random << 17; /* xorshift64 */
        start = s->spec.n_pinned + (uint32_t)(s->random % n);
        if (evictable(s, start) && (best < 0 || worth_less(s, start, (uint32_t)best))) best = start;
    }
    if (s->n_transit > 0 && (best < 0 || (s->spec.policy == STORE_LFU && s->uses[unit] <= s->uses[s->unit_of[best]]))) {
        const int32_t slot = take_transit(s, ahead);
        if (slot >= 0 || ahead) return slot;
    }
    for (uint32_t i = 0; i < n && best < 0; i++) {
        const uint32_t slot = s->spec.n_pinned + (start - s->spec.n_pinned + i) % n;
        if (evictable(s, slot)) best = slot;
    }
    if (best < 0) return -1;
    count_if_wasted(s, (int32_t)best);
    atomic_store_explicit(&s->slot_of[s->unit_of[best]], -1, memory_order_relaxed);
    s->unit_of[best] = -1;
    return (int32_t)best;
}

/* Queues the run that is being put together. Call with the lock held; a pending read is free (store_want saw to it). */
static void close_run(struct store *s) {
    struct flash *f = s->flash;
    if (!s->run_open) return;
    s->run_open = false;
    const int tag = f->free_pending[--f->n_free_pending];
    f->pending[tag] = (struct pending){.store = s, .first = s->run_first, .last = s->run_last, .staging = -1};
    f->queue[(f->queue_head + f->queue_size++) % MAX_PENDING] = tag;
    if (f->queue_size >= EARLY) pump(f);
}

/* Whether the unit can join the run: it follows closely, and the read stays short enough. */
static bool joins_run(const struct store *s, uint32_t unit) {
    if (!s->run_open || s->direct || unit <= s->run_last) return false;
    return (unit - s->run_last - 1) * s->spec.unit_size <= s->flash->options.gap &&
           (unit - s->run_first + 1) * s->spec.unit_size <= s->flash->options.run;
}

static bool want_missing(struct store *s, uint32_t unit, bool ahead) {
    struct flash *f = s->flash;
    const bool joins = joins_run(s, unit);
    /* The open run needs one read, and this unit perhaps another. */
    if (!joins && f->n_free_pending < 1 + s->run_open) return false;
    const int32_t slot = take_slot(s, unit, ahead);
    if (slot < 0) return false;
    s->unit_of[slot] = (int32_t)unit;
    s->round_of[slot] = s->round + ahead;
    s->ahead[slot] = ahead;
    atomic_store_explicit(&s->state[slot], STORE_LOADING, memory_order_relaxed);
    atomic_store_explicit(&s->slot_of[unit], slot, memory_order_release);
    s->counters.bytes += s->spec.unit_size;
    s->counters.prefetched += ahead;
    if (!joins) {
        close_run(s);
        s->run_open = true;
        s->run_first = unit;
    }
    s->run_last = unit;
    return true;
}

/* What is in the slot is needed in this round, or in the next. */
static void protect(struct store *s, int32_t slot, bool ahead) {
    if (slot >= 0 && (ahead || s->round_of[slot] != s->round + 1)) s->round_of[slot] = s->round + ahead;
}

static bool want(struct store *s, uint32_t unit, bool ahead) {
    const int32_t slot = s->slot_of[unit];
    if (slot < 0) {
        if (!want_missing(s, unit, ahead)) return false;
    } else {
        protect(s, slot, ahead);
        if (!ahead && s->ahead[slot]) {
            s->counters.useful++;
            s->recent_useful++;
            s->ahead[slot] = 0;
        }
    }
    if (!ahead) {
        s->uses[unit] += s->uses[unit] < UINT16_MAX;
        s->counters.wanted++;
        s->counters.missed += slot < 0 || s->state[slot] != STORE_READY;
    }
    return true;
}

bool store_pays(struct store *s) {
    const uint32_t n = s->recent_useful + s->recent_wasted;
    if (n > 256) {
        s->recent_useful /= 2;
        s->recent_wasted /= 2;
    }
    /* A read that is not used costs as much as one that is wanted at once: below one in three it rather delays. */
    return n < 32 || 3 * s->recent_useful >= n || s->tries++ % 32 == 0;
}

int store_want(struct store *s, const int32_t *units, int n, bool ahead) {
    int i = 0;
    lock(s->flash);
    /* None of them goes to make room for another, where transit memory takes what then finds no slot. */
    for (int k = 0; k < n && s->n_transit > 0; k++) protect(s, s->slot_of[units[k]], ahead);
    while (i < n && want(s, (uint32_t)units[i], ahead)) i++;
    unlock(s->flash);
    return i;
}

void store_flush(struct store *s) {
    struct flash *f = s->flash;
    lock(f);
    close_run(s);
    pump(f);
    unlock(f);
}

void store_release(struct store *s, uint32_t unit) {
    lock(s->flash);
    const int32_t slot = s->slot_of[unit];
    if (slot >= 0 && s->round_of[slot] == s->round) s->round_of[slot] = s->round - 1;
    unlock(s->flash);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int store_wait(struct store *s, uint32_t unit) {
    if (flash_stale(s->flash)) return -1;
    if (store_ready(s, unit)) return 0;
    const uint64_t start = now_ns();
    int result = 0;
    for (;;) {
        const uint32_t generation = flash_generation(s->flash);
        if (store_ready(s, unit)) break;
        if (atomic_load_explicit(&s->slot_of[unit], memory_order_acquire) < 0) { /* its read failed */
            result = -1;
            break;
        }
        (void)flash_wait(s->flash, generation);
    }
    s->counters.wait_ns += now_ns() - start;
    return result;
}

void store_sleep(struct store *s, uint32_t generation) {
    const uint64_t start = now_ns();
    (void)flash_wait(s->flash, generation);
    s->counters.wait_ns += now_ns() - start;
}

void store_reset_counters(struct store *s) {
    struct store_counters *c = &s->counters;
    c->wanted = c->missed = c->bytes = c->prefetched = c->useful = c->wasted = c->wait_ns = 0;
}

int store_fill(struct store *s) {
    const uint32_t n = s->spec.n_slots;
    store_begin(s);
    for (int32_t u = 0; u < (int32_t)n; u++) {
        while (store_want(s, &u, 1, false) == 0) {
            store_flush(s);
            (void)flash_wait(s->flash, flash_generation(s->flash));
        }
    }
    store_flush(s);
    for (uint32_t u = 0; u < n; u++) {
        if (store_wait(s, u) != 0) return -1;
    }
    store_reset_counters(s);
    store_begin(s);
    store_begin(s);
    return 0;
}
