#define _GNU_SOURCE
#include "group.h"

#include <pthread.h>
#include <string.h>

#include "rounds.h"
#include "waiting.h"

/* Counting begins just before the counters start again at 0, so that every group's first calls test that. */
static const uint32_t FIRST_ROUND = (uint32_t)-300;
/* Flags last read longer ago than this many rounds are read again, before the difference can overflow. */
static const uint32_t STALE_ROUNDS = 1u << 30;

static _Atomic unsigned process_generation;

static void forked(void) { atomic_fetch_add(&process_generation, 1); }

void group_watch_forks(void) { pthread_atfork(NULL, NULL, forked); }

int group_is_forked(const group_t *group) { return group->generation != atomic_load(&process_generation); }

void group_format(header_t *header, const layout_t *layout) {
  for (int rank = 0; rank < layout->ranks; rank++)
    for (int stage = 0; stage < STAGES; stage++)
      atomic_store(&header->members[rank].flags[stage].rounds, FIRST_ROUND);
  header->bytes = layout->bytes;
  header->version = ARENA_VERSION;
}

int group_attach(group_t *group, header_t *header, const layout_t *layout, int file, int rank) {
  if (header->version != ARENA_VERSION || header->bytes != layout->bytes) return -1;
  memset(group, 0, sizeof *group);
  group->header = header;
  group->layout = *layout;
  group->file = file;
  group->rank = rank;
  group->ranks = layout->ranks;
  group->round = group->last = group->refreshed = FIRST_ROUND;
  group->timeout = 300;
  for (int member = 0; member < group->ranks; member++) {
    group->stage[member] = arena_stage(layout, header, member);
    group->results[member] = arena_results(layout, header, member);
    for (int stage = 0; stage < STAGES; stage++) group->seen[stage][member] = FIRST_ROUND;
  }
  group->generation = atomic_load(&process_generation);
  memset(group->stage[rank], 0, layout->rank_bytes); /* the owner's first touch decides on which node it is */
  return 0;
}

void group_leave(group_t *group) {
  member_t *own = &group->header->members[group->rank];
  atomic_store(&group->is_closing, 1);
  atomic_store(&own->left, 1);
  for (int stage = 0; stage < STAGES; stage++)
    if (atomic_load(&own->flags[stage].sleepers)) wake_sleepers(&own->flags[stage]);
}

static void read_flags_again(group_t *group) {
  for (int stage = 0; stage < STAGES; stage++)
    for (int rank = 0; rank < group->ranks; rank++)
      if (rank != group->rank)
        group->seen[stage][rank] = atomic_load(&group->header->members[rank].flags[stage].rounds);
  group->refreshed = group->round;
}

static uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * 0x9E3779B97F4A7C15u;
  return hash ^ hash >> 29;
}

call_t describe(enum operation operation, uint32_t dtype, uint32_t reduction, uint64_t count) {
  return (call_t){.operation = operation, .dtype = dtype, .reduction = reduction, .count = count};
}

void describe_cut(call_t *call, const size_t *counts, int ranks) {
  uint64_t hash = 1;
  for (int rank = 0; counts && rank < ranks; rank++) hash = mix(hash, counts[rank]);
  call->cut = counts ? hash : 0;
}

enum outcome begin_call(group_t *group, const call_t *call, uint32_t rounds, uint64_t *tag) {
  TRY(failed_before(group));
  group->last = group->round + rounds;
  if (group->round - group->refreshed > STALE_ROUNDS) read_flags_again(group);
  /* exact as long as count is below 2^48 and the cut is equal; else a checksum of 64 bits */
  *tag = ((uint64_t)call->operation << 60 | (uint64_t)call->dtype << 54 | (uint64_t)call->reduction << 48 |
          (call->count & 0xffffffffffff)) ^ call->cut;
  member_t *own = &group->header->members[group->rank];
  /* the slot was last used MAX_SLOTS rounds ago: whoever has not yet read that has not REDUCED it either */
  TRY(wait_for_all(group, REDUCED, group->round + 1 - MAX_SLOTS));
  own->calls[group->round % MAX_SLOTS] = *call;
  own->flags[STAGED].tags[group->round % MAX_SLOTS] = *tag;
  return DONE;
}

enum outcome end_call(group_t *group, enum outcome outcome) {
  if (outcome == DONE) group->round = group->last;
  return outcome;
}

enum outcome check_call(group_t *group, int other, uint64_t tag) {
  const member_t *theirs = &group->header->members[other];
  uint32_t slot = group->round % MAX_SLOTS;
  if (__builtin_expect(theirs->flags[STAGED].tags[slot] == tag, 1)) return DONE;
  group->problem.mine = group->header->members[group->rank].calls[slot];
  group->problem.theirs = theirs->calls[slot];
  group->problem.has_calls = 1;
  return fail(group, MISMATCH, other);
}

enum outcome group_barrier(group_t *group) {
  call_t call = describe(BARRIER, 0, 0, 0);
  uint64_t tag;
  enum outcome outcome = begin_call(group, &call, 1, &tag);
  if (outcome == DONE) outcome = stage_round(group, group->round);
  if (outcome == DONE) outcome = wait_for_calls(group, tag);
  if (outcome == DONE) raise_both(group, group->round + 1);
  return end_call(group, outcome);
}
