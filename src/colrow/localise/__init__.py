"""Numbers in a program that must become a rank's: head counts, split sizes, shapes."""

from colrow.localise.find import Localisation, localise

__all__ = ["Localisation", "localise"]
