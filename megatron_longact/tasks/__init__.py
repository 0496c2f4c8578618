"""What a model is asked, and how an answer is scored: for training and for evaluation."""
