/* The template of a reduction, and numbers of half the precision, which are computed with in fp32. */
#ifndef COLROW_ELEMENTS_H
#define COLROW_ELEMENTS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__clang__)
#define ANY_ORDER _Pragma("clang loop vectorize(assume_safety)")
#else
#define ANY_ORDER _Pragma("GCC ivdep")
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE float float_of_bits(uint32_t bits) {
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

INLINE uint32_t bits_of_float(float number) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  return bits;
}

INLINE float from_bfloat16(uint16_t number) { return float_of_bits((uint32_t)number << 16); }

/* Rounded to nearest, ties to even, as torch does it. The instruction of AVX512-BF16 is not used: it takes
 * denormal numbers for zero, so that results would depend on the processor. */
INLINE uint16_t to_bfloat16(float number) {
  uint32_t bits = bits_of_float(number);
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

/* All cases without branches, so that compilers can compute several at once on any processor. */
INLINE float from_float16(uint16_t number) {
  uint32_t sign = (uint32_t)(number & 0x8000u) << 16, magnitude = number & 0x7fffu;
  uint32_t normal = (magnitude << 13) + 0x38000000u;              /* exponents differ by 112 */
  uint32_t special = (magnitude << 13) | 0x7f800000u;             /* infinite, or not a number */
  uint32_t tiny = bits_of_float((float)(int32_t)magnitude * 0x1p-24f);
  uint32_t bits = magnitude < 0x0400u ? tiny : magnitude < 0x7c00u ? normal : special;
  return float_of_bits(sign | bits);
}

INLINE uint16_t to_float16(float number) {
  uint32_t bits = bits_of_float(number), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  /* adding a number whose last bit is where float16's is rounds there, ties to even */
  uint32_t normal = (magnitude + 0x0fffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  uint32_t tiny = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t rounded = magnitude < 0x38800000u ? tiny : magnitude < 0x477ff000u ? normal : 0x7c00u;
  return (uint16_t)(sign | (magnitude > 0x7f800000u ? 0x7e00u : rounded));
}

#define SAME(x) (x)
#define ADD(a, b) ((a) + (b))
#define NO_FINISH(x, ranks) (x)

/* A function that reduces elements of STORED, computed with as WIDE. Blocks are small enough that what is
 * written once is still in the first-level cache when it is read again. */
#define DEFINE_REDUCTION(NAME, TARGET, STORED, WIDE, WIDEN, COMBINE, FINISH, NARROW)                        \
  TARGET static void NAME(void *output, void *copy, const void *const *sources, int ranks, size_t count) {  \
    enum { BLOCK = 4096 / sizeof(WIDE) };                                                                   \
    WIDE total[BLOCK];                                                                                      \
    for (size_t begin = 0; begin < count; begin += BLOCK) {                                                 \
      size_t length = count - begin < BLOCK ? count - begin : BLOCK;                                        \
      const STORED *first = (const STORED *)sources[0] + begin;                                             \
      const STORED *second = ranks > 1 ? (const STORED *)sources[1] + begin : first;                        \
      STORED *result = (STORED *)output + begin;                                                            \
      if (ranks == 2 && !copy) {                                                                            \
        ANY_ORDER for (size_t i = 0; i < length; i++)                                                       \
          result[i] = NARROW(FINISH(COMBINE(WIDEN(first[i]), WIDEN(second[i])), ranks));                    \
        continue;                                                                                           \
      }                                                                                                     \
      if (ranks == 1)                                                                                       \
        for (size_t i = 0; i < length; i++) total[i] = WIDEN(first[i]);                                     \
      else                                                                                                  \
        for (size_t i = 0; i < length; i++) total[i] = COMBINE(WIDEN(first[i]), WIDEN(second[i]));          \
      for (int rank = 2; rank < ranks; rank++) {                                                            \
        const STORED *next = (const STORED *)sources[rank] + begin;                                         \
        for (size_t i = 0; i < length; i++) total[i] = COMBINE(total[i], WIDEN(next[i]));                   \
      }                                                                                                     \
      for (size_t i = 0; i < length; i++) result[i] = NARROW(FINISH(total[i], ranks));                      \
      if (copy) memcpy((STORED *)copy + begin, result, length * sizeof(STORED));                            \
    }                                                                                                       \
  }

/* Two numbers of half the precision in one of 32 bits, at any place that one of them may have. */
typedef uint32_t pair_t __attribute__((aligned(2), may_alias));

/* A float rounded to bfloat16, in the upper half. */
INLINE uint32_t upper_bfloat16(float number) {
  uint32_t bits = bits_of_float(number);
  uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : rounded & 0xffff0000u;
}

/* The sum of two tensors of bfloat16, by pairs: widening and narrowing them one by one takes longer than adding.
 * All others are GENERAL's. */
#define DEFINE_SUM_OF_PAIRS(NAME, TARGET, GENERAL)                                                          \
  TARGET static void NAME(void *output, void *copy, const void *const *sources, int ranks, size_t count) {  \
    if (ranks != 2 || copy) {                                                                               \
      GENERAL(output, copy, sources, ranks, count);                                                         \
      return;                                                                                               \
    }                                                                                                       \
    const pair_t *first = sources[0], *second = sources[1];                                                 \
    pair_t *result = output;                                                                                \
    size_t pairs = count / 2;                                                                               \
    ANY_ORDER for (size_t i = 0; i < pairs; i++) {                                                          \
      uint32_t a = first[i], b = second[i];                                                                 \
      uint32_t lower = upper_bfloat16(float_of_bits(a << 16) + float_of_bits(b << 16));                     \
      uint32_t upper = upper_bfloat16(float_of_bits(a & 0xffff0000u) + float_of_bits(b & 0xffff0000u));     \
      result[i] = upper | lower >> 16;                                                                      \
    }                                                                                                       \
    const void *const last[2] = {first + pairs, second + pairs};                                            \
    GENERAL(result + pairs, NULL, last, ranks, count % 2);                                                  \
  }

/* The sums that are worth other instructions than the oldest. */
#define DEFINE_SUMS(SET, TARGET)                                                                            \
  DEFINE_REDUCTION(sum_float32_##SET, TARGET, float, float, SAME, ADD, NO_FINISH, SAME)                     \
  DEFINE_REDUCTION(sum_float64_##SET, TARGET, double, double, SAME, ADD, NO_FINISH, SAME)                   \
  DEFINE_REDUCTION(any_bfloat16_##SET, TARGET, uint16_t, float, from_bfloat16, ADD, NO_FINISH, to_bfloat16) \
  DEFINE_SUM_OF_PAIRS(sum_bfloat16_##SET, TARGET, any_bfloat16_##SET)                                       \
  DEFINE_REDUCTION(sum_float16_##SET, TARGET, uint16_t, float, from_float16, ADD, NO_FINISH, to_float16)

#define SUMS(SET) {sum_float32_##SET, sum_float64_##SET, sum_bfloat16_##SET, sum_float16_##SET}

#endif
