"""Sweeps: the engine behind ``hydra/sweeper=optcore``, its journal, early stopping, and trials that continue others."""
