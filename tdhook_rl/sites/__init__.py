"""Modules inside a policy: how one is named, hooked, and what the rows of its output are.

Knows modules and tensors, and the state of a call that hooks share (:class:`~tdhook_rl.sites.runtime.Runtime`). What a
policy decides, and what a call computes, is not known here.
"""
