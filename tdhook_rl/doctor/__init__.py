"""``check``: a policy, its methods and a collector are looked at before the first batch is collected.

Knows collectors and methods; nothing but the command line and the kit is above it.
"""
