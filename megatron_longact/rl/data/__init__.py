"""Where prompts come from, and what judges the responses."""
