/* io_engine.h - what io.c shares with its two engines, io_uring.c and io_threads.c.
 *
 * A read lives in a slot from io_submit to io_poll. Slots are numbered; an engine is handed numbers and hands them
 * back, so that nothing is allocated on the way. Two locks: submit_lock is held while reads are handed to the engine,
 * collect_lock while finished ones are taken from it. Who needs both takes collect_lock first. */
#ifndef POWERINFER_IO_ENGINE_H
#define POWERINFER_IO_ENGINE_H

#include "io.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct io_file {
    int fd;
    bool direct;
    uint32_t align; /* of offsets, lengths and addresses; 1 when not direct */
};

struct io_slot {
    struct io_read read;
    uint64_t begin;  /* in the file: where the aligned window around the read begins */
    uint64_t window; /* its length */
    uint64_t got;    /* how much of it has arrived */
    uint64_t cut;    /* injected end of the file, else UINT64_MAX */
    int fault;       /* injected errno for the next answer of the device, else 0 */
    int retries;     /* answers in a row that were no answers: EINTR and its like */
    int error;       /* of a finished read */
    atomic_bool sent; /* io_uring's: the kernel has it */
};

/* A queue of slot numbers that never holds more than there are slots. One side may push while another pops; pushes
 * among themselves, and pops, are serialised by the locks of whoever uses it. */
struct io_queue {
    uint32_t *slots;
    uint32_t mask;
    _Atomic uint32_t head, tail;
};

struct io {
    enum io_engine engine;
    int depth, n_files;
    uint32_t align;
    struct io_file *files;
    struct io_slot *slots;
    uint32_t *batch;         /* numbers on their way to the engine; under submit_lock */
    struct io_queue unused;  /* popped under submit_lock, pushed under collect_lock */
    struct io_queue failed;  /* finished without the device; pushed under submit_lock, popped under collect_lock */
    pthread_mutex_t submit_lock, collect_lock;
    struct io_uring *uring;
    struct io_pool *pool;
    /* The engine's completions wait when these differ: what io_poll looks at before it does anything else. */
    const _Atomic uint32_t *ready_head, *ready_tail;
    int64_t inject_in; /* reads until the injected fault, or -1; these three under submit_lock */
    int inject_error;
    uint32_t inject_short;
    atomic_int in_flight;
    _Atomic uint64_t n_reads, n_bytes, n_windows, wait_ns;
};

/* Both return false for a full or an empty queue. */
bool io_queue_push(struct io_queue *queue, uint32_t slot);
bool io_queue_pop(struct io_queue *queue, uint32_t *slot);
int io_queue_init(struct io_queue *queue, int capacity); /* 0, or -1: out of memory */
void io_queue_free(struct io_queue *queue);
bool io_queue_empty(const struct io_queue *queue);

/* What the device is to be asked next for this slot; at most 1 GiB at once. */
uint32_t io_slot_next(const struct io_slot *slot, uint64_t *offset, void **dst);

/* Takes in an answer of the device, bytes or a negated errno. True: the read is finished, well or not (slot->error).
 * False: ask again. */
bool io_slot_advance(struct io *io, struct io_slot *slot, int64_t result);

/* Reports a finished slot and frees it. Under collect_lock. */
void io_slot_finish(struct io *io, uint32_t slot, struct io_done *done);

/* The engines. start: 0, or -1 with a sentence. send: starts n slots, under submit_lock; those it cannot start go to
 * io->failed with slot->error set. collect: at most max finished slots through io_slot_finish, under collect_lock.
 * sleep: until there is a completion; only called when one is sure to come. stop: only when nothing is in flight. */
int io_uring_start(struct io *io, char *err, size_t err_len);
void io_uring_send(struct io *io, const uint32_t *slots, int n);
int io_uring_collect(struct io *io, struct io_done *done, int max);
void io_uring_sleep(struct io *io);
void io_uring_stop(struct io *io);
int io_uring_register(struct io *io, void *memory, size_t size);

int io_threads_start(struct io *io, char *err, size_t err_len);
void io_threads_send(struct io *io, const uint32_t *slots, int n);
int io_threads_collect(struct io *io, struct io_done *done, int max);
void io_threads_sleep(struct io *io);
void io_threads_stop(struct io *io);

#endif
