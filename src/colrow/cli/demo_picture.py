"""The picture of ``colrow demo matmul``: pure functions from the ranks' reports to what is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from colrow.cli.demo_ranks import A, B, D, Report, Rows, Share

Cell = Callable[[int, int], "float | str | None"]
"""What stands at a row and column of a matrix; ``None`` where a rank holds nothing."""

SIZE = len(A)
STYLES = ("cyan", "yellow", "magenta", "green", "blue", "red", "bright_cyan", "bright_yellow")
"""Colours of the ranks."""


def picture(reports: Sequence[Report]) -> RenderableType:
    """All of the demo but the check, from what each rank reported."""
    sections = [_task(reports), _by_columns(reports), _by_rows(reports)]
    if min(reports[0].grid_shape) > 1:
        sections.append(_on_grid(reports))
    return Group(*sections, _pair(reports))


def verdict(rows: Sequence[tuple[str, Rows, Rows, bool]]) -> RenderableType:
    """The check: for each product its name, the ranks' result, one process's, and whether all agree."""
    table = Table(box=box.SIMPLE_HEAVY, show_lines=True, show_edge=False, pad_edge=False)
    for heading in ("product", "on the ranks", "in one process", "equal on all ranks"):
        table.add_column(heading)
    for name, found, expected, equal in rows:
        answer = Text("yes", "bold green") if equal else Text("NO", "bold red")
        table.add_row(name, _whole(found), _whole(expected), answer)
    return _section("Check: is it what one process computes?", table)


def _task(reports: Sequence[Report]) -> RenderableType:
    product = [[sum(A[i][k] * B[k][j] for k in range(SIZE)) for j in range(SIZE)] for i in range(SIZE)]
    first = "+".join(f"{A[0][k]:g}*{B[k][0]:g}" for k in range(SIZE))
    count = len(reports)
    processes = ", ".join(f"rank {report.rank} = process {report.process}" for report in reports)
    return _section(
        f"One matrix product on {count} rank{'s' * (count > 1)}",
        _equation(_whole(A), "x", _whole(B), "=", _whole(product, "bold")),
        f"Each number of the product is a row of A times a column of B: {product[0][0]:g} = {first}. In a "
        "neural network A is the data and B the weights. When B is too large or too slow for one device, "
        "several processes, called ranks, each take a part of it.",
        Text(f"Real processes computed what follows: {processes}.", "dim"),
    )


def _by_columns(reports: Sequence[Report]) -> RenderableType:
    shares = [report.column for report in reports]
    busy = [rank for rank, share in enumerate(shares) if not share.right.is_empty]
    parts = [_matrix(shares[rank].alone.at, STYLES[rank]) for rank in busy]
    return _section(
        "Cut B by columns",
        "Every rank has all of A and some columns of B. It computes the same columns of the product, and "
        "these are already final. ('.' marks what a rank does not have.)",
        _work(shares, ("A", "columns of B", "computes its columns of A x B")),
        "Exchange: an all-gather. The ranks send each other their columns, and all have the product:",
        _equation(*_joined(parts, " "), "->", _owned(shares)),
        _moved(shares, " Empty places are sent, too." if len(busy) < len(shares) else ""),
    )


def _by_rows(reports: Sequence[Report]) -> RenderableType:
    shares = [report.row for report in reports]
    return _section(
        "Cut B by rows",
        "Every rank has some rows of B and the matching columns of A. It computes a matrix as large as the "
        "product, but each number in it is only one term of a sum:",
        _work(shares, ("columns of A", "rows of B", "computes a term of A x B")),
        "Exchange: an all-reduce. The terms of all ranks are added, and all have the sum:",
        _sum_of_terms(shares),
        _moved(shares),
    )


def _on_grid(reports: Sequence[Report]) -> RenderableType:
    rows, columns = reports[0].grid_shape
    shares = [report.grid for report in reports]
    steps = range(SIZE)
    table = Table(box=box.SIMPLE_HEAVY, show_lines=True, show_edge=False, pad_edge=False)
    for heading in ("rank", "has", *(f"step {k + 1}" for k in steps), "its number"):
        table.add_column(heading)
    for rank, share in enumerate(shares):
        place = f"{rank}\nrow {rank // columns}\ncolumn {rank % columns}"
        if share.alone.is_empty:
            table.add_row(Text(place, STYLES[rank]), "", Text("nothing is left for it", "dim", no_wrap=True))
            continue
        i, j = share.alone.rows[0], share.alone.columns[0]
        held = [
            f"{name}: {value:g}"
            for name, part in (("A", share.left), ("B", share.right))
            for row in part.values
            for value in row
        ]
        table.add_row(
            Text(place, STYLES[rank]),
            "\n".join(held),
            *(_step(shares, rank, i, k, j) for k in steps),
            Text(f"= {share.alone.values[0][0]:g}", STYLES[rank]),
        )
    return _section(
        f"Cut both, on a grid of {rows} x {columns} ranks (SUMMA)",
        "Every rank has one block of A, of B and of the product: nothing is stored twice. In step k the "
        "ranks that have column k of A send it along their grid row, and those that have row k of B send it "
        "along their grid column. Each rank multiplies what passes by and adds it up:",
        table,
        "Here the blocks are then gathered so that all have the product:",
        _equation(_owned(shares)),
        _moved(shares),
    )


def _step(shares: Sequence[Share], rank: int, i: int, k: int, j: int) -> Text:
    """The product ``a*b`` of step k for place (i, j), and who had the two."""
    of_a = [share.left.at(i, k) for share in shares]
    of_b = [share.right.at(k, j) for share in shares]
    found = [next((o, v) for o, v in enumerate(values) if v is not None) for values in (of_a, of_b)]
    factors = "*".join(f"{value:g}" for _, value in found)
    owners = "\n".join(f"{value:g} {'is own' if o == rank else f'from rank {o}'}" for o, value in found)
    return Text.assemble(factors, "\n", (owners, "dim"))


def _pair(reports: Sequence[Report]) -> RenderableType:
    shares = [report.pair for report in reports]
    return _section(
        "Both in turn: columns, then rows",
        "Two layers of a network are two products in turn, A x B x D, here with",
        _equation("D =", _whole(D)),
        "Cut B by columns and leave each rank's columns of A x B where they are: they are just what a cut of "
        "D by rows needs. Two products, one exchange. (The activation function between two layers takes each "
        "number alone, so it can be applied in between.) This pair of cuts, column then row, is what tensor "
        "parallelism does in every layer of a transformer.",
        _work(shares, ("columns of A x B", "rows of D", "computes a term of A x B x D")),
        "Exchange: one all-reduce, after both products:",
        _sum_of_terms(shares),
        _moved(shares),
    )


def _work(shares: Sequence[Share], headings: tuple[str, str, str]) -> Table:
    """Per rank: what it has of the two factors, and what it computes from them alone."""
    table = Table(box=box.SIMPLE_HEAVY, show_lines=True, show_edge=False, pad_edge=False)
    for heading in ("rank", *headings):
        table.add_column(heading)
    for rank, share in enumerate(shares):
        style = STYLES[rank]
        if share.right.is_empty:
            idle = Text("nothing is left for it", "dim")
            table.add_row(Text(str(rank), style), "", "", idle)
            continue
        terms = _matrix(lambda i, j, share=share: _terms(share, i, j))  # type: ignore[misc]
        table.add_row(
            Text(str(rank), style),
            _matrix(share.left.at, style),
            _matrix(share.right.at, style),
            _equation(terms, "=", _matrix(share.alone.at, style)),
        )
    return table


def _terms(share: Share, i: int, j: int) -> str | None:
    """``1*5+2*7``: the products that the rank can add up for this place; ``None`` if it holds none."""
    pairs = ((share.left.at(i, k), share.right.at(k, j)) for k in range(SIZE))
    return "+".join(f"{x:g}*{y:g}" for x, y in pairs if x is not None and y is not None) or None


def _sum_of_terms(shares: Sequence[Share]) -> Text:
    busy = [rank for rank, share in enumerate(shares) if not share.right.is_empty]
    terms = [_matrix(shares[rank].alone.at, STYLES[rank]) for rank in busy]
    return _equation(*_joined(terms, "+"), "=", _whole(shares[0].whole, "bold"))


def _moved(shares: Sequence[Share], remark: str = "") -> Text:
    moved = ", ".join(
        f"{count} {operation.replace('_', '-')}{'s' * (count > 1)} of {size} bytes"
        for operation, (count, size) in shares[0].moved.items()
    )
    counted = f"{moved} (8 for each number)" if moved else "nothing, the one rank has it all"
    return Text(f"Counted on rank 0: {counted}.{remark}", "dim")


def _owned(shares: Sequence[Share]) -> Text:
    """The whole product, each number in the colour of the rank that computed it."""

    def style(i: int, j: int) -> str:
        return "bold " + STYLES[next(r for r, share in enumerate(shares) if share.alone.at(i, j) is not None)]

    return _matrix(lambda i, j: shares[0].whole[i][j], style)


def _whole(values: Rows, style: str = "") -> Text:
    return _matrix(lambda i, j: values[i][j], style)


def _matrix(cell: Cell, style: str | Callable[[int, int], str] = "") -> Text:
    """Lines ``[ 1 2 ]``, as many as the matrix has rows; ``.`` stands for what is not held."""
    values = [[cell(i, j) for j in range(SIZE)] for i in range(SIZE)]
    texts = [["." if v is None else v if isinstance(v, str) else f"{v:g}" for v in row] for row in values]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for i, row in enumerate(texts):
        line = Text("[ ")
        for j, text in enumerate(row):
            own = style if isinstance(style, str) else style(i, j)
            line.append("" if j == 0 else "  ")
            line.append(text.rjust(widths[j]), "dim" if values[i][j] is None else own)
        lines.append(line.append(" ]"))
    return Text("\n").join(lines)


def _equation(*parts: Text | str) -> Text:
    """Matrices side by side, with signs between them on the last line."""
    lines = [Text() for _ in range(SIZE)]
    for part in parts:
        if isinstance(part, str):
            rows = [Text(" " * len(part))] * (SIZE - 1) + [Text(part)]
        else:
            rows = list(part.split("\n"))
        for line, row in zip(lines, rows, strict=True):
            line.append_text(row).append(" ")
    result = Text("\n").join(lines)
    result.no_wrap = True
    return result


def _joined(parts: Sequence[Text], sign: str) -> list[Text | str]:
    """The parts with a sign between each two."""
    return [one for part in parts for one in (sign, part)][1:]


def _section(title: str, *content: RenderableType) -> RenderableType:
    padded = [Padding(one, (0, 2, 1, 2)) for one in content]
    return Group(Rule(Text(title, "bold"), align="left"), "", *padded)
