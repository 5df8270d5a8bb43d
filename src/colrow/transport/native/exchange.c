/* Collectives that only move data: all-gather and all-to-all, in bytes. */
#include <string.h>

#include "rounds.h"

static enum outcome stage_part(group_t *group, size_t index, const char *input, size_t count) {
  uint32_t round = group->round + (uint32_t)index;
  size_t start = smaller(index * group->layout.chunk, count);
  TRY(wait_for_slot(group, round));
  memcpy(stage_slot(group, group->rank, round), input + start, smaller(group->layout.chunk, count - start));
  raise_flag(group, STAGED, round + 1);
  return DONE;
}

static enum outcome gather_parts(group_t *group, size_t index, uint64_t tag, char *output,
                                 const size_t *starts) {
  uint32_t round = group->round + (uint32_t)index;
  FOR_OTHERS(group, other) {
    TRY(wait_for(group, STAGED, other, round + 1));
    if (index == 0) TRY(check_call(group, other, tag));
    size_t count = starts[other + 1] - starts[other], start = smaller(index * group->layout.chunk, count);
    memcpy(output + starts[other] + start, stage_slot(group, other, round),
           smaller(group->layout.chunk, count - start));
  }
  raise_both(group, round + 1);
  return DONE;
}

enum outcome group_all_gather(group_t *group, const void *input, void *output, const size_t *counts,
                              size_t count, uint32_t dtype) {
  size_t starts[MAX_RANKS + 1] = {0}, largest = 0;
  for (int rank = 0; rank < group->ranks; rank++) {
    size_t own = counts ? counts[rank] : count;
    starts[rank + 1] = starts[rank] + own;
    if (own > largest) largest = own;
  }
  size_t rounds = largest ? divide_up(largest, group->layout.chunk) : 1;
  size_t own = starts[group->rank + 1] - starts[group->rank];
  char *place = (char *)output + starts[group->rank];
  call_t call = describe(ALL_GATHER, dtype, 0, starts[group->ranks]);
  describe_cut(&call, counts, group->ranks);
  uint64_t tag;
  enum outcome outcome = begin_call(group, &call, (uint32_t)rounds, &tag);
  for (size_t index = 0; outcome == DONE && index < rounds + 1; index++) {
    if (index < rounds) outcome = stage_part(group, index, input, own);
    if (index == 0 && place != input && own) memcpy(place, input, own); /* while the others stage theirs */
    if (outcome == DONE && index >= 1) outcome = gather_parts(group, index - 1, tag, output, starts);
  }
  return end_call(group, outcome);
}

/* How an all-to-all is cut into rounds, which depends on what every rank gives to every other. */
typedef struct {
  size_t rounds;
  size_t piece[MAX_RANKS]; /* bytes that this rank stages for each in a round */
  size_t place[MAX_RANKS]; /* where each rank's slot holds what is for this one */
  size_t taken[MAX_RANKS]; /* bytes of each that it holds in a round */
} exchange_t;

enum { UNIT = 64 };

static size_t piece_of(size_t bytes, size_t rounds) { return round_up(divide_up(bytes, rounds), UNIT); }

static exchange_t plan_exchange(const group_t *group) {
  exchange_t exchange;
  const member_t *members = group->header->members;
  size_t ranks = (size_t)group->ranks, room = group->layout.chunk - ranks * (UNIT + 1);
  exchange.rounds = 1;
  for (size_t rank = 0; rank < ranks; rank++) {
    size_t total = 0;
    for (size_t to = 0; to < ranks; to++) total += to == rank ? 0 : members[rank].given[to];
    if (divide_up(total, room) > exchange.rounds) exchange.rounds = divide_up(total, room);
  }
  for (size_t rank = 0; rank < ranks; rank++) {
    exchange.place[rank] = 0;
    for (size_t to = 0; to < (size_t)group->rank; to++)
      if (to != rank) exchange.place[rank] += piece_of(members[rank].given[to], exchange.rounds);
    exchange.taken[rank] = piece_of(members[rank].given[group->rank], exchange.rounds);
    exchange.piece[rank] = piece_of(members[group->rank].given[rank], exchange.rounds);
  }
  return exchange;
}

static enum outcome stage_for_each(group_t *group, const exchange_t *exchange, uint32_t round, size_t index,
                                   const char *input, const size_t *given) {
  TRY(wait_for_slot(group, round));
  char *stage = stage_slot(group, group->rank, round);
  for (int rank = 0; rank < group->ranks; input += given[rank++]) {
    if (rank == group->rank) continue;
    size_t start = smaller(index * exchange->piece[rank], given[rank]);
    memcpy(stage, input + start, smaller(exchange->piece[rank], given[rank] - start));
    stage += exchange->piece[rank];
  }
  raise_flag(group, STAGED, round + 1);
  return DONE;
}

static enum outcome take_from_each(group_t *group, const exchange_t *exchange, uint32_t round, size_t index,
                                   char *output, const size_t *taken) {
  size_t starts[MAX_RANKS + 1] = {0};
  for (int rank = 0; rank < group->ranks; rank++) starts[rank + 1] = starts[rank] + taken[rank];
  FOR_OTHERS(group, other) {
    TRY(wait_for(group, STAGED, other, round + 1));
    size_t start = smaller(index * exchange->taken[other], taken[other]);
    memcpy(output + starts[other] + start, stage_slot(group, other, round) + exchange->place[other],
           smaller(exchange->taken[other], taken[other] - start));
  }
  raise_both(group, round + 1);
  return DONE;
}

/* The first round tells everybody what everybody gives; the rest moves it. */
static enum outcome exchange_in_rounds(group_t *group, uint64_t tag, const char *input, char *output,
                                       const size_t *given, const size_t *taken, uint32_t dtype) {
  member_t *members = group->header->members;
  /* nobody reads what was given in the last all-to-all any more: all had read it when they staged its data */
  for (int rank = 0; rank < group->ranks; rank++) members[group->rank].given[rank] = given[rank];
  raise_flag(group, STAGED, group->round + 1);
  TRY(wait_for_calls(group, tag));
  FOR_OTHERS(group, other) {
    if (members[other].given[group->rank] == taken[other]) continue;
    group->problem.mine = describe(ALL_TO_ALL, dtype, 0, taken[other]);
    group->problem.theirs = describe(ALL_TO_ALL, dtype, 0, members[other].given[group->rank]);
    group->problem.has_calls = 1;
    return fail(group, MISMATCH, other);
  }
  exchange_t exchange = plan_exchange(group);
  size_t from = 0, to = 0;
  for (int rank = 0; rank < group->rank; rank++) from += given[rank], to += taken[rank];
  raise_both(group, group->round + 1);
  memcpy(output + to, input + from, given[group->rank]);
  uint32_t first = group->round + 1;
  group->last = first + (uint32_t)exchange.rounds;
  for (size_t index = 0; index < exchange.rounds + 1; index++) {
    if (index < exchange.rounds)
      TRY(stage_for_each(group, &exchange, first + (uint32_t)index, index, input, given));
    if (index >= 1)
      TRY(take_from_each(group, &exchange, first + (uint32_t)index - 1, index - 1, output, taken));
  }
  return DONE;
}

enum outcome group_all_to_all(group_t *group, const void *input, void *output, const size_t *given,
                              const size_t *taken, uint32_t dtype) {
  if (given[group->rank] != taken[group->rank]) return REFUSED;
  call_t call = describe(ALL_TO_ALL, dtype, 0, 0);
  uint64_t tag;
  enum outcome outcome = begin_call(group, &call, 1, &tag);
  if (outcome == DONE) outcome = exchange_in_rounds(group, tag, input, output, given, taken, dtype);
  return end_call(group, outcome);
}
