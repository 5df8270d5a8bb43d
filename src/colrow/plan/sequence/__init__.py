"""Sequence parallelism: what lies between regions is cut along the sequence, in place of being whole."""

from colrow.plan.sequence.cut import Crossing, SequenceCut
from colrow.plan.sequence.find import find_sequences
from colrow.plan.sequence.worth import notes_of_sequences, pays

__all__ = ["Crossing", "SequenceCut", "find_sequences", "notes_of_sequences", "pays"]
