"""The configuration groups, installed as ``lightning_optcore.conf``."""
