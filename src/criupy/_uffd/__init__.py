"""The native part: userfaultfd, the lazy space and the pager.

Mechanism is C, policy and lifecycle are Python. ``criupy.h`` is the contract
between the two; the modules here are the thin typed layer over it.
"""
