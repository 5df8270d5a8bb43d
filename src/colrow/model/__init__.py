"""Models by name: built on the meta device or for real, whole or small, with example inputs."""

from colrow.model.examples import calls_for
from colrow.model.shrink import shrink
from colrow.model.specification import LoadedModel, load

__all__ = ["LoadedModel", "calls_for", "load", "shrink"]
