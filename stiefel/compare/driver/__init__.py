"""Outside the processes of runs: which are started, where, and what becomes of them."""
