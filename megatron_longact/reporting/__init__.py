"""What a run shows and leaves behind: logs and pictures."""
