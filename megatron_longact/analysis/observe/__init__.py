"""Outliers among the channels of a model."""
