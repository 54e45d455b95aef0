"""Faults on purpose: disks that fail, kills, callbacks that raise, hostile files; and how each of them ends.

``python -m tests.faults`` tries every one and writes its part of docs/reliability.md; `make faults` runs them as
tests.
"""
