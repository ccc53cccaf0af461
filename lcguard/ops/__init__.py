"""Guards on a paged KV cache: PyTorch is the specification, Triton the fast path.

``work`` says what a guard does to a token, ``reference`` does it in PyTorch, ``kv_rewrite`` in
Triton, and ``dispatch`` picks; LCGUARD_OPS=reference or triton overrides. Import what you use from
there: nothing is imported here, Triton least of all.
"""
