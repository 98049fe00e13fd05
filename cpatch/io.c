/* io.c - files, slots, and the interface over the two engines. See io.h and io_engine.h. */
#define _GNU_SOURCE
#include "io_engine.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    DEFAULT_DEPTH = 64,
    MAX_DEPTH = 4096,
    MAX_ALIGN = 1 << 20, /* a device that wants more is read through the page cache */
    MAX_RETRIES = 1000,
    MAX_CHUNK = 1 << 30, /* Linux reads less than 2 GiB at once */
    PAGE = 4096,
};

/* ---- Queues of slots --------------------------------------------------------------------------------------------- */

int io_queue_init(struct io_queue *queue, int capacity) {
    uint32_t size = 1;
    while (size < (uint32_t)capacity) size *= 2;
    queue->slots = calloc(size, sizeof *queue->slots);
    queue->mask = size - 1;
    return queue->slots != NULL ? 0 : -1;
}

void io_queue_free(struct io_queue *queue) {
    free(queue->slots);
    queue->slots = NULL;
}

bool io_queue_empty(const struct io_queue *queue) {
    return atomic_load_explicit(&queue->head, memory_order_relaxed) ==
           atomic_load_explicit(&queue->tail, memory_order_acquire);
}

bool io_queue_push(struct io_queue *queue, uint32_t slot) {
    const uint32_t tail = atomic_load_explicit(&queue->tail, memory_order_relaxed);
    if (tail - atomic_load_explicit(&queue->head, memory_order_acquire) > queue->mask) return false;
    queue->slots[tail & queue->mask] = slot;
    atomic_store_explicit(&queue->tail, tail + 1, memory_order_release);
    return true;
}

bool io_queue_pop(struct io_queue *queue, uint32_t *slot) {
    const uint32_t head = atomic_load_explicit(&queue->head, memory_order_relaxed);
    if (head == atomic_load_explicit(&queue->tail, memory_order_acquire)) return false;
    *slot = queue->slots[head & queue->mask];
    atomic_store_explicit(&queue->head, head + 1, memory_order_release);
    return true;
}

/* ---- Files ------------------------------------------------------------------------------------------------------- */

/* A file description of our own, so that flags and advice do not change the caller's. -1 where there is no way. */
static int reopen(int fd, int flags) {
    char path[1024];
#if defined(__linux__)
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
#elif defined(F_GETPATH)
    if (fcntl(fd, F_GETPATH, path) != 0) return -1;
#else
    (void)fd;
    errno = ENOTSUP;
    return -1;
#endif
    return open(path, O_RDONLY | O_CLOEXEC | flags);
}

#ifdef O_DIRECT
/* The alignment that the kernel names for this file: 0 when it has no O_DIRECT, -1 when it does not say (before Linux
 * 6.1, and some file systems). */
static int64_t stated_alignment(int fd) {
#ifdef SYS_statx
    enum { STATX_DIOALIGN_BIT = 0x2000, EMPTY_PATH = 0x1000 };
    struct { /* struct statx; the system's headers may not know the last two yet */
        uint32_t mask, unused[37], dio_mem_align, dio_offset_align;
        uint64_t rest[12];
    } stat;
    _Static_assert(sizeof stat == 256 && offsetof(__typeof__(stat), dio_mem_align) == 0x98, "struct statx");
    memset(&stat, 0, sizeof stat);
    if (syscall(SYS_statx, fd, "", EMPTY_PATH, STATX_DIOALIGN_BIT, &stat) != 0) return -1;
    if ((stat.mask & STATX_DIOALIGN_BIT) == 0) return -1;
    return stat.dio_mem_align > stat.dio_offset_align ? stat.dio_mem_align : stat.dio_offset_align;
#else
    (void)fd;
    return -1;
#endif
}

static bool alignment_works(int fd, uint32_t align) {
    void *memory;
    /* At an address that is not aligned more strictly than asked, or the probe would prove nothing. */
    if (posix_memalign(&memory, 2 * (size_t)align, 2 * (size_t)align) != 0) return false;
    const ssize_t got = pread(fd, (char *)memory + align, align, 0);
    free(memory);
    return got >= 0;
}

/* Turns file into an O_DIRECT one if its file system can. */
static void try_direct(int fd, struct io_file *file) {
    const int direct = reopen(fd, O_DIRECT);
    if (direct < 0) return;
    const int64_t stated = stated_alignment(direct);
    uint32_t align = 0;
    if (stated > 0 && stated <= MAX_ALIGN && (stated & (stated - 1)) == 0 && alignment_works(direct, (uint32_t)stated))
        align = (uint32_t)stated;
    for (uint32_t a = 512; stated < 0 && align == 0 && a <= PAGE; a *= 8)
        if (alignment_works(direct, a)) align = a;
    if (align == 0) {
        close(direct);
        return;
    }
    *file = (struct io_file){.fd = direct, .direct = true, .align = align};
}
#elif defined(F_NOCACHE)
static void try_direct(int fd, struct io_file *file) { /* macOS: no alignment asked for, the cache is passed by */
    const int direct = reopen(fd, 0);
    if (direct < 0) return;
    if (fcntl(direct, F_NOCACHE, 1) == 0) *file = (struct io_file){.fd = direct, .direct = true, .align = 1};
    else close(direct);
}
#else
static void try_direct(int fd, struct io_file *file) {
    (void)fd;
    (void)file;
}
#endif

static int open_file(int fd, bool buffered, struct io_file *file) {
    *file = (struct io_file){.fd = -1, .align = 1};
    if (!buffered) try_direct(fd, file);
    if (file->fd >= 0) return 0;
    file->fd = reopen(fd, 0);
    if (file->fd >= 0) {
#ifdef POSIX_FADV_RANDOM
        posix_fadvise(file->fd, 0, 0, POSIX_FADV_RANDOM); /* no read-ahead: what is near is rarely wanted */
#endif
        return 0;
    }
    file->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0); /* no /proc, or no permission any more */
    return file->fd >= 0 ? 0 : -1;
}

/* Gives back the pages that a buffered read has left in the page cache: the copy in dst is the one that counts. */
static void drop_cache(const struct io_file *file, uint64_t offset, uint64_t size) {
#ifdef POSIX_FADV_DONTNEED
    const uint64_t begin = offset / PAGE * PAGE;
    posix_fadvise(file->fd, (off_t)begin, (off_t)((offset + size + PAGE - 1) / PAGE * PAGE - begin),
                  POSIX_FADV_DONTNEED);
#else
    (void)file;
    (void)offset;
    (void)size;
#endif
}

/* ---- Slots ------------------------------------------------------------------------------------------------------- */

uint64_t io_window(uint64_t offset, uint64_t size, uint32_t align) {
    const uint64_t before = offset % align;
    return (before + size + align - 1) / align * align;
}

uint32_t io_slot_next(const struct io_slot *slot, uint64_t *offset, void **dst) {
    const uint64_t left = slot->window - slot->got;
    *offset = slot->begin + slot->got;
    *dst = (char *)slot->read.dst + slot->got;
    return left < MAX_CHUNK ? (uint32_t)left : MAX_CHUNK;
}

bool io_slot_advance(struct io *io, struct io_slot *slot, int64_t result) {
    if (slot->fault != 0) {
        result = -slot->fault;
        slot->fault = 0;
    }
    /* ECANCELED: the thread that submitted this read has ended before the device was asked. */
    if ((result == -EINTR || result == -EAGAIN || result == -ECANCELED) && slot->retries++ < MAX_RETRIES) return false;
    if (result < 0) {
        slot->error = (int)-result;
        return true;
    }
    slot->retries = 0;
    const uint64_t at = slot->begin + slot->got;
    if (at + (uint64_t)result > slot->cut) result = slot->cut > at ? (int64_t)(slot->cut - at) : 0;
    const uint64_t got = slot->got + (uint64_t)result;
    if (slot->begin + got >= slot->read.offset + slot->read.size) { /* the rest of the window may be beyond the end */
        slot->got = got;
        return true;
    }
    /* A short read that stops within a block is the end of the file, but only asking again makes sure of it. */
    const uint64_t whole = got - got % io->files[slot->read.file].align;
    if (whole <= slot->got) {
        slot->got = got;
        slot->error = ENODATA;
        return true;
    }
    slot->got = whole;
    return false;
}

void io_slot_finish(struct io *io, uint32_t index, struct io_done *done) {
    struct io_slot *slot = &io->slots[index];
    const struct io_read *read = &slot->read;
    uint64_t offset = read->offset;
    if (slot->error != 0 && slot->begin + slot->got > offset) offset = slot->begin + slot->got;
    *done = (struct io_done){.tag = read->tag, .error = slot->error, .file = read->file, .offset = offset};
    if (slot->got > 0 && !io->files[read->file].direct) drop_cache(&io->files[read->file], slot->begin, slot->got);
    io_queue_push(&io->unused, index);
}

/* Fills a slot. False: the read can be seen to fail without asking the device. */
static bool slot_begin(struct io *io, struct io_slot *slot, const struct io_read *read) {
    slot->read = *read;
    slot->begin = read->offset / io->align * io->align;
    slot->window = io_window(read->offset, read->size, io->align);
    slot->got = 0;
    slot->cut = UINT64_MAX;
    slot->fault = slot->retries = slot->error = 0;
    if (io->inject_in >= 0 && io->inject_in-- == 0) {
        const uint32_t missing = io->inject_short < read->size ? io->inject_short : read->size;
        if (missing != 0) slot->cut = read->offset + read->size - missing;
        else slot->fault = io->inject_error;
    }
    if (read->file < 0 || read->file >= io->n_files) slot->error = EBADF;
    else if (read->offset > INT64_MAX - (1ULL << 33)) slot->error = EINVAL; /* ends beyond what a file can hold */
    else if ((uintptr_t)read->dst % io->align != 0) slot->error = EINVAL;
    return slot->error == 0;
}

/* ---- The interface ----------------------------------------------------------------------------------------------- */

static int start_engine(struct io *io, enum io_engine wanted, char *err, size_t err_len) {
    io->engine = IO_URING;
    if (wanted != IO_THREADS && io_uring_start(io, err, err_len) == 0) return 0;
    if (wanted == IO_URING) return -1;
    io->engine = IO_THREADS;
    return io_threads_start(io, err, err_len);
}

static void stop_engine(struct io *io) {
    if (io->uring != NULL) io_uring_stop(io);
    if (io->pool != NULL) io_threads_stop(io);
}

static void free_io(struct io *io) {
    stop_engine(io);
    for (int i = 0; i < io->n_files; i++) close(io->files[i].fd);
    pthread_mutex_destroy(&io->submit_lock);
    pthread_mutex_destroy(&io->collect_lock);
    io_queue_free(&io->unused);
    io_queue_free(&io->failed);
    free(io->batch);
    free(io->slots);
    free(io->files);
    free(io);
}

static struct io *new_io(int n_files, int depth) {
    struct io *io = calloc(1, sizeof *io);
    if (io == NULL) return NULL;
    io->depth = depth;
    io->align = 1;
    io->inject_in = -1;
    pthread_mutex_init(&io->submit_lock, NULL);
    pthread_mutex_init(&io->collect_lock, NULL);
    io->files = calloc((size_t)n_files, sizeof *io->files);
    io->slots = calloc((size_t)depth, sizeof *io->slots);
    io->batch = calloc((size_t)depth, sizeof *io->batch);
    const int queues = io_queue_init(&io->unused, depth) | io_queue_init(&io->failed, depth);
    if (io->files == NULL || io->slots == NULL || io->batch == NULL || queues != 0) {
        free_io(io);
        return NULL;
    }
    for (int i = 0; i < depth; i++) io_queue_push(&io->unused, (uint32_t)i);
    return io;
}

struct io *io_open(const int *fds, int n_files, const struct io_options *options, char *err, size_t err_len) {
    int depth = options->depth <= 0 ? DEFAULT_DEPTH : options->depth;
    if (depth > MAX_DEPTH) depth = MAX_DEPTH;
    if (n_files < 1) {
        snprintf(err, err_len, "no files to read from");
        return NULL;
    }
    struct io *io = new_io(n_files, depth);
    if (io == NULL) {
        snprintf(err, err_len, "out of memory for %d reads in flight", depth);
        return NULL;
    }
    for (int i = 0; i < n_files; i++) {
        if (open_file(fds[i], options->buffered, &io->files[i]) != 0) {
            snprintf(err, err_len, "file %d (descriptor %d) cannot be opened again: %s", i, fds[i], strerror(errno));
            free_io(io);
            return NULL;
        }
        io->n_files++; /* as many as are open, for free_io */
        if (io->files[i].align > io->align) io->align = io->files[i].align;
    }
    if (start_engine(io, options->engine, err, err_len) != 0) {
        free_io(io);
        return NULL;
    }
    return io;
}

void io_close(struct io *io) {
    if (io == NULL) return;
    struct io_done done[64];
    while (io_poll(io, done, 64, true) > 0) continue;
    free_io(io);
}

enum io_engine io_engine(const struct io *io) {
    return io->engine;
}

bool io_direct(const struct io *io, int file) {
    return file >= 0 && file < io->n_files && io->files[file].direct;
}

uint32_t io_align(const struct io *io) {
    return io->align;
}

int io_in_flight(const struct io *io) {
    return atomic_load_explicit(&io->in_flight, memory_order_relaxed);
}

int io_submit(struct io *io, const struct io_read *reads, int n) {
    int taken = 0, n_batch = 0;
    uint64_t bytes = 0, windows = 0;
    pthread_mutex_lock(&io->submit_lock);
    for (uint32_t index; taken < n && io_queue_pop(&io->unused, &index); taken++) {
        struct io_slot *slot = &io->slots[index];
        if (slot_begin(io, slot, &reads[taken])) io->batch[n_batch++] = index;
        else io_queue_push(&io->failed, index);
        bytes += slot->read.size;
        windows += slot->window;
    }
    atomic_fetch_add_explicit(&io->in_flight, taken, memory_order_release);
    if (n_batch > 0 && io->engine == IO_URING) io_uring_send(io, io->batch, n_batch);
    if (n_batch > 0 && io->engine == IO_THREADS) io_threads_send(io, io->batch, n_batch);
    pthread_mutex_unlock(&io->submit_lock);
    atomic_fetch_add_explicit(&io->n_reads, (uint64_t)taken, memory_order_relaxed);
    atomic_fetch_add_explicit(&io->n_bytes, bytes, memory_order_relaxed);
    atomic_fetch_add_explicit(&io->n_windows, windows, memory_order_relaxed);
    return taken;
}

static bool ready(const struct io *io) {
    return atomic_load_explicit(io->ready_tail, memory_order_acquire) !=
               atomic_load_explicit(io->ready_head, memory_order_relaxed) ||
           !io_queue_empty(&io->failed);
}

static int collect(struct io *io, struct io_done *done, int max) {
    int n = 0;
    for (uint32_t index; n < max && io_queue_pop(&io->failed, &index);) io_slot_finish(io, index, &done[n++]);
    if (n < max) {
        n += io->engine == IO_URING ? io_uring_collect(io, done + n, max - n)
                                    : io_threads_collect(io, done + n, max - n);
    }
    if (n > 0) atomic_fetch_sub_explicit(&io->in_flight, n, memory_order_release);
    return n;
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Sleeps until something is ready; false when nothing is in flight. Under collect_lock, so that whatever is in flight
 * now cannot be taken by another before the engine wakes us. submit_lock makes sure that what is counted as in flight
 * has been handed to the engine or has failed. */
static bool sleep_until_ready(struct io *io) {
    pthread_mutex_lock(&io->submit_lock);
    const int in_flight = atomic_load_explicit(&io->in_flight, memory_order_acquire);
    pthread_mutex_unlock(&io->submit_lock);
    if (in_flight == 0) return false;
    if (ready(io)) return true;
    const uint64_t start = now_ns();
    if (io->engine == IO_URING) io_uring_sleep(io);
    else io_threads_sleep(io);
    atomic_fetch_add_explicit(&io->wait_ns, now_ns() - start, memory_order_relaxed);
    return true;
}

int io_poll(struct io *io, struct io_done *done, int max, bool wait) {
    if (max <= 0 || (!wait && !ready(io))) return 0;
    if (wait) pthread_mutex_lock(&io->collect_lock);
    else if (pthread_mutex_trylock(&io->collect_lock) != 0) return 0; /* another thread is collecting */
    int n;
    do n = collect(io, done, max);
    while (n == 0 && wait && sleep_until_ready(io));
    pthread_mutex_unlock(&io->collect_lock);
    return n;
}

int io_register(struct io *io, void *memory, size_t size) {
    if (io->engine != IO_URING) return -1;
    pthread_mutex_lock(&io->submit_lock);
    const int result = io_uring_register(io, memory, size);
    pthread_mutex_unlock(&io->submit_lock);
    return result;
}

void io_get_stats(const struct io *io, struct io_stats *out) {
    out->reads = atomic_load_explicit(&io->n_reads, memory_order_relaxed);
    out->bytes = atomic_load_explicit(&io->n_bytes, memory_order_relaxed);
    out->windows = atomic_load_explicit(&io->n_windows, memory_order_relaxed);
    out->wait_ns = atomic_load_explicit(&io->wait_ns, memory_order_relaxed);
}

void io_inject(struct io *io, int64_t n, int error, uint32_t short_by) {
    pthread_mutex_lock(&io->submit_lock);
    io->inject_in = n;
    io->inject_error = error;
    io->inject_short = short_by;
    pthread_mutex_unlock(&io->submit_lock);
}

int io_read_now(int fd, void *dst, size_t size, int64_t offset) {
    for (uint8_t *at = dst; size > 0;) {
        const ssize_t n = pread(fd, at, size, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return errno;
        if (n == 0) return EIO;
        at += n, size -= (size_t)n, offset += n;
    }
    return 0;
}
