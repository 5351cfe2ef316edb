"""One thin command per platform; `python -m launch.local --help` and so on. What they do lives in `subl_jax.launching`."""
