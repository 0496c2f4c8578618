"""Whether the machines of a job are fit for it: small checks, each of which ends in ok, failed or not here.

`longact preflight` runs them on every rank and prints one table; examples/slurm does so before each start.
"""
