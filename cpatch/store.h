/* store.h - weights that lie on flash, and the part of them that is in memory.
 *
 * A store is a run of equal units in a file: the neurons of a bundle tensor, the experts of a matrix, or tiles of rows
 * of a dense matrix. Some units are in slots, which are all allocated when the store is opened; the rest is read when
 * it is wanted. The first n_pinned units (files are stored hot-first) never leave their slots: PowerInfer-2's segmented
 * cache, arXiv 2406.06282. The others compete under a policy.
 *
 * A flash is what the stores of one model share: the io, the queue of reads, staging memory, one lock, and transit memory:
 * slots for units that are not worth giving up another for (they were wanted less often than what would have to go). They
 * are there for the round that wants them, of whichever store.
 *
 * Small units are read in runs: neighbours, and gaps that are cheaper to read through than to skip, become one read
 * into staging memory, from which units are copied to their slots. Large units are read straight into their slots.
 *
 * Rounds: an evaluation begins a round, wants units, waits for each before it uses it. Units wanted in the current round
 * (or prefetched for the next) are not evicted. Wanting and beginning is for one thread at a time; waiting and
 * progressing is for all. The file's bytes never change, so whatever read brings a unit's bytes first serves it. */
#ifndef POWERINFER_STORE_H
#define POWERINFER_STORE_H

#include "io.h"
#include "powerinfer.h"

#include <stdatomic.h>

struct flash;

struct flash_options {
    enum io_engine engine;
    int depth;       /* reads in flight; 0: default */
    size_t flight;   /* bytes in flight, from which on no more are submitted: what is wanted now waits for them; 0: no bound */
    size_t gap;      /* bytes of unwanted units that are read through rather than skipped */
    size_t run;      /* longest read of several units, in bytes; larger units are read on their own */
    size_t transit;  /* bytes of transit memory; 0: none */
    size_t transit_slot; /* bytes of the largest unit that may pass through it */
};

/* NULL with a sentence in err. The fds are reopened, the caller's stay his. */
struct flash *flash_open(const int *fds, int n_files, const struct flash_options *options, char *err, size_t err_len);
void flash_close(struct flash *flash); /* after all its stores; NULL is allowed */

/* Collects what has arrived and submits what waits. Cheap when there is nothing. Returns whether anything was collected. */
bool flash_progress(struct flash *flash);

/* Sleeps until something is collected, by this thread or another, after flash_generation() returned `generation`: read it,
 * look whether what you need is there, then wait. False: nothing is on its way. */
uint32_t flash_generation(const struct flash *flash);
bool flash_wait(struct flash *flash, uint32_t generation);

/* The first failure since the last call: 0, or an errno with the file's index and the offset. ESTALE: changed. */
int flash_error(struct flash *flash, int *file, uint64_t *offset);

struct io *flash_io(struct flash *flash);
int flash_fd(const struct flash *flash, int file); /* for reads through the page cache; stays the flash's */

/* Has a file changed since it was opened? Then nothing that was read since can be trusted. */
bool flash_stale(struct flash *flash);

enum store_policy { STORE_LFU = 0, STORE_LRU = 1 };

struct store_spec {
    int file;
    uint64_t offset;    /* of unit 0 in the file */
    uint64_t unit_size; /* bytes from one unit to the next; all of them are wanted */
    uint32_t n_units;
    uint32_t n_slots;   /* at least 1, at most n_units */
    uint32_t n_pinned;  /* at most n_slots - 1, unless everything has a slot */
    enum store_policy policy;
    bool transit;       /* units may pass through transit memory; they are not read straight into slots then */
    const float *frequency; /* [n_units] share of the rounds that want a unit, if that is known before any; else NULL */
};

enum { STORE_EMPTY = 0, STORE_LOADING = 1, STORE_READY = 2 };

struct store_counters {
    _Atomic uint64_t wanted, missed; /* units; a unit that is still on its way counts as missed */
    _Atomic uint64_t bytes;          /* of units that were read because they were wanted or prefetched */
    _Atomic uint64_t prefetched, useful, wasted; /* units read ahead of time; used before eviction; evicted unused */
    _Atomic uint64_t wait_ns;        /* time threads spent waiting for units */
};

struct store {
    struct flash *flash;
    struct store_spec spec;
    size_t slot_size;
    uint32_t align;         /* io_align() of the flash */
    bool direct;            /* units are read straight into slots, at offset % align */
    uint8_t *slots, *transit;
    size_t slots_size;
    uint32_t n_transit;     /* slots n_slots and up are in transit memory, as far as they are this store's */
    size_t transit_slot;    /* bytes of one */
    _Atomic int32_t *slot_of;     /* [n_units] -1: in no slot */
    int32_t *unit_of;             /* [n_slots + n_transit] */
    _Atomic uint8_t *state;       /* [n_slots + n_transit] */
    uint8_t *ahead;               /* [n_slots + n_transit] prefetched and not used yet */
    uint32_t *round_of;           /* [n_slots + n_transit] the last round that wanted the slot's unit */
    uint16_t *uses;               /* [n_units] how often, halved now and then */
    uint32_t round, n_empty, cursor; /* cursor: no slot before it is empty */
    uint64_t random;
    bool run_open;                /* a read is being put together: */
    uint32_t run_first, run_last; /* its units */
    uint32_t recent_useful, recent_wasted, tries; /* of reading ahead, fading: store_pays() */
    struct store_counters counters;
};

/* Bytes of memory that a slot takes. */
size_t store_slot_size(const struct flash *flash, uint64_t unit_size);

/* NULL with a sentence in err; nothing is read yet. */
struct store *store_open(struct flash *flash, const struct store_spec *spec, char *err, size_t err_len);
void store_close(struct store *store);
void store_reset_counters(struct store *store);

/* Fills all slots with the first units, in large reads. 0, or -1: see flash_error(). */
int store_fill(struct store *store);

void store_begin(struct store *store);

/* How many units can be wanted in a round for certain, of those that store_takes_room(). Some more may find a slot. */
static inline uint32_t store_room(const struct store *store) {
    return store->n_transit > 0 ? store->n_transit : store->spec.n_slots - store->spec.n_pinned;
}

static inline bool store_takes_room(const struct store *store, uint32_t unit) {
    if (store->n_transit == 0) return unit >= store->spec.n_pinned;
    const int32_t slot = atomic_load_explicit(&store->slot_of[unit], memory_order_relaxed);
    return slot < 0 || (uint32_t)slot >= store->spec.n_slots;
}

/* Wants units in this round; ascending order makes runs. Returns how many could be had: fewer than n when no slot is to
 * be had before others of this round are released, or when too many reads wait already (progress, and try again).
 * ahead: for the next round. */
int store_want(struct store *store, const int32_t *units, int n, bool ahead);

/* Does reading ahead pay: is enough of it used? Where it does not, it is tried now and then. */
bool store_pays(struct store *store);

/* The units wanted so far are submitted. */
void store_flush(struct store *store);

/* The unit may be evicted before the round ends. */
void store_release(struct store *store, uint32_t unit);

/* Is the unit in memory, or on its way? */
static inline bool store_has(const struct store *store, uint32_t unit) {
    return atomic_load_explicit(&store->slot_of[unit], memory_order_relaxed) >= 0;
}

static inline bool store_ready(const struct store *store, uint32_t unit) {
    const int32_t slot = atomic_load_explicit(&store->slot_of[unit], memory_order_relaxed);
    return slot >= 0 && atomic_load_explicit(&store->state[slot], memory_order_acquire) == STORE_READY;
}

/* Waits until a wanted unit is in memory. -1: its read failed. */
int store_wait(struct store *store, uint32_t unit);

/* flash_wait() that counts the time as store_wait() does. */
void store_sleep(struct store *store, uint32_t generation);

/* The bytes of a unit that is ready. */
static inline const uint8_t *store_unit(const struct store *store, uint32_t unit) {
    const int32_t slot = atomic_load_explicit(&store->slot_of[unit], memory_order_relaxed);
    const uint64_t offset = store->spec.offset + unit * store->spec.unit_size;
    if ((uint32_t)slot >= store->spec.n_slots)
        return store->transit + ((size_t)slot - store->spec.n_slots) * store->transit_slot;
    return store->slots + (size_t)slot * store->slot_size +
           (store->direct ? offset & (store->align - 1) : 0);
}

#endif
