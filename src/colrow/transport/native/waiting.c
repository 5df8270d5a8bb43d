#define _GNU_SOURCE
#include "waiting.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
  SPINS_PER_LOOK = 32,          /* at the clock */
  TICK_NS = 100 * 1000 * 1000,  /* how often a sleeping rank looks whether the others still run */
  TICKS_PER_LOOK_AT_ALL = 5,
};

static int64_t now_ns(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

void wake_sleepers(flag_t *flag) {
  syscall(SYS_futex, &flag->rounds, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

/* failure: 0, or outcome << 16 | (rank at fault + 1) << 8 | rank that noticed */
static uint32_t pack(enum outcome outcome, int rank, int found_by) {
  return (uint32_t)outcome << 16 | (uint32_t)(rank + 1) << 8 | (uint32_t)found_by;
}

enum outcome fail(group_t *group, enum outcome outcome, int rank) {
  header_t *header = group->header;
  uint32_t none = 0;
  group->problem.outcome = outcome;
  group->problem.rank = rank;
  group->problem.found_by = group->rank;
  atomic_compare_exchange_strong(&header->failure, &none, pack(outcome, rank, group->rank));
  for (int member = 0; member < group->ranks; member++)
    for (int stage = 0; stage < STAGES; stage++)
      if (atomic_load(&header->members[member].flags[stage].sleepers))
        wake_sleepers(&header->members[member].flags[stage]);
  return outcome;
}

enum outcome failed_before(group_t *group) {
  uint32_t failure = atomic_load_explicit(&group->header->failure, memory_order_acquire);
  if (__builtin_expect(failure == 0, 1)) return DONE;
  group->problem.outcome = (enum outcome)(failure >> 16);
  group->problem.rank = (int)(failure >> 8 & 0xff) - 1;
  group->problem.found_by = (int)(failure & 0xff);
  return group->problem.outcome;
}

/* Whether a rank that is no longer there has left without what this collective needs of it. */
static int is_missed(group_t *group, int rank) {
  flag_t *last = &group->header->members[rank].flags[GATHERED];
  return !has_reached(atomic_load_explicit(&last->rounds, memory_order_acquire), group->last);
}

static enum outcome look_at(group_t *group, int rank) {
  /* asked in this order: who leaves or dies now may have completed the collective before */
  int has_left = atomic_load(&group->header->members[rank].left) != 0;
  int is_dead = group->file >= 0 && !arena_is_locked(group->file, rank);
  if ((has_left || is_dead) && is_missed(group, rank)) return fail(group, has_left ? LEFT : DIED, rank);
  return DONE;
}

/* What a sleeping rank does now and then. */
static enum outcome look_around(group_t *group, int rank, int ticks, int64_t since) {
  if (atomic_load(&group->is_closing)) return fail(group, CLOSED, group->rank);
  TRY(failed_before(group));
  TRY(look_at(group, rank));
  if (ticks % TICKS_PER_LOOK_AT_ALL == 1) FOR_OTHERS(group, other) TRY(look_at(group, other));
  if (group->tick && group->tick(group)) return fail(group, INTERRUPTED, group->rank);
  if ((double)(now_ns() - since) * 1e-9 > group->timeout) return fail(group, TIMED_OUT, rank);
  return DONE;
}

static enum outcome sleep_until(group_t *group, flag_t *flag, int rank, uint32_t needed, uint32_t *rounds) {
  int64_t since = now_ns();
  enum outcome outcome = DONE;
  int ticks = 0;
  int64_t next_tick = since + TICK_NS;
  atomic_fetch_add(&flag->sleepers, 1);
  for (;;) {
    *rounds = atomic_load(&flag->rounds);
    if (has_reached(*rounds, needed)) break;
    struct timespec limit = {0, TICK_NS};
    long result = syscall(SYS_futex, &flag->rounds, FUTEX_WAIT, *rounds, &limit, NULL, 0);
    int error = result < 0 ? errno : 0;
    *rounds = atomic_load(&flag->rounds);
    if (has_reached(*rounds, needed)) break;
    /* woken without reason: somebody else's failure, or a rank that leaves */
    int is_tick = error == ETIMEDOUT || error == EINTR || now_ns() >= next_tick;
    if (is_tick) next_tick = now_ns() + TICK_NS;
    outcome = is_tick ? look_around(group, rank, ++ticks, since) : failed_before(group);
    if (outcome == DONE && !is_tick && atomic_load(&group->header->members[rank].left))
      outcome = look_at(group, rank);
    if (outcome != DONE) {
      *rounds = atomic_load(&flag->rounds); /* it may have come between */
      break;
    }
  }
  atomic_fetch_sub(&flag->sleepers, 1);
  return outcome;
}

/* Keeping the processor pays if the others come soon. Where waits turn out to be long, because the ranks'
 * work differs or other programs have the processors, it is given up early: a rank that sleeps is run at
 * once when it is woken, one that has used up its time is not. */
static void learn(group_t *group, int64_t waited_ns) {
  int64_t most = group->spin_ns + group->yield_ns, least = most / 16;
  int64_t patience = waited_ns <= most ? group->patience_ns * 2 : group->patience_ns / 2;
  group->patience_ns = patience > most ? most : patience < least ? least : patience;
}

static enum outcome over(group_t *group, enum stage stage, int rank, uint32_t rounds, int64_t begin) {
  group->seen[stage][rank] = rounds;
  learn(group, now_ns() - begin);
  return DONE;
}

enum outcome wait_slowly(group_t *group, enum stage stage, int rank, uint32_t needed) {
  flag_t *flag = &group->header->members[rank].flags[stage];
  uint32_t rounds;
  int64_t begin = now_ns(), patience = group->patience_ns;
  int64_t spin_until = begin + (patience < group->spin_ns ? patience : group->spin_ns);
  do {
    for (int spin = 0; spin < SPINS_PER_LOOK; spin++) {
      rounds = atomic_load_explicit(&flag->rounds, memory_order_acquire);
      if (has_reached(rounds, needed)) {
        group->spins++;
        return over(group, stage, rank, rounds, begin);
      }
      RELAX();
    }
  } while (now_ns() < spin_until);
  while (group->yield_ns && now_ns() < begin + patience) {
    sched_yield();
    rounds = atomic_load_explicit(&flag->rounds, memory_order_acquire);
    if (has_reached(rounds, needed)) {
      group->yields++;
      return over(group, stage, rank, rounds, begin);
    }
  }
  group->sleeps++;
  TRY(sleep_until(group, flag, rank, needed, &rounds));
  return over(group, stage, rank, rounds, begin);
}
