"""One file a job: a run read from top to bottom."""
