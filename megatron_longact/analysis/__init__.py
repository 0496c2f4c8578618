"""Looking at a model: where its Q and K activations are large, how stable that is, and what they carry."""
