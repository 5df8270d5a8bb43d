"""Text from models that are cut over ranks, and from the same models on one process."""
