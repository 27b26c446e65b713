"""Many processes and machines at one job, through Ray (extra "distributed")."""
