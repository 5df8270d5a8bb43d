/* Sums and other reductions of several tensors into one, by element type. */
#ifndef COLROW_KERNELS_H
#define COLROW_KERNELS_H

#include <stddef.h>

/* X(name, bytes): the numbers are part of the interface to Python */
enum dtype {
  FLOAT32, FLOAT64, BFLOAT16, FLOAT16,
  INT8, UINT8, INT16, UINT16, INT32, UINT32, INT64, UINT64, BOOL,
  DTYPES
};

enum reduction { SUM, PRODUCT, MINIMUM, MAXIMUM, AVERAGE, BIT_AND, BIT_OR, BIT_XOR, REDUCTIONS };

size_t dtype_bytes(enum dtype dtype);

/* Averages are of floating-point numbers, bits of whole ones. */
int can_reduce(enum dtype dtype, enum reduction reduction);

/* output[i] = sources[0][i] + ... + sources[ranks - 1][i], added in this order, half precision in fp32; the
 * same into copy, unless that is NULL. output may be one of the sources. Maxima and minima pass NaN on. */
void reduce(enum dtype dtype, enum reduction reduction, void *output, void *copy, const void *const *sources,
            int ranks, size_t count);

/* What this processor's sums are computed with, for people. */
const char *kernel_set(void);

typedef void kernel_t(void *output, void *copy, const void *const *sources, int ranks, size_t count);

/* The sums of floating-point numbers in each instruction set: [dtype], FLOAT32 to FLOAT16. */
extern kernel_t *const sums_avx2[4], *const sums_avx512[4];

#endif
