"""The part of the sandbox that runs outside the Python process of the framework: one small process per pool.

It is started with `python -I -S`, imports nothing but the standard library, and everything it will ever need is imported
before it leaves the host's file system. Modules import each other relatively, so that it runs without `subl_jax`.
"""
