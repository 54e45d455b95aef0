"""Private attributes that are read where they are needed: there is nothing to wrap, or it would cost time in each call.

Each is known by name to more than its library (documented, or the ground that others' tools stand on).
"""

from __future__ import annotations

__all__ = ["IN_PLACE", "OVERRIDDEN"]

#: Attributes of others that any file of the package may name, each with what it is and why it is named.
IN_PLACE: dict[str, str] = {
    # of nn.Module
    "_parameters": "the parameters of one module, None where it has none; named_parameters leaves these out, names a "
    "shared one once, and some modules override it",
    "_buffers": "the buffers of one module, as _parameters; where a forward has assigned one, it is seen here",
    "_modules": "the children of one module, to put another in the place of one without changing the order",
    "_forward_hooks": "the hooks of one module; there are calls to add and remove one, and none to ask for them",
    "_forward_pre_hooks": "as _forward_hooks, of those that are called before it",
    "_backward_hooks": "as _forward_hooks, of those that are called with gradients of its inputs",
    "_backward_pre_hooks": "as _forward_hooks, of those that are called before its gradients",
    # of Tensor
    "_version": "how often a tensor was written to; torch documents it and has no public name for it",
    "_base": "the tensor that a view is of; torch documents it and has no public name for it",
    # documented by Python
    "_getframe": "sys._getframe(depth), the frame of a caller; inspect.currentframe() is the same and walks from here",
    "_exit": "os._exit(status), which ends the process without what runs at exit",
    "_fields": "the names of a named tuple's items, underlined to leave room for them",
    "_replace": "a named tuple with some items replaced, underlined as _fields is",
}

#: Methods and attributes of others that classes of the package define anew, each with the class it belongs to and why.
OVERRIDDEN: dict[str, str] = {
    "_step": "EnvBase, which documents it for whoever writes an environment",
    "_reset": "EnvBase, as _step; also the key that says which rows to reset",
    "_set_seed": "EnvBase, as _step, where it is abstract",
    "_supports_set_state": "EnvBase, to say that reset(state, set_state=True) begins at the state",
    "_apply": "nn.Module, all casts and moves of whose tensors pass it; the policy's owner makes them",
    "_write_to_tensordict": "TensorDictModule, the one place where a module's outputs become entries",
}
