/* Collectives that sum: all-reduce and reduce-scatter. Sums are in rank order, so that they never vary. */
#include <string.h>

#include "rounds.h"

/* One chunk of an all-reduce: which elements it covers, and which of these each rank sums, if they share. */
typedef struct {
  uint32_t round;
  size_t start, count; /* elements */
  size_t share;        /* of each rank, but for the last ones */
} chunk_t;

static chunk_t chunk_at(const group_t *group, size_t index, size_t per_chunk, size_t count) {
  chunk_t chunk = {.round = group->round + (uint32_t)index, .start = index * per_chunk};
  chunk.count = smaller(per_chunk, count - chunk.start);
  chunk.share = round_up(divide_up(chunk.count, (size_t)group->ranks), 64);
  return chunk;
}

static size_t share_start(const chunk_t *chunk, int rank) {
  return smaller((size_t)rank * chunk->share, chunk->count);
}

static size_t share_count(const chunk_t *chunk, int rank) {
  return share_start(chunk, rank + 1) - share_start(chunk, rank);
}

static enum outcome stage_whole(group_t *group, const chunk_t *chunk, const char *input, size_t bytes) {
  TRY(wait_for_slot(group, chunk->round));
  memcpy(stage_slot(group, group->rank, chunk->round), input + chunk->start * bytes, chunk->count * bytes);
  raise_flag(group, STAGED, chunk->round + 1);
  return DONE;
}

static enum outcome reduce_whole(group_t *group, const chunk_t *chunk, uint64_t tag, const char *input,
                                 char *output, enum dtype dtype, enum reduction reduction) {
  size_t place = chunk->start * dtype_bytes(dtype);
  const void *sources[MAX_RANKS];
  TRY(wait_for_staged(group, chunk->round, tag));
  for (int rank = 0; rank < group->ranks; rank++)
    sources[rank] = rank == group->rank ? input + place : stage_slot(group, rank, chunk->round);
  reduce(dtype, reduction, output + place, NULL, sources, group->ranks, chunk->count);
  raise_both(group, chunk->round + 1);
  return DONE;
}

/* Every rank stages its data and sums everybody's: one synchronisation for each chunk. */
static enum outcome all_reduce_alone(group_t *group, uint64_t tag, const char *input, char *output,
                                     size_t count, enum dtype dtype, enum reduction reduction,
                                     size_t per_chunk, size_t chunks) {
  for (size_t index = 0; index < chunks + 1; index++) {
    if (index < chunks) {
      chunk_t chunk = chunk_at(group, index, per_chunk, count);
      TRY(stage_whole(group, &chunk, input, dtype_bytes(dtype)));
    }
    if (index >= 1) {
      chunk_t chunk = chunk_at(group, index - 1, per_chunk, count);
      TRY(reduce_whole(group, &chunk, tag, input, output, dtype, reduction));
    }
  }
  return DONE;
}

static enum outcome stage_chunk(group_t *group, const chunk_t *chunk, const char *input, size_t bytes) {
  TRY(wait_for_slot(group, chunk->round));
  char *stage = stage_slot(group, group->rank, chunk->round);
  FOR_OTHERS(group, other) {
    size_t start = share_start(chunk, other);
    memcpy(stage + start * bytes, input + (chunk->start + start) * bytes, share_count(chunk, other) * bytes);
  }
  raise_flag(group, STAGED, chunk->round + 1);
  return DONE;
}

static enum outcome reduce_chunk(group_t *group, const chunk_t *chunk, uint64_t tag, const char *input,
                                 char *output, enum dtype dtype, enum reduction reduction) {
  size_t bytes = dtype_bytes(dtype), start = share_start(chunk, group->rank);
  size_t place = (chunk->start + start) * bytes;
  const void *sources[MAX_RANKS];
  TRY(wait_for_staged(group, chunk->round, tag));
  TRY(wait_for_all(group, GATHERED, chunk->round + 1 - group->layout.slots));
  for (int rank = 0; rank < group->ranks; rank++)
    sources[rank] = rank == group->rank ? input + place
                                        : stage_slot(group, rank, chunk->round) + start * bytes;
  reduce(dtype, reduction, output + place, result_slot(group, group->rank, chunk->round), sources,
         group->ranks, share_count(chunk, group->rank));
  raise_flag(group, REDUCED, chunk->round + 1);
  return DONE;
}

static enum outcome gather_chunk(group_t *group, const chunk_t *chunk, char *output, size_t bytes) {
  FOR_OTHERS(group, other) {
    TRY(wait_for(group, REDUCED, other, chunk->round + 1));
    memcpy(output + (chunk->start + share_start(chunk, other)) * bytes,
           result_slot(group, other, chunk->round), share_count(chunk, other) * bytes);
  }
  raise_flag(group, GATHERED, chunk->round + 1);
  return DONE;
}

/* Every rank sums its share of each chunk and hands the result to the others. While it waits for one chunk,
 * it works on the next: chunk c is staged, c - 1 reduced, c - 2 gathered. */
static enum outcome all_reduce_shared(group_t *group, uint64_t tag, const char *input, char *output,
                                      size_t count, enum dtype dtype, enum reduction reduction,
                                      size_t per_chunk, size_t chunks) {
  size_t bytes = dtype_bytes(dtype);
  for (size_t index = 0; index < chunks + 2; index++) {
    if (index < chunks) {
      chunk_t chunk = chunk_at(group, index, per_chunk, count);
      TRY(stage_chunk(group, &chunk, input, bytes));
    }
    if (index >= 1 && index - 1 < chunks) {
      chunk_t chunk = chunk_at(group, index - 1, per_chunk, count);
      TRY(reduce_chunk(group, &chunk, tag, input, output, dtype, reduction));
    }
    if (index >= 2) {
      chunk_t chunk = chunk_at(group, index - 2, per_chunk, count);
      TRY(gather_chunk(group, &chunk, output, bytes));
    }
  }
  return DONE;
}

/* Two ranks do not share the work of large tensors either: each gets as many bytes from the other's cache both
 * ways, but with half as many synchronisations. From here on, where memory takes the time, more of what is staged
 * is still in the cache with chunks of half the size. */
static const size_t LARGE_BYTES = 8 << 20;

enum outcome group_all_reduce(group_t *group, const void *input, void *output, size_t count,
                              enum dtype dtype, enum reduction reduction) {
  if (!can_reduce(dtype, reduction)) return REFUSED;
  size_t bytes = dtype_bytes(dtype), chunk = group->layout.chunk;
  int is_small = count * bytes <= smaller(group->one_shot_bytes, chunk);
  int is_alone = is_small || group->ranks == 2;
  size_t part = group->ranks == 2 && count * bytes >= LARGE_BYTES ? chunk / 2 : chunk;
  size_t per_chunk = part / bytes / 64 * 64;
  size_t chunks = is_small ? 1 : divide_up(count, per_chunk);
  call_t call = describe(ALL_REDUCE, dtype, reduction, count);
  uint64_t tag;
  enum outcome outcome = begin_call(group, &call, (uint32_t)chunks, &tag);
  if (outcome == DONE)
    outcome = is_alone ? all_reduce_alone(group, tag, input, output, count, dtype, reduction, per_chunk, chunks)
                       : all_reduce_shared(group, tag, input, output, count, dtype, reduction, per_chunk,
                                           chunks);
  return end_call(group, outcome);
}

/* How a reduce-scatter is cut into rounds: in each every rank gets an equal fraction of its part. */
typedef struct {
  size_t rounds;
  size_t count[MAX_RANKS]; /* elements of each rank's part */
  size_t start[MAX_RANKS]; /* of the part, in the input */
  size_t piece[MAX_RANKS]; /* elements of the part that a round covers */
} scatter_t;

static size_t piece_start(const scatter_t *scatter, int rank, size_t index) {
  return smaller(index * scatter->piece[rank], scatter->count[rank]);
}

static size_t piece_count(const scatter_t *scatter, int rank, size_t index) {
  return piece_start(scatter, rank, index + 1) - piece_start(scatter, rank, index);
}

static scatter_t plan_scatter(const group_t *group, const size_t *counts, size_t count, size_t bytes) {
  scatter_t scatter;
  enum { UNIT = 16 }; /* elements: pieces begin at whole lines of the staging slot */
  size_t total = 0, ranks = (size_t)group->ranks;
  for (size_t rank = 0; rank < ranks; rank++) {
    scatter.count[rank] = counts ? counts[rank] : count;
    scatter.start[rank] = total;
    total += scatter.count[rank];
  }
  size_t room = group->layout.chunk / bytes - ranks * UNIT;
  scatter.rounds = total ? divide_up(total, room - ranks) : 1;
  for (size_t rank = 0; rank < ranks; rank++)
    scatter.piece[rank] = round_up(divide_up(scatter.count[rank], scatter.rounds), UNIT);
  return scatter;
}

static enum outcome stage_pieces(group_t *group, const scatter_t *scatter, size_t index, const char *input,
                                 size_t bytes) {
  uint32_t round = group->round + (uint32_t)index;
  TRY(wait_for_slot(group, round));
  char *stage = stage_slot(group, group->rank, round);
  for (int rank = 0; rank < group->ranks; rank++) {
    size_t start = scatter->start[rank] + piece_start(scatter, rank, index);
    if (rank != group->rank) memcpy(stage, input + start * bytes, piece_count(scatter, rank, index) * bytes);
    stage += scatter->piece[rank] * bytes;
  }
  raise_flag(group, STAGED, round + 1);
  return DONE;
}

static enum outcome reduce_pieces(group_t *group, const scatter_t *scatter, size_t index, uint64_t tag,
                                  const char *input, char *output, enum dtype dtype,
                                  enum reduction reduction) {
  uint32_t round = group->round + (uint32_t)index;
  size_t bytes = dtype_bytes(dtype), place = 0, start = piece_start(scatter, group->rank, index);
  const void *sources[MAX_RANKS];
  TRY(wait_for_staged(group, round, tag));
  for (int rank = 0; rank < group->rank; rank++) place += scatter->piece[rank];
  for (int rank = 0; rank < group->ranks; rank++)
    sources[rank] = rank == group->rank ? input + (scatter->start[rank] + start) * bytes
                                        : stage_slot(group, rank, round) + place * bytes;
  reduce(dtype, reduction, output + start * bytes, NULL, sources, group->ranks,
         piece_count(scatter, group->rank, index));
  raise_both(group, round + 1);
  return DONE;
}

enum outcome group_reduce_scatter(group_t *group, const void *input, void *output, const size_t *counts,
                                  size_t count, enum dtype dtype, enum reduction reduction) {
  size_t bytes = dtype_bytes(dtype), total = 0;
  if (!can_reduce(dtype, reduction)) return REFUSED;
  scatter_t scatter = plan_scatter(group, counts, count, bytes);
  for (int rank = 0; rank < group->ranks; rank++) total += scatter.count[rank];
  call_t call = describe(REDUCE_SCATTER, dtype, reduction, total);
  describe_cut(&call, counts, group->ranks);
  uint64_t tag;
  enum outcome outcome = begin_call(group, &call, (uint32_t)scatter.rounds, &tag);
  for (size_t index = 0; outcome == DONE && index < scatter.rounds + 1; index++) {
    if (index < scatter.rounds) outcome = stage_pieces(group, &scatter, index, input, bytes);
    if (outcome == DONE && index >= 1)
      outcome = reduce_pieces(group, &scatter, index - 1, tag, input, output, dtype, reduction);
  }
  return end_call(group, outcome);
}
