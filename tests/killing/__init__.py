"""Kills at named points (`nydusd/points.py`): `make kill-points` has them all, `make test` a sample."""
