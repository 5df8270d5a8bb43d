"""colrow beside the systems that do the same: one model, one step, measured in turns."""
