"""The profiler: where the time of a run goes, why, and which setting mends it."""
