/* io.h - many reads in flight from the files of one model.
 *
 * Reads bypass the page cache (O_DIRECT) where the file system allows it, so that memory holds what we decided to keep
 * and nothing else. Two engines behind one interface: io_uring by raw system calls, and a pool of threads that pread,
 * for kernels and containers that refuse io_uring. Which one runs is decided when the io is opened.
 *
 * A read that the file ends within fails with ENODATA; a file that is truncated while it is open is noticed that way,
 * one that is overwritten in place is not. EINTR and its like are retried, short reads continued.
 *
 * O_DIRECT wants offsets, lengths and addresses that are multiples of the device's block (io_align()). Callers ask for
 * any range of a file; what is read is the smallest aligned window around it, so dst must be aligned and have room for
 * io_window(offset, size, align) bytes, and the wanted bytes begin at dst + offset % align. io_align() is 1 for a file
 * that is read through the page cache.
 *
 * Destinations in huge pages (2 MiB aligned, MADV_HUGEPAGE) cost the kernel a sixth of the work for large reads and let
 * them reach the device in fewer pieces: 2.6 GB/s instead of 1.9 at 256 KiB where it was measured. io_register then
 * gains next to nothing.
 *
 * Threads: any thread may submit and poll at any time; an io serialises what it has to. Nothing is allocated after
 * io_open(). */
#ifndef POWERINFER_IO_H
#define POWERINFER_IO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum io_engine { IO_AUTO = 0, IO_URING = 1, IO_THREADS = 2 };

struct io_options {
    enum io_engine engine; /* IO_AUTO: io_uring where it works, else threads */
    int depth;             /* reads in flight at most, up to 4096; more wait with the caller (see io_submit). 0: 64 */
    bool buffered;         /* never O_DIRECT: for tests, and as the fall-back is chosen per file anyway */
};

struct io_read {
    int file;        /* index into the files given to io_open */
    uint64_t offset; /* in the file */
    uint32_t size;
    void *dst;       /* aligned to io_align(); see above */
    uint64_t tag;    /* handed back on completion */
};

struct io_done {
    uint64_t tag;
    int error;       /* 0, or an errno; ENODATA: the file ended before the range did */
    int file;
    uint64_t offset; /* where the failure was; for a success, the read's own offset */
};

struct io;

/* Opens the engine. fds are reopened (O_DIRECT where possible), the caller's stay his. NULL with a sentence in err. */
struct io *io_open(const int *fds, int n_files, const struct io_options *options, char *err, size_t err_len);
void io_close(struct io *io); /* waits for what is in flight; NULL is allowed */

enum io_engine io_engine(const struct io *io);
bool io_direct(const struct io *io, int file); /* does this file bypass the page cache? */
uint32_t io_align(const struct io *io);        /* the strictest of all files' alignments, a power of two */
uint64_t io_window(uint64_t offset, uint64_t size, uint32_t align);

/* Starts reads. Returns how many of them were taken, in order; fewer than n when the queue is full: poll, then submit
 * the rest. Never blocks on the device. */
int io_submit(struct io *io, const struct io_read *reads, int n);

/* Collects completions, at most max. wait: sleep until there is at least one, unless nothing is in flight. Returns
 * their number; 0 with wait means that nothing is in flight. Cheap when there is nothing to collect. */
int io_poll(struct io *io, struct io_done *done, int max, bool wait);

int io_in_flight(const struct io *io);

/* Optional: lets the kernel pin the memory once instead of at every read. The memory is resident from then on and must
 * stay mapped until io_close. Only while nothing is in flight; io_uring only. Failure (often RLIMIT_MEMLOCK) only costs
 * time; returns 0 or -1. */
int io_register(struct io *io, void *memory, size_t size);

/* Totals since io_open. */
struct io_stats {
    uint64_t reads, bytes, windows; /* bytes: wanted; windows: what was really read, alignment included */
    uint64_t wait_ns;               /* time spent sleeping in io_poll */
};
void io_get_stats(const struct io *io, struct io_stats *out);

/* What a read of a given size costs on this device with `depth` in flight: seconds = latency + size / bandwidth.
 * Fitted from random reads of 4 KiB to 1 MiB within the file, taking about `seconds` in all and 8 MiB of memory, which
 * is also the most that is in flight. Each place is read twice and the second time counts, as streaming reads the same
 * cold weights again and again: where a virtual machine's host has a cache, the first reading can cost a hundred times
 * as much (and measuring then takes seconds). Returns 0 or -1. */
struct io_cost {
    double latency;   /* seconds per read at that depth: one over the rate of tiny reads; 0: lost in noise */
    double bandwidth; /* bytes per second for large reads */
    double first;     /* how many times as long reads take at places that were not read before, 1 at least */
};
int io_measure(struct io *io, int file, uint64_t file_size, double seconds, struct io_cost *out, char *err,
               size_t err_len);

/* Fault injection for tests: the n-th read from now (0: the next) is answered with the given errno (EINTR, EAGAIN and
 * ECANCELED are then retried, as from the device), or, when short_by is not 0, sees a file that ends short_by bytes
 * before the read does. Once; n < 0 switches it off. */
void io_inject(struct io *io, int64_t n, int error, uint32_t short_by);

/* Reads size bytes at offset through the page cache, here and now: for what is read once, before anything runs.
 * Returns 0, EIO at the end of the file, or the errno. */
int io_read_now(int fd, void *dst, size_t size, int64_t offset);

#endif
