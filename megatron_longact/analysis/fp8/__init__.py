"""What FP8 does to a selection, emulated without a GPU."""
