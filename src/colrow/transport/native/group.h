/* One rank's view of a group, and the collectives. No Python here: ranks may be threads of a test program. */
#ifndef COLROW_GROUP_H
#define COLROW_GROUP_H

#include <stdint.h>

#include "arena.h"
#include "kernels.h"

enum outcome {
  DONE = 0,
  TIMED_OUT = 1,   /* a rank did not come */
  DIED = 2,        /* its process has ended */
  LEFT = 3,        /* it has closed the group */
  MISMATCH = 4,    /* it is in another call */
  INTERRUPTED = 5, /* a signal handler of a rank raised */
  CLOSED = 6,      /* this rank has closed the group */
  FORKED = 7,      /* this process is a child of the rank's */
  REFUSED = 8,     /* arguments that make no sense */
  NESTED = 9,      /* a signal handler calls while its thread waits in a collective of the group */
};

enum operation { BARRIER, ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL };

/* What a collective that failed can tell. */
typedef struct {
  enum outcome outcome;
  int rank;        /* at fault, or that this rank waited for; -1 if unknown */
  int found_by;    /* which rank noticed */
  call_t mine, theirs; /* of a mismatch that this rank noticed */
  int has_calls;
} problem_t;

typedef struct group {
  header_t *header;
  layout_t layout;
  int file; /* -1: nobody's death is noticed */
  int rank, ranks;
  uint32_t round;     /* first round of the next collective */
  uint32_t last;      /* rounds that the current collective ends with */
  uint32_t refreshed; /* round at which all of seen was read again */
  uint32_t seen[STAGES][MAX_RANKS]; /* flags as last read: a wait that they satisfy touches no shared line */
  char *stage[MAX_RANKS], *results[MAX_RANKS];
  size_t one_shot_bytes; /* up to here every rank sums everything itself */
  int64_t spin_ns, yield_ns; /* how long a wait spins, then yields, before it sleeps: at most */
  int64_t patience_ns;       /* both together, as learned from the waits so far */
  double timeout;            /* seconds */
  /* called about ten times per second while a wait sleeps and when a signal comes; nonzero ends the wait */
  int (*tick)(struct group *);
  void *owner;
  problem_t problem;
  _Atomic int is_closing;
  unsigned generation; /* of the process: see group_is_forked */
  uint64_t spins, yields, sleeps; /* waits that were over while spinning, yielding, sleeping */
} group_t;

/* Write what the creator has to, before anybody attaches. */
void group_format(header_t *header, const layout_t *layout);

/* Attach to a mapped arena. Returns 0, or -1 if it is not one of this layout. */
int group_attach(group_t *group, header_t *header, const layout_t *layout, int file, int rank);

/* Tell the others that this rank has left; ends a collective under way in another thread; keeps the map. */
void group_leave(group_t *group);

/* Whether this process was forked from the one that attached. Call group_watch_forks once per process. */
int group_is_forked(const group_t *group);
void group_watch_forks(void);

/* The collectives, one at a time: DONE, or what went wrong, with more in group->problem. In- and output may be the same
 * memory for all_reduce; else they must not overlap, but all_gather's input may be its place in the output.
 * counts is NULL where all ranks have count. Where data is only moved, counts are bytes, and dtype, a number below
 * 64, is compared with the others' alone. After a failure the group is of no use any more. */
enum outcome group_barrier(group_t *group);
enum outcome group_all_reduce(group_t *group, const void *input, void *output, size_t count,
                              enum dtype dtype, enum reduction reduction);
enum outcome group_reduce_scatter(group_t *group, const void *input, void *output, const size_t *counts,
                                  size_t count, enum dtype dtype, enum reduction reduction);
enum outcome group_all_gather(group_t *group, const void *input, void *output, const size_t *counts,
                              size_t count, uint32_t dtype);
enum outcome group_all_to_all(group_t *group, const void *input, void *output, const size_t *given,
                              const size_t *taken, uint32_t dtype);

#endif
