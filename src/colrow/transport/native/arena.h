/* The memory that the ranks of a group share: flags, descriptions of calls, and buffers for the data. */
#ifndef COLROW_ARENA_H
#define COLROW_ARENA_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum {
  MAX_RANKS = 64,
  MAX_SLOTS = 8,
  LINE = 128, /* two cache lines: neighbours are fetched in pairs */
  PAGE = 4096,
};

/* What a rank has done, as a number of rounds. Every collective is a number of rounds, the same on all ranks.
 * STAGED: has put its data of the round into its staging slot.
 * REDUCED: has read what the others staged for it; its own part of the sum is in its result slot.
 * GATHERED: has read the others' results. */
enum stage { STAGED, REDUCED, GATHERED, STAGES };

/* One counter that its owner raises and the others wait for, on a line of its own. */
typedef struct {
  _Alignas(LINE) _Atomic uint32_t rounds;
  _Atomic uint32_t sleepers; /* ranks that sleep until rounds changes */
  uint64_t tags[MAX_SLOTS];  /* of STAGED only: the call that the round belongs to */
} flag_t;

/* A call in words that can be compared and told to people. */
typedef struct {
  uint32_t operation, dtype, reduction, padding;
  uint64_t count; /* elements, or bytes where data is only moved */
  uint64_t cut;   /* a checksum of how it is divided over the ranks; 0 if equally */
} call_t;

typedef struct {
  flag_t flags[STAGES];
  _Alignas(LINE) call_t calls[MAX_SLOTS]; /* behind the tags, read when those differ */
  _Alignas(LINE) uint64_t given[MAX_RANKS]; /* all-to-all: bytes for each rank */
  _Alignas(LINE) _Atomic uint32_t left;     /* has closed the group in good order */
} member_t;

typedef struct {
  uint64_t version; /* of this layout; set by the creator before anybody attaches */
  uint64_t bytes;
  _Atomic uint32_t failure; /* 0, or why the group is no longer usable: see waiting.h */
  _Alignas(LINE) member_t members[MAX_RANKS];
} header_t;

enum { ARENA_VERSION = 1 };

/* Where everything is. The staging slots take what a rank gives, the result slots its part of a sum. */
typedef struct {
  int ranks;
  uint32_t slots;
  size_t chunk;        /* bytes of a staging slot */
  size_t result_bytes; /* bytes of a result slot: a chunk's share of one rank */
  size_t rank_bytes;
  size_t bytes; /* of everything */
} layout_t;

/* Returns 0, or -1 if the numbers make no sense. chunk is rounded up to whole pages; slots are 2, 4 or 8. */
int arena_layout(layout_t *layout, int ranks, size_t chunk, uint32_t slots);

static inline char *arena_stage(const layout_t *layout, header_t *header, int rank) {
  size_t start = (sizeof(header_t) + PAGE - 1) / PAGE * PAGE;
  return (char *)header + start + (size_t)rank * layout->rank_bytes;
}

static inline char *arena_results(const layout_t *layout, header_t *header, int rank) {
  return arena_stage(layout, header, rank) + layout->slots * layout->chunk;
}

/* Map the whole file. Returns NULL and sets errno. Not inherited by forked children. */
header_t *arena_map(const layout_t *layout, int file);
void arena_unmap(const layout_t *layout, header_t *header);

/* Each rank holds a lock on the byte of its number for as long as its process runs. */
int arena_is_locked(int file, int rank);

#endif
