/* What every collective is made of.
 *
 * A collective begins with begin_call, which says what it is and of how many rounds. In round k a rank
 *   1. waits until the others have REDUCED round k - slots, fills its staging slot, raises STAGED to k + 1;
 *   2. waits until the others have STAGED round k, reads what is for it;
 *      where it has a result for them: waits until they have GATHERED round k - slots, writes it to its slot;
 *      raises REDUCED to k + 1;
 *   3. where there are results: waits until the others have REDUCED round k, reads theirs; raises GATHERED.
 * Every round raises all three flags, so that collectives of different kinds can follow each other. In its
 * first round a rank compares the others' calls with its own, after STAGED and before it raises REDUCED. */
#ifndef COLROW_ROUNDS_H
#define COLROW_ROUNDS_H

#include "waiting.h"

call_t describe(enum operation operation, uint32_t dtype, uint32_t reduction, uint64_t count);
void describe_cut(call_t *call, const size_t *counts, int ranks);

enum outcome begin_call(group_t *group, const call_t *call, uint32_t rounds, uint64_t *tag);
/* Must follow begin_call whatever that returned. */
enum outcome end_call(group_t *group, enum outcome outcome);
enum outcome check_call(group_t *group, int other, uint64_t tag);

/* Step 2's wait in the first round: all others are there, and in the same call. */
static inline enum outcome wait_for_calls(group_t *group, uint64_t tag) {
  FOR_OTHERS(group, other) {
    TRY(wait_for(group, STAGED, other, group->round + 1));
    TRY(check_call(group, other, tag));
  }
  return DONE;
}

static inline enum outcome wait_for_staged(group_t *group, uint32_t round, uint64_t tag) {
  return round == group->round ? wait_for_calls(group, tag) : wait_for_all(group, STAGED, round + 1);
}

static inline char *stage_slot(const group_t *group, int rank, uint32_t round) {
  return group->stage[rank] + round % group->layout.slots * group->layout.chunk;
}

static inline char *result_slot(const group_t *group, int rank, uint32_t round) {
  return group->results[rank] + round % group->layout.slots * group->layout.result_bytes;
}

/* Step 1's wait. */
static inline enum outcome wait_for_slot(group_t *group, uint32_t round) {
  return wait_for_all(group, REDUCED, round + 1 - group->layout.slots);
}

/* Step 1 of a round in which nothing is staged. */
static inline enum outcome stage_round(group_t *group, uint32_t round) {
  raise_flag(group, STAGED, round + 1);
  return DONE;
}

static inline size_t smaller(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }
static inline size_t divide_up(size_t value, size_t by) { return (value + by - 1) / by; }

#endif
