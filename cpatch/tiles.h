/* tiles.h - the arithmetic of FFNs for many tokens at once: weights are unpacked into a tile that stays in the second
 * cache level, and then meet all tokens. kernels.h serves few tokens, whose weights are used straight from memory.
 *
 * Dot products (gate, up). A row of n weights is packed by 512 values: 16 blocks of 32, of which vector i of 8
 * holds four bytes of every block, then a float of every block (its scale), then another (its minimum, of types that have
 * one). So 8 multiplications of bytes give the integer dot products of 16 blocks in the 16 lanes of one
 * vector, and one multiply-add with their scales turns them into floats. Inputs are packed in the same way, from what
 * kernel_round_input() makes of them: bytes, scales, and the blocks' sums, negated, by which a bias of the weights (which
 * the instruction wants without a sign) is taken off before anything is rounded.
 *
 * Sums of columns (down). Columns and activations are rounded to bfloat16: that moves the output by 0.24 %, where stock's
 * rounding to 8 bits with shared scales moves it by 0.7 to 0.9 % (random data, tests/test_tiles.py bounds both). They are
 * added pairwise, by instructions that do two fused multiply-adds one after the other; a pair is neurons 2 k and 2 k + 1.
 * Whether pairs whose activations are both zero are left out does not change a bit.
 *
 * Every routine comes in a sparse and a dense form with the same bits: which of them is used for a tile is a matter of
 * speed alone (tile_dense_share). All need AVX-512 with VNNI and BF16. */
#ifndef POWERINFER_TILES_H
#define POWERINFER_TILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    TILE_VALUES = 512,     /* values that are packed together */
    TILE_GROUP_ROWS = 4,   /* tile_products(): rows per call are a multiple of it */
    TILE_GROUP_INPUTS = 3, /* and inputs at most this many */
    TILE_WIDTH = 256,      /* outputs that tiles of columns are wide */
    TILE_PAIRS = 128,      /* pairs of columns of a tile */
    TILE_GROUP_SUMS = 6,   /* tokens that tile_sums_dense() takes */
};

/* Whether the instructions are there and in use (kernel_force), */
bool tile_available(void);
/* and there is a form of the type for dot products. Columns may have any type that can be dequantised. */
bool tile_has_type(int type);

/* Bytes of a packed row or input of n values. */
size_t tile_row_size(int type, int64_t n);
size_t tile_input_size(int64_t n);

/* Packs n weights of a type, or n values as kernel_round_input() gives them for the weight type. 64-byte aligned. */
void tile_pack_row(int type, int64_t n, const uint8_t *row, uint8_t *packed);
void tile_pack_input(int type, int64_t n, const uint8_t *xq, uint8_t *packed);

/* out[k] = dot(rows[k], x), k < n_rows. n: of the values before packing. */
void tile_dots(int type, int64_t n, const uint8_t *const *rows, int n_rows, const uint8_t *x, float *out);

/* out[i * n_rows + k] = dot(row k, xs[i]); rows lie one after the other; n_rows is a multiple of TILE_GROUP_ROWS. */
void tile_products(int type, int64_t n, const uint8_t *rows, int n_rows, const uint8_t *const *xs, int n_xs, float *out);

/* Bit k is set where bytes[k] is not zero. */
uint64_t tile_mask(const uint8_t bytes[64]);

/* Packs `width` values, a multiple of 16 and at most TILE_WIDTH, of two columns (NULL: zeros) from their first on, with
 * zeros behind them. scales: of I8 columns. tmp: 2 * TILE_WIDTH floats. */
void tile_pack_pair(int type, const uint8_t *even, const uint8_t *odd, const uint16_t *even_scales,
                    const uint16_t *odd_scales, int width, uint32_t *packed, float *tmp);

/* A value as a bfloat16, and n of them as pairs, the even one in the upper half; a last pair's odd one may be missing. */
uint16_t tile_bf16(float value);
void tile_pack_activations(const float *values, int64_t n, uint32_t *pairs);

/* The pairs of TILE_PAIRS whose activations are not both zero: which, and their activations, with room for 16 more.
 * Returns how many. */
int tile_list_pairs(const uint32_t *pairs, uint32_t *which, uint32_t *activations);

/* y[0..TILE_WIDTH) += sums of the listed pairs' columns. */
void tile_sums_sparse(const uint32_t *tile, const uint32_t *which, const uint32_t *activations, int n, float *y);

/* The same with all TILE_PAIRS pairs for TILE_GROUP_SUMS tokens: pairs[i], y + i * stride. */
void tile_sums_dense(const uint32_t *tile, const uint32_t *const *pairs, float *y, int64_t stride);

/* The share of wanted combinations of row or pair and token from which on the dense forms are faster: measured by the first
 * call, in a millisecond or two. tile_force_dense_share() is for tests: 0 always dense, 2 never, negative measured. */
float tile_dense_share_dots(void);
float tile_dense_share_sums(void);
void tile_force_dense_share(float share);

#endif
