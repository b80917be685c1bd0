"""Agents in processes of their own: `pool` is the worker's side, `child` is what they are."""
