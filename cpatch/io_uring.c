/* io_uring.c - the engine of choice: io_uring by raw system calls (no liburing to install).
 *
 * Plain rings, Linux 5.6 and later: any thread may enter, and a completion interrupts the thread that submitted the
 * read just long enough to write it into the ring, so that looking at the ring's memory is enough to see it, whatever
 * the threads are doing. The flags that save that interrupt (DEFER_TASKRUN, COOP_TASKRUN) want the submitting thread to
 * enter the kernel itself, which a thread that computes does not do. */
#define _GNU_SOURCE
#include "io_engine.h"

#include <stdio.h>

#if defined(__linux__)

#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* ---- The kernel's interface, as far as used: linux/io_uring.h, which the build machine may not have -------------- */

enum {
    OP_READ_FIXED = 4,
    OP_READ = 22, /* Linux 5.6 */
    ENTER_GETEVENTS = 1,
    FEATURE_SINGLE_MMAP = 1,
    REGISTER_BUFFERS = 0,
    UNREGISTER_BUFFERS = 1,
    REGISTER_PROBE = 8,
    OP_SUPPORTED = 1,
    OFFSET_RINGS = 0,
    OFFSET_SQES = 0x10000000,
    N_OPS = 64,
#ifdef SYS_io_uring_setup
    CALL_SETUP = SYS_io_uring_setup,
    CALL_ENTER = SYS_io_uring_enter,
    CALL_REGISTER = SYS_io_uring_register,
#else /* the same on every architecture that has them since Linux 5.1, but for alpha's offset */
    CALL_SETUP = 425,
    CALL_ENTER = 426,
    CALL_REGISTER = 427,
#endif
};

struct sqe {
    uint8_t opcode, flags;
    uint16_t ioprio;
    int32_t fd;
    uint64_t off, addr;
    uint32_t len, rw_flags;
    uint64_t user_data;
    uint16_t buf_index, personality;
    uint32_t file_index;
    uint64_t unused[2];
};

struct cqe {
    uint64_t user_data;
    int32_t res;
    uint32_t flags;
};

struct params {
    uint32_t sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle, features, wq_fd, unused[3];
    struct {
        uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, unused[3];
    } sq;
    struct {
        uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, unused[3];
    } cq;
};

struct probe {
    uint8_t last_op, n_ops;
    uint16_t unused[7];
    struct {
        uint8_t op, unused;
        uint16_t flags;
        uint32_t unused2;
    } ops[N_OPS];
};

_Static_assert(sizeof(struct sqe) == 64 && sizeof(struct cqe) == 16 && sizeof(struct params) == 120 &&
                   sizeof(struct probe) == 16 + 8 * N_OPS,
               "the kernel's layouts");

/* ---- The ring ---------------------------------------------------------------------------------------------------- */

enum {
    MAX_REGIONS = 64,
    REGION_SIZE = 1 << 30, /* the most that the kernel takes as one buffer */
    MAX_TRIES = 1000,
};

struct io_uring {
    int fd;
    void *rings; /* both, since Linux 5.4 */
    size_t rings_size, sqes_size;
    struct sqe *sqes;
    const _Atomic uint32_t *sq_head;
    _Atomic uint32_t *sq_tail; /* under submit_lock */
    uint32_t sq_mask;
    _Atomic uint32_t *cq_head; /* under collect_lock */
    const _Atomic uint32_t *cq_tail;
    uint32_t cq_mask;
    const struct cqe *cqes;
    int n_regions;
    struct iovec regions[MAX_REGIONS]; /* registered memory */
};

static int enter(const struct io_uring *u, uint32_t to_submit, uint32_t min_complete, uint32_t flags) {
    return (int)syscall(CALL_ENTER, u->fd, to_submit, min_complete, flags, NULL, 0);
}

static int region_of(const struct io_uring *u, const void *dst, uint32_t size) {
    const uintptr_t at = (uintptr_t)dst;
    for (int i = 0; i < u->n_regions; i++) {
        const uintptr_t base = (uintptr_t)u->regions[i].iov_base;
        if (at >= base && at - base <= u->regions[i].iov_len && size <= u->regions[i].iov_len - (at - base)) return i;
    }
    return -1;
}

static void fill(struct io *io, uint32_t index, struct sqe *sqe) {
    struct io_slot *slot = &io->slots[index];
    uint64_t offset;
    void *dst;
    const uint32_t size = io_slot_next(slot, &offset, &dst);
    const int region = region_of(io->uring, dst, size);
    *sqe = (struct sqe){
        .opcode = region >= 0 ? OP_READ_FIXED : OP_READ,
        .fd = io->files[slot->read.file].fd,
        .off = offset,
        .addr = (uintptr_t)dst,
        .len = size,
        .user_data = index,
        .buf_index = region >= 0 ? (uint16_t)region : 0,
    };
    /* The slot goes from this thread to the one that collects by way of the kernel: said once more in C's terms. */
    atomic_store_explicit(&slot->sent, true, memory_order_release);
}

/* The ring has an entry for every slot and the kernel takes entries out before enter returns, so there is room. */
void io_uring_send(struct io *io, const uint32_t *slots, int n) {
    struct io_uring *u = io->uring;
    uint32_t tail = atomic_load_explicit(u->sq_tail, memory_order_relaxed);
    for (int i = 0; i < n; i++) fill(io, slots[i], &u->sqes[tail++ & u->sq_mask]);
    atomic_store_explicit(u->sq_tail, tail, memory_order_release);
    int sent = 0, error = 0;
    for (int tries = 0; sent < n && tries < MAX_TRIES; tries++) {
        const int taken = enter(u, (uint32_t)(n - sent), 0, 0);
        if (taken > 0) {
            sent += taken;
            tries = 0;
            continue;
        }
        error = taken < 0 ? errno : EAGAIN;
        if (error != EINTR && error != EAGAIN && error != EBUSY && error != ENOMEM) break;
        sched_yield();
    }
    if (sent == n) return;
    atomic_store_explicit(u->sq_tail, tail - (uint32_t)(n - sent), memory_order_release); /* nobody has seen them */
    for (int i = sent; i < n; i++) {
        io->slots[slots[i]].error = error;
        atomic_store_explicit(&io->slots[slots[i]].sent, false, memory_order_relaxed);
        io_queue_push(&io->failed, slots[i]);
    }
}

int io_uring_collect(struct io *io, struct io_done *done, int max) {
    struct io_uring *u = io->uring;
    uint32_t head = atomic_load_explicit(u->cq_head, memory_order_relaxed);
    const uint32_t tail = atomic_load_explicit(u->cq_tail, memory_order_acquire);
    int n = 0;
    while (head != tail && n < max) {
        const struct cqe cqe = u->cqes[head++ & u->cq_mask];
        atomic_store_explicit(u->cq_head, head, memory_order_release);
        const uint32_t index = (uint32_t)cqe.user_data;
        if (cqe.user_data >= (uint64_t)io->depth) continue; /* none of ours: cannot be */
        struct io_slot *slot = &io->slots[index];
        if (!atomic_exchange_explicit(&slot->sent, false, memory_order_acquire)) continue;
        if (io_slot_advance(io, slot, cqe.res)) {
            io_slot_finish(io, index, &done[n++]);
        } else {
            pthread_mutex_lock(&io->submit_lock);
            io_uring_send(io, &index, 1);
            pthread_mutex_unlock(&io->submit_lock);
        }
    }
    return n;
}

void io_uring_sleep(struct io *io) {
    enter(io->uring, 0, 1, ENTER_GETEVENTS); /* whatever woke us, the caller looks */
}

int io_uring_register(struct io *io, void *memory, size_t size) {
    struct io_uring *u = io->uring;
    int n = u->n_regions;
    if (atomic_load(&io->in_flight) != 0) return -1; /* they may be using the regions that are about to be replaced */
    for (size_t at = 0; at < size; at += REGION_SIZE) {
        if (n == MAX_REGIONS) return -1;
        u->regions[n++] = (struct iovec){(char *)memory + at, size - at < REGION_SIZE ? size - at : REGION_SIZE};
    }
    if (u->n_regions > 0) syscall(CALL_REGISTER, u->fd, UNREGISTER_BUFFERS, NULL, 0);
    if (syscall(CALL_REGISTER, u->fd, REGISTER_BUFFERS, u->regions, n) == 0) {
        u->n_regions = n;
        return 0;
    }
    if (u->n_regions > 0 && syscall(CALL_REGISTER, u->fd, REGISTER_BUFFERS, u->regions, u->n_regions) != 0)
        u->n_regions = 0; /* what was registered before could not be again */
    return -1;
}

/* ---- Starting and stopping --------------------------------------------------------------------------------------- */

static const char *refusal(int error) {
    switch (error) {
    case EPERM: return "not permitted here (a container's seccomp filter, or the sysctl kernel.io_uring_disabled)";
    case ENOSYS: return "this kernel has none, or a container's seccomp filter hides it";
    case ENOMEM: return "out of memory, or of what may be locked (ulimit -l)";
    default: return strerror(error);
    }
}

static int can_read(const struct io_uring *u) {
    struct probe probe = {0};
    if (syscall(CALL_REGISTER, u->fd, REGISTER_PROBE, &probe, N_OPS) != 0) return 0;
    return probe.last_op >= OP_READ && (probe.ops[OP_READ].flags & OP_SUPPORTED) != 0;
}

static int map_rings(struct io_uring *u, const struct params *p) {
    const size_t sq_size = p->sq.array + p->sq_entries * sizeof(uint32_t);
    const size_t cq_size = p->cq.cqes + p->cq_entries * sizeof(struct cqe);
    u->rings_size = sq_size > cq_size ? sq_size : cq_size;
    u->sqes_size = p->sq_entries * sizeof(struct sqe);
    const int prot = PROT_READ | PROT_WRITE, flags = MAP_SHARED | MAP_POPULATE;
    u->rings = mmap(NULL, u->rings_size, prot, flags, u->fd, OFFSET_RINGS);
    if (u->rings == MAP_FAILED) return -1;
    u->sqes = mmap(NULL, u->sqes_size, prot, flags, u->fd, OFFSET_SQES);
    if (u->sqes == MAP_FAILED) return -1;
    char *base = u->rings;
    u->sq_head = (const _Atomic uint32_t *)(base + p->sq.head);
    u->sq_tail = (_Atomic uint32_t *)(base + p->sq.tail);
    u->sq_mask = *(const uint32_t *)(base + p->sq.ring_mask);
    u->cq_head = (_Atomic uint32_t *)(base + p->cq.head);
    u->cq_tail = (const _Atomic uint32_t *)(base + p->cq.tail);
    u->cq_mask = *(const uint32_t *)(base + p->cq.ring_mask);
    u->cqes = (const struct cqe *)(base + p->cq.cqes);
    uint32_t *array = (uint32_t *)(base + p->sq.array); /* entries are used in their order, always */
    for (uint32_t i = 0; i < p->sq_entries; i++) array[i] = i;
    return 0;
}

int io_uring_start(struct io *io, char *err, size_t err_len) {
    struct io_uring *u = io->uring = calloc(1, sizeof *u);
    if (u == NULL) {
        snprintf(err, err_len, "out of memory for io_uring");
        return -1;
    }
    struct params p = {0};
    u->rings = u->sqes = MAP_FAILED;
    u->fd = (int)syscall(CALL_SETUP, (unsigned)io->depth, &p);
    if (u->fd < 0) {
        snprintf(err, err_len, "io_uring is refused: %s", refusal(errno));
    } else if ((p.features & FEATURE_SINGLE_MMAP) == 0 || !can_read(u)) {
        snprintf(err, err_len, "io_uring of this kernel is too old: Linux 5.6 or later is needed");
    } else if (map_rings(u, &p) != 0) {
        snprintf(err, err_len, "io_uring cannot be mapped: %s", strerror(errno));
    } else {
        io->ready_head = u->cq_head;
        io->ready_tail = u->cq_tail;
        return 0;
    }
    io_uring_stop(io);
    return -1;
}

void io_uring_stop(struct io *io) {
    struct io_uring *u = io->uring;
    if (u->rings != MAP_FAILED) munmap(u->rings, u->rings_size);
    if (u->sqes != MAP_FAILED) munmap(u->sqes, u->sqes_size);
    if (u->fd >= 0) close(u->fd);
    free(u);
    io->uring = NULL;
}

#else /* not Linux */

int io_uring_start(struct io *io, char *err, size_t err_len) {
    (void)io;
    snprintf(err, err_len, "io_uring is refused: only Linux has it");
    return -1;
}
void io_uring_send(struct io *io, const uint32_t *slots, int n) {
    (void)io, (void)slots, (void)n;
}
int io_uring_collect(struct io *io, struct io_done *done, int max) {
    (void)io, (void)done, (void)max;
    return 0;
}
void io_uring_sleep(struct io *io) {
    (void)io;
}
void io_uring_stop(struct io *io) {
    (void)io;
}
int io_uring_register(struct io *io, void *memory, size_t size) {
    (void)io, (void)memory, (void)size;
    return -1;
}

#endif
