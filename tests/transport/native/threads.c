/* The native code as one program whose threads are the ranks, for the compiler's checkers: threads share memory
 * at one address, so that ThreadSanitizer sees every access to it.
 *
 *     threads RANKS OPERATIONS SEED
 *
 * Random operations of random sizes, with random delays; every number is checked. Then the sums of every
 * instruction set that this processor has are compared, bit for bit. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "elements.h"
#include "group.h"

static layout_t layout;
static header_t *header;
static int ranks, operations;
static unsigned seed;

/* The same on all ranks, or a rank's own. */
static uint32_t draw(uint64_t *state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(*state >> 33);
}

static float number(int rank, int operation, size_t index) {
  return (float)((rank + 1) * 3 + operation % 7 + (int)(index % 5));
}

static void expect(int passed, const char *what, int rank, int operation) {
  if (passed) return;
  fprintf(stderr, "rank %d: operation %d, %s, is wrong\n", rank, operation, what);
  exit(1);
}

static void *run(void *argument) {
  int rank = (int)(intptr_t)argument;
  group_t group;
  if (group_attach(&group, header, &layout, -1, rank)) exit(2);
  group.one_shot_bytes = 4096;
  group.spin_ns = 1000;
  group.yield_ns = group.patience_ns = 20000;
  group.timeout = 120;
  uint64_t common = seed, own = seed + 77u + (unsigned)rank;
  size_t most = 3 * layout.chunk;
  float *input = malloc(most * sizeof(float) * MAX_RANKS), *output = malloc(most * sizeof(float) * MAX_RANKS);
  for (int operation = 0; operation < operations; operation++) {
    uint32_t kind = draw(&common) % 5;
    size_t count = draw(&common) % 3 ? draw(&common) % 200 : draw(&common) % (most / sizeof(float));
    size_t starts[MAX_RANKS + 1] = {0}, counts[MAX_RANKS], bytes[MAX_RANKS];
    for (int other = 0; other < ranks; other++) {
      counts[other] = draw(&common) % 4 ? draw(&common) % (count + 1) : 0;
      bytes[other] = counts[other] * sizeof(float);
      starts[other + 1] = starts[other] + counts[other];
    }
    if (draw(&own) % 20 == 0) usleep(draw(&own) % 300);
    enum outcome outcome = DONE;
    if (kind == 0) {
      outcome = group_barrier(&group);
    } else if (kind == 1) {
      for (size_t i = 0; i < count; i++) input[i] = number(rank, operation, i);
      outcome = group_all_reduce(&group, input, operation % 2 ? input : output, count, FLOAT32, SUM);
      for (size_t i = 0; i < count; i++) {
        float sum = 0;
        for (int other = 0; other < ranks; other++) sum += number(other, operation, i);
        expect((operation % 2 ? input : output)[i] == sum, "all-reduce", rank, operation);
      }
    } else if (kind == 2) {
      for (size_t i = 0; i < starts[ranks]; i++) input[i] = number(rank, operation, i);
      outcome = group_reduce_scatter(&group, input, output, counts, 0, FLOAT32, SUM);
      for (size_t i = 0; i < counts[rank]; i++) {
        float sum = 0;
        for (int other = 0; other < ranks; other++) sum += number(other, operation, starts[rank] + i);
        expect(output[i] == sum, "reduce-scatter", rank, operation);
      }
    } else if (kind == 3) {
      for (size_t i = 0; i < counts[rank]; i++) input[i] = number(rank, operation, i);
      outcome = group_all_gather(&group, input, output, bytes, 0, 0);
      for (int other = 0; other < ranks; other++)
        for (size_t i = 0; i < counts[other]; i++)
          expect(output[starts[other] + i] == number(other, operation, i), "all-gather", rank, operation);
    } else {
      size_t taken[MAX_RANKS];
      /* what goes from one rank to another depends on both */
      for (int other = 0; other < ranks; other++) taken[other] = bytes[(rank + other) % ranks];
      size_t place = 0;
      for (int other = 0; other < ranks; other++)
        for (size_t i = 0; i < taken[other] / sizeof(float); i++) input[place++] = number(rank, other, i);
      outcome = group_all_to_all(&group, input, output, taken, taken, 0);
      place = 0;
      for (int other = 0; other < ranks; other++)
        for (size_t i = 0; i < taken[other] / sizeof(float); i++)
          expect(output[place++] == number(other, rank, i), "all-to-all", rank, operation);
    }
    expect(outcome == DONE, "its outcome", rank, operation);
  }
  group_leave(&group);
  free(input);
  free(output);
  return NULL;
}

DEFINE_SUMS(portable, )

static void compare_sets(void) {
  enum { COUNT = 5000 };
  static uint64_t sources[3][COUNT];
  static uint64_t expected[COUNT], found[COUNT], copy[COUNT];
  static const size_t bytes[4] = {4, 8, 2, 2};
  kernel_t *const portable[4] = SUMS(portable);
  uint64_t state = seed;
  for (int rank = 0; rank < 3; rank++)
    for (int i = 0; i < COUNT; i++) sources[rank][i] = (uint64_t)draw(&state) << 32 | draw(&state) << 1;
  const void *pointers[3] = {sources[0], sources[1], sources[2]};
  for (int dtype = FLOAT32; dtype <= FLOAT16; dtype++)
    for (int from = 1; from <= 3; from++) {
      portable[dtype](expected, NULL, pointers, from, COUNT - 3);
      for (int set = 0; set < 3; set++) {
        kernel_t *kernel = NULL;
#if defined(__x86_64__)
        if (set == 1 && __builtin_cpu_supports("avx2")) kernel = sums_avx2[dtype];
        if (set == 2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512dq"))
          kernel = sums_avx512[dtype];
#endif
        if (set == 0) {
          reduce(dtype, SUM, found, copy, pointers, from, COUNT - 3);
        } else if (kernel) {
          kernel(found, copy, pointers, from, COUNT - 3);
        } else {
          continue;
        }
        for (size_t i = 0; i < COUNT - 3; i++) {
          int same = !memcmp((char *)expected + i * bytes[dtype], (char *)found + i * bytes[dtype], bytes[dtype]);
          float a = 0, b = 0;
          double c = 0, d = 0;
          if (dtype == FLOAT32) a = ((float *)expected)[i], b = ((float *)found)[i];
          if (dtype == FLOAT64) c = ((double *)expected)[i], d = ((double *)found)[i];
          int both_are_no_number = (a != a && b != b) || (c != c && d != d);
          expect(same || both_are_no_number, "a sum of another instruction set", set, dtype);
          expect(!memcmp((char *)copy + i * bytes[dtype], (char *)found + i * bytes[dtype], bytes[dtype]),
                 "the copy of a sum", set, dtype);
        }
      }
    }
}

int main(int count, char **arguments) {
  if (count != 4) return 2;
  ranks = atoi(arguments[1]);
  operations = atoi(arguments[2]);
  seed = (unsigned)atoi(arguments[3]);
  if (arena_layout(&layout, ranks, 4 * PAGE, 2u << seed % 3)) return 2;
  void *memory;
  if (posix_memalign(&memory, PAGE, layout.bytes)) return 2;
  memset(memory, 0, layout.bytes);
  header = memory;
  group_format(header, &layout);
  pthread_t threads[MAX_RANKS];
  for (int rank = 0; rank < ranks; rank++)
    if (pthread_create(&threads[rank], NULL, run, (void *)(intptr_t)rank)) return 2;
  for (int rank = 0; rank < ranks; rank++) pthread_join(threads[rank], NULL);
  compare_sets();
  free(memory);
  puts("passed");
  return 0;
}
