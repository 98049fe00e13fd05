/* vgguf.c - a GGUF that exists only as a stdio stream. See powerinfer.h.
 *
 * llama_model_load_from_file_ptr reads through a FILE*. fopencookie lets us answer the reads: the header from
 * memory, kept tensors from the real file, and nothing at all for the FFN tensors that our buffer type serves. */
#define _GNU_SOURCE
#include "powerinfer.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct pi_vgguf {
    int *fds, n_files;
    bool drop;
    FILE *file;
    uint8_t *header;
    int64_t header_size, size, pos;
    int n_extents;
    struct pi_extent *extents;
    int error; /* errno of the first failed read, and where it was */
    int error_file;
    int64_t error_offset;
};

static const struct pi_extent *find_extent(const struct pi_vgguf *v, int64_t pos) {
    int lo = 0, hi = v->n_extents;
    while (lo < hi) { /* the first extent that ends after pos */
        const int mid = (lo + hi) / 2;
        if (v->extents[mid].offset + v->extents[mid].size <= pos) lo = mid + 1;
        else hi = mid;
    }
    return lo < v->n_extents ? &v->extents[lo] : NULL;
}

static ssize_t vgguf_read(void *cookie, char *buf, size_t size) {
    struct pi_vgguf *v = cookie;
    size_t done = 0;
    if ((uint64_t)size > (uint64_t)(v->size - v->pos)) size = (size_t)(v->size - v->pos);
    while (done < size) {
        const int64_t left = (int64_t)(size - done);
        const struct pi_extent *e = find_extent(v, v->pos);
        int64_t n;
        if (v->pos < v->header_size) {
            n = v->header_size - v->pos < left ? v->header_size - v->pos : left;
            memcpy(buf + done, v->header + v->pos, (size_t)n);
        } else if (e == NULL || v->pos < e->offset) { /* alignment padding between extents */
            const int64_t end = e == NULL ? v->size : e->offset;
            n = end - v->pos < left ? end - v->pos : left;
            memset(buf + done, 0, (size_t)n);
        } else {
            const int64_t in = v->pos - e->offset;
            n = e->size - in < left ? e->size - in : left;
            if (e->file_offset >= 0) {
                const off_t from = (off_t)(e->file_offset + in);
                const ssize_t got = pread(v->fds[e->file], buf + done, (size_t)n, from);
                if (got < 0 && errno == EINTR) continue;
                if (got <= 0) {
                    v->error = got < 0 ? errno : ENODATA;
                    v->error_file = e->file;
                    v->error_offset = e->file_offset + in;
                    errno = EIO;
                    return done > 0 ? (ssize_t)done : -1;
                }
                n = got;
                if (v->drop) (void)posix_fadvise(v->fds[e->file], from, (off_t)got, POSIX_FADV_DONTNEED);
            }
        }
        v->pos += n;
        done += (size_t)n;
    }
    return (ssize_t)done;
}

static int vgguf_seek(void *cookie, off64_t *offset, int whence) {
    struct pi_vgguf *v = cookie;
    const int64_t base = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? v->pos : v->size;
    int64_t pos;
    if (__builtin_add_overflow(base, (int64_t)*offset, &pos) || pos < 0 || pos > v->size) {
        errno = EINVAL;
        return -1;
    }
    v->pos = pos;
    *offset = pos;
    return 0;
}

/* Opens the files again and checks the extents against their sizes. */
static int extents_fit(const struct pi_extent *extents, int n, int64_t header_size, const int *fds, int n_files) {
    int64_t end = header_size;
    for (int i = 0; i < n; i++) {
        const struct pi_extent *e = &extents[i];
        if (e->size < 0 || e->offset < end || e->size > INT64_MAX - e->offset) return 0;
        if (e->file_offset < -1) return 0;
        struct stat st;
        if (e->file_offset >= 0 && (e->file < 0 || e->file >= n_files || fstat(fds[e->file], &st) != 0 ||
                                    e->file_offset > st.st_size || e->size > st.st_size - e->file_offset))
            return 0;
        end = e->offset + e->size;
    }
    return 1;
}

struct pi_vgguf *pi_vgguf_open(const int *fds, int n_files, bool drop, const void *header, int64_t header_size,
                               const struct pi_extent *extents, int n_extents, char *err, size_t err_len) {
    if (header_size <= 0 || n_files < 0 || n_extents < 0 ||
        !extents_fit(extents, n_extents, header_size, fds, n_files)) {
        snprintf(err, err_len, "the virtual GGUF's extents overlap or reach past the end of the file");
        return NULL;
    }
    struct pi_vgguf *v = calloc(1, sizeof *v);
    if (v == NULL) goto no_memory;
    v->drop = drop;
    v->fds = calloc((size_t)n_files + 1, sizeof *v->fds);
    if (v->fds == NULL) goto no_memory;
    for (; v->n_files < n_files; v->n_files++) {
        v->fds[v->n_files] = dup(fds[v->n_files]);
        if (v->fds[v->n_files] >= 0) continue;
        snprintf(err, err_len, "cannot duplicate a file descriptor: %s", strerror(errno));
        pi_vgguf_close(v);
        return NULL;
    }
    v->header = malloc((size_t)header_size);
    v->extents = calloc((size_t)n_extents + 1, sizeof v->extents[0]);
    if (v->header == NULL || v->extents == NULL) goto no_memory;
    memcpy(v->header, header, (size_t)header_size);
    memcpy(v->extents, extents, (size_t)n_extents * sizeof extents[0]);
    v->header_size = header_size;
    v->n_extents = n_extents;
    v->size = n_extents == 0 ? header_size : extents[n_extents - 1].offset + extents[n_extents - 1].size;
    v->file = fopencookie(v, "rb", (cookie_io_functions_t){.read = vgguf_read, .seek = vgguf_seek});
    if (v->file != NULL) {
        /* ggml reads a vocabulary string by string; a failure here only leaves the small default buffer. */
        (void)setvbuf(v->file, NULL, _IOFBF, 1 << 18);
        return v;
    }
no_memory:
    snprintf(err, err_len, "no memory for the virtual GGUF");
    pi_vgguf_close(v);
    return NULL;
}

void *pi_vgguf_file(struct pi_vgguf *v) {
    return v->file;
}

int pi_vgguf_error(struct pi_vgguf *v, int *file, int64_t *offset) {
    *file = v->error_file;
    *offset = v->error_offset;
    return v->error;
}

void pi_vgguf_close(struct pi_vgguf *v) {
    if (v == NULL) return;
    if (v->file != NULL) fclose(v->file);
    for (int i = 0; i < v->n_files; i++) close(v->fds[i]);
    free(v->fds);
    free(v->header);
    free(v->extents);
    free(v);
}
