"""Mutation testing: one small change of the package's code at a time, and whether a test notices.

`make mutants` runs it and writes its part of docs/reliability.md. Tools of this kind leave out functions with
decorators, which the public ones here are, or import torch anew for each change; here a fork has torch already.
"""
