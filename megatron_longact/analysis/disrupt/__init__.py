"""What a model loses without its loud channels."""
