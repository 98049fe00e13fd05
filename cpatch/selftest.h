/* selftest.h - one small FFN through ggml's scheduler and our backend, against plain C. */
#ifndef POWERINFER_SELFTEST_H
#define POWERINFER_SELFTEST_H

#include <stddef.h>

/* Run once after registering. Proves on the library at hand what docs/SEAM.md promises: that the scheduler gives us
 * up, GLU and down in one split, that our sparse path ran, and that the result is right. Takes about a millisecond.
 * Returns 0, or -1 with a sentence. */
int selftest_run(char *err, size_t err_len);

#endif
