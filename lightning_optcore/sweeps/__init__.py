"""Sweeps: the engine behind ``hydra/sweeper=optcore``, its journal, and the early stopping of trials."""
