from collections.abc import Callable

VERSION: int
KERNELS: str

def arena_bytes(ranks: int, chunk: int, slots: int, /) -> int: ...
def format_arena(file: int, ranks: int, chunk: int, slots: int, /) -> None: ...

class Group:
    def __new__(
        cls,
        file: int,
        rank: int,
        ranks: int,
        chunk: int,
        slots: int,
        one_shot_bytes: int,
        spin_seconds: float,
        yield_seconds: float,
        tick: Callable[[], float],
        /,
    ) -> Group: ...
    def all_reduce(self, input: int, output: int, count: int, dtype: int, reduction: int, /) -> int: ...
    def reduce_scatter(
        self, input: int, output: int, counts: int | tuple[int, ...], dtype: int, reduction: int, /
    ) -> int: ...
    def all_gather(self, input: int, output: int, counts: int | tuple[int, ...], dtype: int, /) -> int: ...
    def all_to_all(
        self,
        input: int,
        output: int,
        given: int | tuple[int, ...],
        taken: int | tuple[int, ...],
        dtype: int,
        /,
    ) -> int: ...
    def barrier(self) -> int: ...
    def problem(
        self,
    ) -> tuple[int, int, int, tuple[tuple[int, int, int, int], tuple[int, int, int, int]] | None]: ...
    def counters(self) -> dict[str, int]: ...
    def close(self) -> None: ...
