/* Sums for processors that have more than every x86-64 has. The whole program is compiled for any of them;
 * only these functions are not, and they are called only where the processor says that it can. */
#include "kernels.h"

#if defined(__x86_64__)
#include "elements.h"

#if defined(__clang__)
#define WIDEST
#else
#define WIDEST ",prefer-vector-width=512" /* else GCC computes with half of it */
#endif

DEFINE_SUMS(avx2, __attribute__((target("avx2"))))
DEFINE_SUMS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl" WIDEST))))

kernel_t *const sums_avx2[4] = SUMS(avx2);
kernel_t *const sums_avx512[4] = SUMS(avx512);
#else
kernel_t *const sums_avx2[4] = {0};
kernel_t *const sums_avx512[4] = {0};
#endif
