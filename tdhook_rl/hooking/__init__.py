"""How a policy becomes a hooked one: the tied clone, its class, where methods put their hooks.

Knows everything below; no method by name.
"""
