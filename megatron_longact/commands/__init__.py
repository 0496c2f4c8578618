"""What `longact` runs: one module a command, each with a `main(argv)` that returns the exit status."""
