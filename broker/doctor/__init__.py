"""`broker doctor`: what is wrong with a deployment, and what to do about it.

Each check gathers facts (I/O), and a pure function makes findings of them. docs/doctor.md lists them all.
"""
