"""What LongAct costs on any number of GPUs, on paper: pure arithmetic, no ranks."""
