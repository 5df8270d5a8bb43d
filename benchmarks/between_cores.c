/* How fast two processors get data from each other: what bounds collectives in shared memory.
 *
 *     cc -O3 -pthread benchmarks/between_cores.c -o between_cores && ./between_cores
 *
 * Two threads, each on a processor of its own, at the same time. Of 400 tries the fastest, GB/s of each thread:
 *   copy   its own data, from memory that only it uses to other such memory
 *   read   what the other one has just written
 *   write  over what the other one has just read
 * In an all-reduce of two ranks each reads as many bytes of the other's as the tensor has, and writes as many. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { COPY, READ, WRITE, KINDS, TRIES = 400, LARGEST = 16 << 20 };

static const char *const names[KINDS] = {"copy", "read", "write"};
static struct { _Alignas(128) _Atomic int count; } arrived[2];
static char *private_data[2], *private_copy[2], *shared_data[2];
static volatile uint64_t sums[2]; /* so that what is read is needed */
static double seconds[2];
static size_t bytes;
static int kind;

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void meet(int thread, int *count) {
  atomic_store_explicit(&arrived[thread].count, ++*count, memory_order_release);
  while (atomic_load_explicit(&arrived[1 - thread].count, memory_order_acquire) < *count) continue;
}

static uint64_t add(const char *data) {
  enum { LANES = 32 }; /* sums that do not wait for each other */
  const uint64_t *words = (const uint64_t *)data;
  uint64_t lanes[LANES] = {0}, sum = 0;
  for (size_t index = 0; index < bytes / sizeof *words; index += LANES)
    for (int lane = 0; lane < LANES; lane++) lanes[lane] += words[index + (size_t)lane];
  for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
  return sum;
}

static void *run(void *argument) {
  int thread = (int)(intptr_t)argument, count = 0;
  cpu_set_t processors;
  CPU_ZERO(&processors);
  CPU_SET(thread, &processors);
  if (sched_setaffinity(0, sizeof processors, &processors)) perror("cannot bind a thread to its processor");
  seconds[thread] = 1e9;
  for (int number = 0; number < TRIES; number++) {
    if (kind == READ) memset(shared_data[thread], number, bytes);
    if (kind == WRITE) sums[thread] = add(shared_data[1 - thread]);
    meet(thread, &count);
    double begin = now();
    if (kind == COPY) memcpy(private_copy[thread], private_data[thread], bytes);
    if (kind == READ) sums[thread] = add(shared_data[1 - thread]);
    if (kind == WRITE) memcpy(shared_data[thread], private_data[thread], bytes);
    double taken = now() - begin;
    if (taken < seconds[thread]) seconds[thread] = taken;
    meet(thread, &count);
  }
  return NULL;
}

static char *allocate(void) {
  char *data = mmap(NULL, LARGEST, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) exit(1);
  return memset(data, 1, LARGEST);
}

int main(void) {
  for (int thread = 0; thread < 2; thread++) {
    private_data[thread] = allocate();
    private_copy[thread] = allocate();
    shared_data[thread] = allocate();
  }
  for (bytes = 256 << 10; bytes <= LARGEST; bytes *= 4) {
    printf("%6zu KB", bytes >> 10);
    for (kind = 0; kind < KINDS; kind++) {
      pthread_t threads[2];
      atomic_store(&arrived[0].count, 0);
      atomic_store(&arrived[1].count, 0);
      for (int thread = 0; thread < 2; thread++)
        pthread_create(&threads[thread], NULL, run, (void *)(intptr_t)thread);
      for (int thread = 0; thread < 2; thread++) pthread_join(threads[thread], NULL);
      double slower = seconds[0] > seconds[1] ? seconds[0] : seconds[1];
      printf("  %s %6.1f GB/s %7.1f us", names[kind], (double)bytes / slower * 1e-9, slower * 1e6);
    }
    puts("");
  }
}
