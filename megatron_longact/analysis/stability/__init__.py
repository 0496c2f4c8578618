"""How stable a selection is."""
