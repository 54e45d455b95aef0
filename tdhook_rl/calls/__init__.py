"""One call of a hooked policy: what ran, what a method may ask of it, and how its results are published.

Knows hooked policies by :class:`~tdhook_rl.calls.policy.HookedPolicy` and methods by what they declare
(:class:`~tdhook_rl.calls.bound.BoundMethod`); no method by name, and not how a policy came to be hooked.
"""
