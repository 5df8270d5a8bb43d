#define _GNU_SOURCE
#include "arena.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

int arena_layout(layout_t *layout, int ranks, size_t chunk, uint32_t slots) {
  if (ranks < 1 || ranks > MAX_RANKS || slots < 2 || slots > MAX_SLOTS || chunk < 4 * PAGE) return -1;
  if (slots & (slots - 1)) return -1; /* when the number of rounds starts again at 0, the next slot must be next */
  chunk = round_up(chunk, PAGE);
  layout->ranks = ranks;
  layout->slots = slots;
  layout->chunk = chunk;
  /* a rank's share of a chunk is rounded up to 64 elements of at most 8 bytes */
  layout->result_bytes = round_up(chunk / (size_t)ranks + 64 * 8 + 8, PAGE);
  layout->rank_bytes = slots * (chunk + layout->result_bytes);
  layout->bytes = round_up(sizeof(header_t), PAGE) + (size_t)ranks * layout->rank_bytes;
  return 0;
}

header_t *arena_map(const layout_t *layout, int file) {
  struct stat status;
  if (fstat(file, &status)) return NULL;
  if ((size_t)status.st_size < layout->bytes) {
    errno = EINVAL;
    return NULL;
  }
  void *memory = mmap(NULL, layout->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (memory == MAP_FAILED) return NULL;
  madvise(memory, layout->bytes, MADV_HUGEPAGE); /* advice: may be refused */
  madvise(memory, layout->bytes, MADV_DONTFORK);
  return memory;
}

void arena_unmap(const layout_t *layout, header_t *header) { munmap(header, layout->bytes); }

int arena_is_locked(int file, int rank) {
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
  return fcntl(file, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}
