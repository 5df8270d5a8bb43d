/* Raising one's own flags and waiting for the others'. */
#ifndef COLROW_WAITING_H
#define COLROW_WAITING_H

#include "group.h"

#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("yield" ::: "memory")
#else
#define RELAX() ((void)0)
#endif

/* Rounds are counted modulo 2^32; of two of them at most a few apart, whether one has reached the other. */
static inline int has_reached(uint32_t rounds, uint32_t needed) { return (int32_t)(rounds - needed) >= 0; }

void wake_sleepers(flag_t *flag);
enum outcome wait_slowly(group_t *group, enum stage stage, int rank, uint32_t needed);
/* Make the group unusable for all its ranks and note why; returns the outcome. */
enum outcome fail(group_t *group, enum outcome outcome, int rank);
/* The group has failed already, here or elsewhere: note why and return that; DONE if it has not. */
enum outcome failed_before(group_t *group);

/* Raise one of this rank's flags: everything written before is seen by who waits for it. */
static inline void raise_flag(group_t *group, enum stage stage, uint32_t rounds) {
  flag_t *flag = &group->header->members[group->rank].flags[stage];
  atomic_store_explicit(&flag->rounds, rounds, memory_order_release);
  /* the store must be visible before sleepers are looked for: a sleeper does the reverse */
  atomic_thread_fence(memory_order_seq_cst);
  if (__builtin_expect(atomic_load_explicit(&flag->sleepers, memory_order_relaxed) != 0, 0))
    wake_sleepers(flag);
}

/* Raise REDUCED and GATHERED with one fence, at the end of a round without results. */
static inline void raise_both(group_t *group, uint32_t rounds) {
  member_t *own = &group->header->members[group->rank];
  atomic_store_explicit(&own->flags[REDUCED].rounds, rounds, memory_order_release);
  atomic_store_explicit(&own->flags[GATHERED].rounds, rounds, memory_order_release);
  atomic_thread_fence(memory_order_seq_cst);
  for (int stage = REDUCED; stage <= GATHERED; stage++)
    if (__builtin_expect(atomic_load_explicit(&own->flags[stage].sleepers, memory_order_relaxed) != 0, 0))
      wake_sleepers(&own->flags[stage]);
}

/* Wait until another rank's flag has reached a number of rounds. */
static inline enum outcome wait_for(group_t *group, enum stage stage, int rank, uint32_t needed) {
  if (has_reached(group->seen[stage][rank], needed)) return DONE;
  flag_t *flag = &group->header->members[rank].flags[stage];
  uint32_t rounds = atomic_load_explicit(&flag->rounds, memory_order_acquire);
  if (has_reached(rounds, needed)) {
    group->seen[stage][rank] = rounds;
    return DONE;
  }
  return wait_slowly(group, stage, rank, needed);
}

/* The other ranks, beginning with the next one, so that they do not all read from the same. */
#define FOR_OTHERS(group, other) \
  for (int step_ = 1, other; step_ < (group)->ranks && (other = ((group)->rank + step_) % (group)->ranks, 1); step_++)

/* Leave the calling function with the outcome unless it is DONE. */
#define TRY(expression)                         \
  do {                                          \
    enum outcome outcome_ = (expression);       \
    if (__builtin_expect(outcome_ != DONE, 0)) return outcome_; \
  } while (0)

/* Wait until all other ranks' flags have reached a number of rounds. */
static inline enum outcome wait_for_all(group_t *group, enum stage stage, uint32_t needed) {
  FOR_OTHERS(group, other) TRY(wait_for(group, stage, other, needed));
  return DONE;
}

#endif
