"""What the paper takes for granted: data, processes, run folders, the helper's plumbing, comparisons."""
