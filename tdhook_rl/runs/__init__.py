"""Single modules of one forward pass: captured, overridden or left early, without a method.

Knows sites and replays, and what a hooked policy answers; nothing of methods but how to leave their hooks out.
"""
