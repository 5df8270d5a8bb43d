#include "kernels.h"

#include "elements.h"

#define ANYWHERE
#define MULTIPLY(a, b) ((a) * (b))
/* the first operand if it is not a number, so that NaN is passed on from either */
#define LARGER(a, b) ((a) > (b) || (a) != (a) ? (a) : (b))
#define SMALLER(a, b) ((a) < (b) || (a) != (a) ? (a) : (b))
#define AND(a, b) ((a) & (b))
#define OR(a, b) ((a) | (b))
#define XOR(a, b) ((a) ^ (b))
#define DIVIDE(x, ranks) ((x) / (float)(ranks))
#define IS_TRUE(x) ((uint8_t)((x) != 0))

DEFINE_SUMS(any, ANYWHERE)

#define DEFINE_FLOATS(NAME, STORED, WIDE, WIDEN, NARROW)                                                  \
  DEFINE_REDUCTION(product_##NAME, ANYWHERE, STORED, WIDE, WIDEN, MULTIPLY, NO_FINISH, NARROW)            \
  DEFINE_REDUCTION(minimum_##NAME, ANYWHERE, STORED, WIDE, WIDEN, SMALLER, NO_FINISH, NARROW)             \
  DEFINE_REDUCTION(maximum_##NAME, ANYWHERE, STORED, WIDE, WIDEN, LARGER, NO_FINISH, NARROW)              \
  DEFINE_REDUCTION(average_##NAME, ANYWHERE, STORED, WIDE, WIDEN, ADD, DIVIDE, NARROW)

DEFINE_FLOATS(float32, float, float, SAME, SAME)
DEFINE_FLOATS(float64, double, double, SAME, SAME)
DEFINE_FLOATS(bfloat16, uint16_t, float, from_bfloat16, to_bfloat16)
DEFINE_FLOATS(float16, uint16_t, float, from_float16, to_float16)

/* sums and products wrap around, so they are computed without sign; uint32_t where C would use int */
#define DEFINE_BITS(BITS, WIDE)                                                                           \
  DEFINE_REDUCTION(sum_bits##BITS, ANYWHERE, uint##BITS##_t, WIDE, SAME, ADD, NO_FINISH, (uint##BITS##_t))\
  DEFINE_REDUCTION(product_bits##BITS, ANYWHERE, uint##BITS##_t, WIDE, SAME, MULTIPLY, NO_FINISH,         \
                   (uint##BITS##_t))                                                                      \
  DEFINE_REDUCTION(and_bits##BITS, ANYWHERE, uint##BITS##_t, uint##BITS##_t, SAME, AND, NO_FINISH, SAME)  \
  DEFINE_REDUCTION(or_bits##BITS, ANYWHERE, uint##BITS##_t, uint##BITS##_t, SAME, OR, NO_FINISH, SAME)    \
  DEFINE_REDUCTION(xor_bits##BITS, ANYWHERE, uint##BITS##_t, uint##BITS##_t, SAME, XOR, NO_FINISH, SAME)

DEFINE_BITS(8, uint32_t)
DEFINE_BITS(16, uint32_t)
DEFINE_BITS(32, uint32_t)
DEFINE_BITS(64, uint64_t)

#define DEFINE_ORDER(NAME)                                                                                \
  DEFINE_REDUCTION(minimum_##NAME, ANYWHERE, NAME##_t, NAME##_t, SAME, SMALLER, NO_FINISH, SAME)          \
  DEFINE_REDUCTION(maximum_##NAME, ANYWHERE, NAME##_t, NAME##_t, SAME, LARGER, NO_FINISH, SAME)

DEFINE_ORDER(int8)
DEFINE_ORDER(uint8)
DEFINE_ORDER(int16)
DEFINE_ORDER(uint16)
DEFINE_ORDER(int32)
DEFINE_ORDER(uint32)
DEFINE_ORDER(int64)
DEFINE_ORDER(uint64)

DEFINE_REDUCTION(any_true, ANYWHERE, uint8_t, uint8_t, IS_TRUE, OR, NO_FINISH, SAME)
DEFINE_REDUCTION(all_true, ANYWHERE, uint8_t, uint8_t, IS_TRUE, AND, NO_FINISH, SAME)
DEFINE_REDUCTION(odd_true, ANYWHERE, uint8_t, uint8_t, IS_TRUE, XOR, NO_FINISH, SAME)

#define FLOATS(NAME)                                                                                      \
  {[SUM] = sum_##NAME##_any, [PRODUCT] = product_##NAME, [MINIMUM] = minimum_##NAME,                      \
   [MAXIMUM] = maximum_##NAME, [AVERAGE] = average_##NAME}
#define INTEGERS(NAME, BITS)                                                                              \
  {[SUM] = sum_bits##BITS, [PRODUCT] = product_bits##BITS, [MINIMUM] = minimum_##NAME,                    \
   [MAXIMUM] = maximum_##NAME, [BIT_AND] = and_bits##BITS, [BIT_OR] = or_bits##BITS,                      \
   [BIT_XOR] = xor_bits##BITS}

static kernel_t *const kernels[DTYPES][REDUCTIONS] = {
    [FLOAT32] = FLOATS(float32),       [FLOAT64] = FLOATS(float64),
    [BFLOAT16] = FLOATS(bfloat16),     [FLOAT16] = FLOATS(float16),
    [INT8] = INTEGERS(int8, 8),        [UINT8] = INTEGERS(uint8, 8),
    [INT16] = INTEGERS(int16, 16),     [UINT16] = INTEGERS(uint16, 16),
    [INT32] = INTEGERS(int32, 32),     [UINT32] = INTEGERS(uint32, 32),
    [INT64] = INTEGERS(int64, 64),     [UINT64] = INTEGERS(uint64, 64),
    [BOOL] = {[SUM] = any_true, [PRODUCT] = all_true, [MINIMUM] = all_true, [MAXIMUM] = any_true,
              [BIT_AND] = all_true, [BIT_OR] = any_true, [BIT_XOR] = odd_true},
};

size_t dtype_bytes(enum dtype dtype) {
  static const size_t bytes[DTYPES] = {4, 8, 2, 2, 1, 1, 2, 2, 4, 4, 8, 8, 1};
  return bytes[dtype];
}

int can_reduce(enum dtype dtype, enum reduction reduction) {
  return (unsigned)dtype < DTYPES && (unsigned)reduction < REDUCTIONS && kernels[dtype][reduction] != NULL;
}

#if defined(__x86_64__)
static int has_avx512(void) {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static int has_avx2(void) { return __builtin_cpu_supports("avx2"); }
#else
static int has_avx512(void) { return 0; }
static int has_avx2(void) { return 0; }
#endif

const char *kernel_set(void) { return has_avx512() ? "AVX-512" : has_avx2() ? "AVX2" : "portable"; }

void reduce(enum dtype dtype, enum reduction reduction, void *output, void *copy, const void *const *sources,
            int ranks, size_t count) {
  kernel_t *kernel = kernels[dtype][reduction];
  if (reduction == SUM && dtype <= FLOAT16) {
    if (has_avx512())
      kernel = sums_avx512[dtype];
    else if (has_avx2())
      kernel = sums_avx2[dtype];
  }
  kernel(output, copy, sources, ranks, count);
}
